"""Where a number comes from: seed, command, versions, hardware, git commit. Standard library only, and fast."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from coldforge._version import __version__

PACKAGES = ("torch", "torch-pruning", "lightning-fabric", "numpy", "onnx", "onnxruntime", "openvino")
"""Packages whose versions are recorded."""

FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""CPU flags that decide how fast, and with which rounding, networks are computed."""


def provenance(seed: int, command: str | Sequence[str] = "", **more: Any) -> dict[str, Any]:
    """All that a record says about its origin.

    Args:
        seed: the recipe's seed.
        command: the command line, as text or as a list of words.
        more: further plain values, such as ``data`` or ``stage_keys``.

    Returns:
        command, created (UTC, ISO 8601), seed, git_commit, git_dirty, versions, hardware, os; and ``more``.
    """
    commit, dirty = own_git_state()
    return {
        "command": command if isinstance(command, str) else shlex.join(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(),
        "hardware": hardware(),
        "os": platform.platform(),
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of python, of coldforge and of the installed packages among :data:`PACKAGES`."""
    found = {name: _version(name) for name in PACKAGES}
    installed = {name: version for name, version in found.items() if version}
    return {"python": platform.python_version(), "coldforge": __version__, **installed}


@cache  # of what is imported, for good; it is read from disk in milliseconds, and asked for in every key of a sweep
def _version(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return ""


# --- hardware --------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """Cpu (model), machine, cores (physical), threads (logical), memory_bytes, flags (those of :data:`FLAGS`)."""
    present = cpu_flags()
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": physical_cores(),
        "threads": len(_allowed_cpus()),
        "memory_bytes": _memory_bytes(),
        "flags": [flag for flag in FLAGS if flag in present],
    }


def hardware_fingerprint() -> str:
    """12 hexadecimal digits that are equal on machines of the same CPU model, cores and relevant CPU flags."""
    facts = hardware()
    text = "\n".join([facts["cpu"], facts["machine"], str(facts["cores"]), *facts["flags"]])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cpu_flags() -> frozenset[str]:
    """All features that the CPU announces, in the names of Linux; empty where they cannot be read."""
    if sys.platform == "darwin":
        return _flags_of_macos(_sysctl("-a"))
    return _flags_of_cpuinfo(_cpuinfo())


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX-BF16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call; None without."""
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])), None)


def has_vnni() -> bool:
    """Whether the CPU sums int8 products in 32 bits (VNNI); without it, 16-bit sums may saturate."""
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})


def cpu_model() -> str:
    """Name of the CPU."""
    if sys.platform == "darwin":
        return _sysctl("-n", "machdep.cpu.brand_string").strip() or platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores that this process may use: hyper-threads count once; affinity and a container's CPU quota are respected."""
    if sys.platform == "darwin":
        cores = int(_sysctl("-n", "hw.physicalcpu").strip() or 0)
    else:
        cores = _cores_of_cpuinfo(_cpuinfo(), _allowed_cpus())
    quota = _cpu_quota()
    cores = cores or len(_allowed_cpus())
    return max(1, min(cores, quota) if quota else cores)


def _cpuinfo() -> str:
    return _read("/proc/cpuinfo")


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _sysctl(*arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["sysctl", *arguments], capture_output=True, text=True, timeout=5, check=False).stdout
    return ""


def _flags_of_cpuinfo(text: str) -> frozenset[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _flags_of_macos(text: str) -> frozenset[str]:
    names: set[str] = set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if re.fullmatch(r"machdep\.cpu\.(leaf7_)?features", name):  # Intel: one line of names such as AVX2, AVX512VNNI
            names.update(re.sub(r"^avx512(vnni|bf16)$", r"avx512_\1", word) for word in value.lower().split())
        elif name.startswith("hw.optional.") and value.strip() == "1":  # Apple silicon: one line for each feature
            word = name.rpartition(".")[2].lower().removeprefix("feat_")
            names.add({"advsimd": "asimd", "dotprod": "asimddp"}.get(word, word))
    return frozenset(names)


def _cores_of_cpuinfo(text: str, allowed: set[int]) -> int:
    """Distinct (socket, core) pairs among the allowed processors; 0 where /proc/cpuinfo does not name them."""
    cores = set()
    for block in text.split("\n\n"):
        facts = dict(re.findall(r"^(processor|physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE))
        if "core id" in facts and int(facts.get("processor", -1)) in allowed:
            cores.add((facts.get("physical id"), facts["core id"]))
    return len(cores)


def _allowed_cpus() -> set[int]:
    with contextlib.suppress(AttributeError):  # only Linux has it
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_quota() -> int:
    """Whole CPUs that the control group (container) grants; 0: no limit. Version 2, then version 1."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    with contextlib.suppress(ValueError, ZeroDivisionError):  # "max" is no number
        if int(quota) > 0:
            return max(1, round(int(quota) / int(period)))
    return 0


def _memory_bytes() -> int:
    if sys.platform == "darwin":
        return int(_sysctl("-n", "hw.memsize").strip() or 0)
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


# --- git, and comparing ----------------------------------------------------------------------------------------------


def git_state(folder: Path | None = None) -> tuple[str, bool]:
    """Commit of the repository around a folder (default: the current one), and whether it has uncommitted changes.

    The commit is empty where there is no repository, no commit, or no git.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD").strip()
    return (commit, bool(_git(folder, "status", "--porcelain").strip())) if commit else ("", False)


@cache  # the code that runs is that of the moment when it was imported
def own_git_state() -> tuple[str, bool]:
    """:func:`git_state` of this package's own repository; empty where it was installed from a wheel."""
    here = Path(__file__)
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)  # not so inside of the user's repository
    return git_state(here.parent) if tracked else ("", False)


def _git(folder: Path | None, *arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # look only: do not refresh the user's index
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in versions and hardware between two provenances, one readable line each.

    >>> differences({"versions": {"torch": "2.6"}}, {"versions": {"torch": "2.13"}})
    ['torch: 2.6 when recorded, 2.13 here']
    """
    lines = []
    for table in ("versions", "hardware"):
        was, now = old.get(table, {}), new.get(table, {})
        for name in sorted({*was, *now}):
            before, after = was.get(name), now.get(name)
            if isinstance(before, list) and isinstance(after, list):
                gone, added = [x for x in before if x not in after], [x for x in after if x not in before]
                lines += [f"CPU flag {flag}: present when recorded, missing here" for flag in gone]
                lines += [f"CPU flag {flag}: missing when recorded, present here" for flag in added]
            elif before != after and name != "memory_bytes":  # differs between two boots of one machine
                lines.append(f"{name}: {_say(before)} when recorded, {_say(after)} here")
    return lines


def _say(value: object) -> str:
    return "absent" if value is None else str(value)
