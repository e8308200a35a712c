"""What this machine can do, in words: the findings behind ``coldforge doctor``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from coldforge.errors import DataError
from coldforge.provenance import cpp_compiler, cpu_flags, hardware, has_bf16, has_vnni, versions
from coldforge.report.text import size
from coldforge.store import Store


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    topic: str
    found: str
    advice: str = ""


def examine(store: Store) -> list[Finding]:
    """Look at versions, processor, 8-bit arithmetic, data sets, energy meter and store.

    A part that cannot be examined (a broken installation, say) gives a finding that says why; it never raises.
    """
    return [
        *(Finding(name, version) for name, version in versions().items()),
        *_try("processor", _processor),
        *_try("int8", _int8),
        *_try("data sets", _data_sets),
        *_try("energy", _energy),
        *_try("store", lambda: _store(store)),
    ]


def _try(topic: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except Exception as error:
        return [Finding(topic, f"could not be examined: {type(error).__name__}: {error}", "reinstall coldforge")]


def _processor() -> list[Finding]:
    facts = hardware()
    memory = f"{facts['memory_bytes'] / 1e9:.0f} GB memory" if facts["memory_bytes"] else "memory unknown"
    found = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {memory}"
    flags = ", ".join(facts["flags"]) or ("none that matter" if cpu_flags() else "cannot be read here")
    slower = "training runs in fp32; with bf16 a step took 7 to 40 % less time, the more the wider the network"
    bf16 = "training runs in bf16" if has_bf16() else slower
    kernels = (
        "fake quantization is compiled" if cpp_compiler() else "fake quantization is not compiled: slower training"
    )
    return [
        Finding("processor", found),
        Finding("CPU flags", flags),
        Finding("bf16", _yes(has_bf16()), bf16),
        Finding("C++ compiler", cpp_compiler() or "none", kernels),
    ]


def _int8() -> list[Finding]:
    from coldforge.deploy.runtime import int8_saturates

    if int8_saturates():
        advice = "8-bit sums saturate here: export with --set deploy.reduce_range=true, or expect other labels"
        return [Finding("int8 saturates", "yes", advice)]
    speed = "fast int8 kernels (VNNI)" if has_vnni() else "int8 answers right; without VNNI it gains less speed"
    return [Finding("int8 saturates", "no", speed)]


def _data_sets() -> list[Finding]:
    get_fashion = "apt-get install dataset-fashion-mnist, or set $COLDFORGE_FASHION_MNIST; else it is downloaded"
    get_cifar = "set $COLDFORGE_CIFAR10 to a folder with train.parquet and test.parquet; else it is downloaded"
    return [
        Finding("fashion-mnist-mini", "ships with coldforge"),
        _data_set("fashion-mnist", get_fashion),
        _data_set("cifar10", get_cifar),
    ]


def _data_set(name: str, advice: str) -> Finding:
    from coldforge.data.sources import locate

    try:
        folder = locate(name)
    except DataError as error:
        return Finding(name, "cannot be used", str(error))
    return Finding(name, str(folder or "not on this machine"), "" if folder else advice)


def _energy() -> list[Finding]:
    from coldforge.measure.energy import energy_source

    found = energy_source()
    advice = (
        "" if found.startswith("measured") else "for measured energy, let your user read /sys/class/powercap (RAPL)"
    )
    return [Finding("energy", found, advice)]


def _store(store: Store) -> list[Finding]:
    folder = next(path for path in (store.root, *store.root.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    advice = "less than 2 GB free: run `coldforge store prune`, or set $COLDFORGE_HOME" if free < 2e9 else ""
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = "cannot be written: set $COLDFORGE_HOME to a folder that you may write to"
    return [Finding("store", f"{store.root}: {size(store.size_bytes())}, {free / 1e9:.1f} GB free", advice)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
