"""Energy of one image: from the processor's own counter where it can be read, otherwise an estimate that says so.

- ``measured (RAPL)``: the counters of all processor packages under ``/sys/class/powercap`` (Intel and AMD, Linux;
  many systems let only root read them). They include idle power and whatever else the machine does.
- ``measured (NVML)``: the energy counter of the first NVIDIA GPU, where the work runs there and ``pynvml`` is there.
- ``estimated (10 W per busy core x CPU seconds)``: CPU seconds of this process times :data:`WATTS_PER_BUSY_CORE`.
  Good for the ratio of two networks on one machine, not for comparing machines.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from coldforge.errors import UsageError

WATTS_PER_BUSY_CORE = 10.0
"""A guess, the same for every machine: thermal design power divided by cores is 4 to 16 W on common processors
(15 W / 4 cores in a laptop, 125 W / 8 at a desk, 350 W / 32 in a server)."""

POWERCAP = Path("/sys/class/powercap")

Device = Literal["cpu", "cuda"]


def energy_source(*, device: Device = "cpu", powercap: Path = POWERCAP) -> str:
    """How :func:`energy_per_image` would find energy here; begins with "measured" or "estimated"."""
    return _meter(device, powercap, time.process_time)[1]


def energy_per_image(
    call: Callable[[], object],
    images_per_call: int,
    *,
    seconds: float = 1.0,
    settle: float = 0.06,
    device: Device = "cpu",
    powercap: Path = POWERCAP,
    clock: Callable[[], float] = time.perf_counter,
    cpu_time: Callable[[], float] = time.process_time,
) -> tuple[float, str]:
    """Run ``call`` again and again and divide the energy by the images.

    Args:
        call: does one batch, and waits for its result.
        images_per_call: images in that batch.
        seconds: how long to run; counters advance about every millisecond, so less than 0.1 s means little.
        settle: seconds of calls before that, in which the threads of the runtime before, which spin for some tens of
            milliseconds after their work, go to sleep: they would be charged to this one. One call at least.
        device: where the call computes; "cuda" reads the GPU's counter if it can.
        powercap, clock, cpu_time: replaced in tests.

    Returns:
        Joules per image, and the method, which begins with "measured" or "estimated".

    Raises:
        UsageError: where ``images_per_call`` is below 1.
    """
    if images_per_call < 1:
        raise UsageError(f"images_per_call: expected at least 1, got {images_per_call}")
    read_joules, method = _meter(device, powercap, cpu_time)
    start, calls = clock(), 0
    while calls == 0 or clock() - start < settle:
        call()
        calls += 1
    before, start, calls = read_joules(), clock(), 0
    while calls == 0 or clock() - start < seconds:
        call()
        calls += 1
    return (read_joules() - before) / (calls * images_per_call), method


def _meter(device: Device, powercap: Path, cpu_time: Callable[[], float]) -> tuple[Callable[[], float], str]:
    """A function that reads joules since some moment, and the method's name."""
    if device == "cuda" and (gpu := _nvml_joules()) is not None:
        return gpu, "measured (NVML)"
    if device == "cpu" and (packages := _rapl_packages(powercap)):
        return _RaplMeter(packages), "measured (RAPL)"
    return lambda: cpu_time() * WATTS_PER_BUSY_CORE, (
        f"estimated ({WATTS_PER_BUSY_CORE:g} W per busy core x CPU seconds)"
    )


def _rapl_packages(powercap: Path) -> list[Path]:
    """Folders of the packages whose counter can be read; all of them or none, since a part would be a wrong sum.

    Subdomains (``intel-rapl:0:1``, the cores or the memory of a package) are parts of a package; ``psys`` contains it.
    """
    packages = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            if folder.name.count(":") != 1 or not (folder / "name").read_text().startswith("package"):
                continue
            _microjoules(folder / "energy_uj")
            _microjoules(folder / "max_energy_range_uj")
        except (OSError, ValueError):
            return []
        packages.append(folder)
    return packages


def _microjoules(file: Path) -> int:
    return int(file.read_text())


class _RaplMeter:
    """Joules since the first reading, summed over packages; each counter may wrap once between two readings."""

    def __init__(self, packages: list[Path]) -> None:
        self._files = [folder / "energy_uj" for folder in packages]
        self._ranges = [_microjoules(folder / "max_energy_range_uj") for folder in packages]
        self._last = [_microjoules(file) for file in self._files]
        self._total = 0

    def __call__(self) -> float:
        for index, file in enumerate(self._files):
            value = _microjoules(file)
            used = value - self._last[index]
            self._total += used if used >= 0 else used + self._ranges[index]
            self._last[index] = value
        return self._total * 1e-6


def _nvml_joules() -> Callable[[], float] | None:
    """Reader of the first GPU's energy counter, or None where there is no driver, no pynvml or no counter."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # pynvml's own error classes exist only when it is installed; any failure means "not readable"
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
