import json
import subprocess
import sys
from pathlib import Path

import pytest

from coldforge import provenance as module
from coldforge._version import __version__
from coldforge.provenance import (
    cpu_flags,
    differences,
    git_state,
    hardware,
    hardware_fingerprint,
    has_bf16,
    has_vnni,
    physical_cores,
    provenance,
    versions,
)


def cpuinfo(sockets=1, cores=2, threads=1, flags="fpu avx2 avx512f"):
    """What Linux says; the second threads of the cores come after all first ones."""
    blocks, number = [], 0
    for _ in range(threads):
        for socket in range(sockets):
            for core in range(cores):
                blocks.append(
                    f"processor\t: {number}\nmodel name\t: Some CPU @ 2 GHz\nphysical id\t: {socket}\n"
                    f"core id\t\t: {core}\nflags\t\t: {flags}"
                )
                number += 1
    return "\n\n".join(blocks) + "\n"


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be another Linux machine."""

    def pretend(text, *, allowed=range(64), cpu_max=""):
        files = {"/proc/cpuinfo": text, "/sys/fs/cgroup/cpu.max": cpu_max, "/proc/meminfo": "MemTotal:  1000 kB\n"}
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(module, "_read", lambda path: files.get(path, ""))
        monkeypatch.setattr(module, "_allowed_cpus", lambda: set(allowed))

    return pretend


def test_provenance_is_plain_and_complete():
    found = provenance(7, ["coldforge", "run", "my recipe.toml"], stage_keys={"baseline": "ab"})
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 7
    assert found["command"] == "coldforge run 'my recipe.toml'"
    assert found["stage_keys"] == {"baseline": "ab"}
    assert found["created"].endswith("+00:00")
    assert set(found) == {
        "command", "created", "seed", "git_commit", "git_dirty", "versions", "hardware", "os", "stage_keys",
    }  # fmt: skip
    assert provenance(7, "as text")["command"] == "as text"


def test_versions():
    found = versions()
    assert found["coldforge"] == __version__
    assert found["python"] == sys.version.split()[0]
    assert {"torch", "numpy", "onnx", "onnxruntime", "torch-pruning"} <= set(found)


def test_this_machine():
    facts = hardware()
    assert 1 <= facts["cores"] <= facts["threads"]
    assert facts["cpu"]
    assert facts["memory_bytes"] > 1e8
    assert set(facts["flags"]) <= cpu_flags()
    assert hardware_fingerprint() == hardware_fingerprint()
    assert len(hardware_fingerprint()) == 12


@pytest.mark.parametrize(
    ("text", "allowed", "cpu_max", "expected"),
    [
        (cpuinfo(cores=4), range(4), "", 4),
        (cpuinfo(cores=4, threads=2), range(8), "", 4),  # hyper-threads count once
        (cpuinfo(sockets=2, cores=4), range(8), "", 8),
        (cpuinfo(cores=4, threads=2), {0, 1, 4, 5}, "", 2),  # affinity: two cores with both threads
        (cpuinfo(cores=8), range(8), "200000 100000\n", 2),  # a container with two CPUs
        (cpuinfo(cores=8), range(8), "50000 100000\n", 1),
        (cpuinfo(cores=8), range(8), "max 100000\n", 8),
        ("processor : 0\nFeatures : fp asimd\n", range(3), "", 3),  # ARM names no cores
        ("", range(3), "", 3),
    ],
)
def test_physical_cores(machine, text, allowed, cpu_max, expected):
    machine(text, allowed=allowed, cpu_max=cpu_max)
    assert physical_cores() == expected


@pytest.mark.parametrize(
    ("flags", "bf16", "vnni"),
    [
        ("avx2", False, False),
        ("avx2 avx512_bf16", True, False),
        ("amx_bf16 amx_int8", True, False),
        ("avx_vnni", False, True),
        ("avx512_vnni avx512_bf16", True, True),
    ],
)
def test_bf16_and_vnni(machine, flags, bf16, vnni):
    machine(cpuinfo(flags=flags))
    assert cpu_flags() == set(flags.split())
    assert (has_bf16(), has_vnni()) == (bf16, vnni)


def test_arm_and_unknown_processors(machine):
    machine("processor : 0\nFeatures\t: fp asimd asimddp bf16\n")
    assert hardware()["flags"] == ["asimd", "asimddp", "bf16"]
    machine("")
    assert cpu_flags() == frozenset()


def test_macos_flags():
    intel = "machdep.cpu.features: FPU AVX1.0\nmachdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI\n"
    assert module._flags_of_macos(intel) >= {"avx2", "avx512f", "avx512_vnni"}
    apple = "hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    assert module._flags_of_macos(apple) == {"asimd", "bf16"}


def test_the_fingerprint_tells_machines_apart(machine):
    prints = []
    for text in (cpuinfo(), cpuinfo(cores=4), cpuinfo(flags="avx2"), cpuinfo().replace("Some", "Other")):
        machine(text)
        prints.append(hardware_fingerprint())
    assert len(set(prints)) == 4
    machine(cpuinfo(flags="fpu avx2 avx512f some_bug_mitigation"))
    assert hardware_fingerprint() == prints[0]


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True
    )


def test_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == ("", False)
    git(tmp_path, "init")
    assert git_state(tmp_path) == ("", False)  # no commit yet
    (tmp_path / "f").write_text("1")
    git(tmp_path, "add", "f")
    git(tmp_path, "commit", "-m", "x")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40
    assert not dirty
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path) == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == ("", False)


def test_differences_are_readable():
    old = {
        "versions": {"torch": "2.6", "numpy": "2.0", "onnx": "1"},
        "hardware": {"cpu": "A", "cores": 2, "memory_bytes": 1, "flags": ["avx2", "amx_int8"]},
    }
    new = {
        "versions": {"torch": "2.13", "numpy": "2.0", "openvino": "9"},
        "hardware": {"cpu": "A", "cores": 4, "memory_bytes": 2, "flags": ["avx2", "avx_vnni"]},
    }
    assert differences(old, new) == [
        "onnx: 1 when recorded, absent here",
        "openvino: absent when recorded, 9 here",
        "torch: 2.6 when recorded, 2.13 here",
        "cores: 2 when recorded, 4 here",
        "CPU flag amx_int8: present when recorded, missing here",
        "CPU flag avx_vnni: missing when recorded, present here",
    ]
    assert differences(old, old) == differences({}, {}) == []
    assert differences(provenance(0), provenance(1)) == []


def test_only_the_standard_library_is_imported():
    names = {name.split(".")[0] for name in _imports(Path(module.__file__).read_text())}
    assert names - set(sys.stdlib_module_names) == {"coldforge"}


def _imports(text):
    import ast

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
