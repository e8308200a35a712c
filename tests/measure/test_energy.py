from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from coldforge.errors import UsageError
from coldforge.measure.energy import WATTS_PER_BUSY_CORE, energy_per_image, energy_source


def add_domain(powercap: Path, folder: str, name: str, energy_uj: int, max_uj: int = 1_000_000) -> Path:
    domain = powercap / folder
    domain.mkdir(parents=True)
    (domain / "name").write_text(f"{name}\n")
    (domain / "energy_uj").write_text(f"{energy_uj}\n")
    (domain / "max_energy_range_uj").write_text(f"{max_uj}\n")
    return domain


def ticking_clock() -> types.SimpleNamespace:
    state = types.SimpleNamespace(now=0.0)
    state.read = lambda: state.now
    return state


def consume(clock: types.SimpleNamespace, **joules: tuple[Path, int]) -> None:
    clock.now += 1.0
    for domain, microjoules in joules.values():
        limit = int((domain / "max_energy_range_uj").read_text())
        value = int((domain / "energy_uj").read_text())
        (domain / "energy_uj").write_text(f"{(value + microjoules) % limit}\n")


def test_rapl_packages_are_summed_and_wrap(tmp_path: Path) -> None:
    first = add_domain(tmp_path, "intel-rapl:0", "package-0", 10)
    second = add_domain(tmp_path, "intel-rapl:1", "package-1", 950_000)
    add_domain(tmp_path, "intel-rapl:0:0", "core", 5)
    add_domain(tmp_path, "intel-rapl:2", "psys", 7)
    clock = ticking_clock()
    joules, method = energy_per_image(
        lambda: consume(clock, a=(first, 20_000), b=(second, 30_000)),
        5,
        seconds=2.0,
        powercap=tmp_path,
        clock=clock.read,
    )
    assert method == "measured (RAPL)"
    assert joules == pytest.approx(0.050 / 5)  # both packages, across the wrap of the second at 1 J
    assert energy_source(powercap=tmp_path) == "measured (RAPL)"


def test_a_package_that_cannot_be_read_makes_it_an_estimate(tmp_path: Path) -> None:
    add_domain(tmp_path, "intel-rapl:0", "package-0", 10)
    unreadable = add_domain(tmp_path, "intel-rapl:1", "package-1", 10)
    (unreadable / "energy_uj").unlink()
    assert energy_source(powercap=tmp_path).startswith("estimated")


def test_the_estimate_counts_cpu_seconds_and_says_so(tmp_path: Path) -> None:
    clock = ticking_clock()
    cpu = ticking_clock()

    def call() -> None:
        clock.now += 0.5
        cpu.now += 0.8  # two busy threads, most of the time

    joules, method = energy_per_image(
        call, 4, seconds=1.0, powercap=tmp_path / "none", clock=clock.read, cpu_time=cpu.read
    )
    assert method == "estimated (10 W per busy core x CPU seconds)"
    assert joules == pytest.approx(0.8 * WATTS_PER_BUSY_CORE / 4)
    assert energy_source(powercap=tmp_path / "none") == method


def test_a_gpu_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = ticking_clock()
    fake = types.ModuleType("pynvml")
    fake.__dict__.update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: int(clock.now * 3_000),  # 3 W, in millijoules
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    joules, method = energy_per_image(
        lambda: consume(clock), 2, seconds=4.0, device="cuda", powercap=tmp_path, clock=clock.read
    )
    assert (method, joules) == ("measured (NVML)", pytest.approx(1.5))


def test_without_nvml_a_gpu_gets_an_estimate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_source(device="cuda", powercap=tmp_path).startswith("estimated")


def test_this_machine_gives_a_positive_number() -> None:
    joules, method = energy_per_image(lambda: sum(range(50_000)), 1, seconds=0.05)
    assert joules > 0
    assert method.startswith(("measured", "estimated"))


def test_no_images_is_an_error() -> None:
    with pytest.raises(UsageError, match="expected at least 1, got 0"):
        energy_per_image(lambda: None, 0)
