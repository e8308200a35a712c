"""What does the book-keeping of a sweep cost, and what of it grows?

    python benchmarks/sweep_scale.py [--sizes 200 2000 20000] [--executors serial process ray]
    python benchmarks/sweep_scale.py --overhead | --throughput | --workers | --table

Without a flag: synthetic sweeps, whose stages only write a number, through the real store, graph, conductor, records
and tables. Measured are the seconds to expand and survey, to run, to resume when all is done, to write all records anew
from a full store, and to read them and write the tables; the peak memory of the conductor; files. Each step is a
process of its own, and the live table is drawn, as for a user.

``--overhead``: real trials, tiny ones, whose stages are all in the store: what each takes.
``--throughput``: two workers beside one, in turns, on equal trials of matrix products (one thread) and of sleep; two
bare processes beside one on the same products, which is all that the machine has to give just then.
``--workers``: 1 to 1000 simulated workers: what the conductor spends on each stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from synthetic_trials import TINY, Nothing, Numbers, Simulated, multiply, sweep_of

from coldforge.console_sweep import SweepListener
from coldforge.measure import energy_per_image
from coldforge.provenance import provenance
from coldforge.sealed import write_atomic
from coldforge.stages import evidence
from coldforge.store import Store
from coldforge.sweep import Listener, SweepSpec, conduct, expand, make_executor, survey
from coldforge.sweep.table import load_results, write_tables
from coldforge.sweep.workshop import RecipeWorkshop

T = TypeVar("T")
WORKERS = {"serial": 1, "process": 2, "ray": 2}
CROWDS = (1, 10, 100, 1000)


def alone(function: Callable[..., T], *arguments: object) -> T:
    """Call it in a fresh process: its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """Most memory that this process has had; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def run(spec: SweepSpec, executor: str, home: Path, out: Path, workers: int, *work: float) -> dict[str, Any]:
    """Expand, survey, conduct."""
    workshop = Numbers(home, *work)
    begin = time.perf_counter()
    state = survey(spec, expand(spec), workshop, out)
    surveyed = time.perf_counter()
    hands = make_executor(executor, workshop, workers=workers, threads=1)
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        SweepListener(slots=hands.slots, console=Console(file=nowhere, force_terminal=True)) as listener,
    ):
        conduct(state, workshop, hands, out, listener=listener)
    ended = time.perf_counter()
    assert len(state.finished) == len(state.trials)
    return {
        "survey_s": surveyed - begin,
        "conduct_s": ended - surveyed,
        "stages": len(state.graph.tasks),
        "found": state.found,
        "peak_bytes": peak_bytes(),
    }


def tables(out: Path) -> dict[str, Any]:
    """Read all records, write both tables."""
    begin = time.perf_counter()
    results = load_results(out)
    read = time.perf_counter()
    write_tables(results)
    wrote = time.perf_counter() - read
    return {"read_s": read - begin, "write_s": wrote, "rows": len(results.rows), "peak_bytes": peak_bytes()}


def measure(trials: int, executor: str, scratch: Path) -> dict[str, Any]:
    """One row."""
    home, out, again = scratch / "home", scratch / "out", scratch / "again"
    spec = sweep_of(trials)
    first, resumed, rerecorded = (
        alone(run, spec, executor, home, folder, WORKERS[executor]) for folder in (out, out, again)
    )
    assert first["found"] == 0
    assert resumed["found"] == rerecorded["found"] == first["stages"]
    table = alone(tables, out)
    row = {
        "trials": trials,
        "executor": executor,
        "workers": WORKERS[executor],
        "stages": first["stages"],
        "survey_s": first["survey_s"],
        "run_s": first["conduct_s"],
        "resume_s": resumed["survey_s"] + resumed["conduct_s"],
        "rerecord_s": rerecorded["survey_s"] + rerecorded["conduct_s"],
        "read_records_s": table["read_s"],
        "write_tables_s": table["write_s"],
        "table_rows": table["rows"],
        "peak_bytes": {"run": first["peak_bytes"], "resume": resumed["peak_bytes"], "tables": table["peak_bytes"]},
        "files_of_the_store": sum(len(files) for _, _, files in os.walk(home)),
        "files_of_the_sweep": sum(len(files) for _, _, files in os.walk(out)),
        "largest_folder": max(len(folders) + len(files) for _, folders, files in os.walk(scratch)),
    }
    return row | {
        "resume_ms_a_trial": 1e3 * row["resume_s"] / trials,
        "rerecord_ms_a_trial": 1e3 * row["rerecord_s"] / trials,
    }


def overhead(scratch: Path) -> dict[str, Any]:
    """Milliseconds that a real trial takes whose stages are in the store, when the data have been read."""
    evidence.LATENCY_SECONDS = 0.0  # what the clocks say does not matter here
    evidence.energy_per_image = partial(energy_per_image, seconds=0.01)
    first, *trials = expand(TINY)

    def seconds(out: str) -> float:
        workshop = RecipeWorkshop(Store(scratch / "home"))
        workshop.tasks(first)
        begin = time.perf_counter()
        state = survey(TINY, trials, workshop, scratch / out)
        hands = make_executor("serial", workshop, workers=1, threads=1)
        conduct(state, workshop, hands, scratch / out, listener=Listener())
        assert len(state.finished) == len(trials), state.failures
        return time.perf_counter() - begin

    made = seconds("out")
    milliseconds: dict[str, list[float]] = {"resume": [], "new_records": []}
    for turn in range(5):
        milliseconds["resume"].append(1e3 * seconds("out") / len(trials))
        milliseconds["new_records"].append(1e3 * seconds(f"out-{turn}") / len(trials))
    return {
        "trials": len(trials),
        "stages_a_trial": len(RecipeWorkshop(Store(scratch / "home")).tasks(first)),
        "made_s": made,
        "resume_ms_a_trial": milliseconds["resume"],
        "new_records_ms_a_trial": milliseconds["new_records"],
    }


def throughput(scratch: Path, pairs: int, trials: int, products: int, pause: float) -> dict[str, Any]:
    """Seconds of one worker and of two on the same trials, in turns; and of bare processes."""
    spec = sweep_of(trials, seeds=1, ratios=trials)

    def sweep(workers: int, *work: float) -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            found = alone(run, spec, "process", Path(folder, "home"), Path(folder, "out"), workers, *work)
        return float(found["conduct_s"])

    def bare(workers: int) -> float:
        begin = time.perf_counter()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(multiply, [products * trials // workers] * workers))
        return time.perf_counter() - begin

    ways: dict[str, Callable[[int], float]] = {
        "computing": lambda workers: sweep(workers, products),
        "sleeping": lambda workers: sweep(workers, 0, pause),
        "bare": bare,
    }
    seconds: dict[str, dict[int, list[float]]] = {what: {1: [], 2: []} for what in ways}
    for _ in range(pairs):
        for what, way in ways.items():
            for workers in (1, 2):
                seconds[what][workers].append(way(workers))
                print(f"{what}, {workers} workers: {seconds[what][workers][-1]:.1f} s", flush=True)
    ratios = {what: [two / one for one, two in zip(*both.values(), strict=True)] for what, both in seconds.items()}
    return {
        "trials": trials,
        "products": products,
        "pause_s": pause,
        "seconds": seconds,
        "ratios": ratios,
        "median_ratio": {what: statistics.median(each) for what, each in ratios.items()},
        "load": os.getloadavg()[0],
    }


def crowd(spec: SweepSpec, slots: int, scratch: Path) -> dict[str, Any]:
    """What the conductor spends while so many simulated workers make stages that take minutes."""
    workshop = Nothing(scratch)
    begin = time.perf_counter()
    trials = expand(spec)
    expanded = time.perf_counter()
    state = survey(spec, trials, workshop)
    hands = Simulated(slots)
    surveyed = time.perf_counter()
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        SweepListener(slots=slots, console=Console(file=nowhere, force_terminal=True)) as listener,
    ):
        conduct(state, workshop, hands, scratch / f"{slots}-{len(trials)}", listener=listener)
    seconds = time.perf_counter() - surveyed
    return {
        "workers": slots,
        "trials": len(trials),
        "stages": len(state.graph.tasks),
        "expand_s": expanded - begin,
        "graph_s": surveyed - expanded,
        "conduct_us_a_stage": 1e6 * seconds / len(state.graph.tasks),
        "simulated_hours": hands.clock / 3600,
        "busy": 120 * len(state.graph.tasks) / (hands.clock * slots),
        "peak_bytes": peak_bytes(),
    }


# --- as Markdown -----------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "| trials | executor | stages | expand and survey s | run s | resume, all done s | ms a trial | new records s "
        "| ms a trial | read records s | write tables s | peak MB: run, resume, tables | files: store, sweep |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record.get("scale", []):
        peaks = ", ".join(f"{row['peak_bytes'][what] / 1e6:.0f}" for what in ("run", "resume", "tables"))
        lines.append(
            f"| {row['trials']:,} | {row['executor']} ({row['workers']}) | {row['stages']:,} | {row['survey_s']:.1f} "
            f"| {row['run_s']:.1f} | {row['resume_s']:.1f} | {row['resume_ms_a_trial']:.2f} | {row['rerecord_s']:.1f} "
            f"| {row['rerecord_ms_a_trial']:.2f} | {row['read_records_s']:.1f} | {row['write_tables_s']:.1f} | {peaks} "
            f"| {row['files_of_the_store']:,}, {row['files_of_the_sweep']:,} |"
        )
    if found := record.get("overhead"):
        resume, anew = (statistics.median(found[f"{what}_ms_a_trial"]) for what in ("resume", "new_records"))
        lines += [
            "",
            f"Real trials of {found['stages_a_trial']} stages, all in the store: {resume:.1f} ms each; "
            f"{anew:.1f} ms where the record is written too (medians of five).",
        ]
    if found := record.get("throughput"):
        lines += [
            "",
            "Two workers to one, medians: " + ", ".join(f"{k} {v:.2f}" for k, v in found["median_ratio"].items()),
        ]
    if found := record.get("workers"):
        lines += [
            "",
            "| simulated workers | trials | stages | conductor, µs a stage | workers busy | peak MB |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['workers']:,} | {row['trials']:,} | {row['stages']:,} | {row['conduct_us_a_stage']:.0f} "
            f"| {row['busy']:.0%} | {row['peak_bytes'] / 1e6:.0f} |"
            for row in found
        ]
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[200, 2000, 20000], help="trials; multiples of 200")
    parser.add_argument("--executors", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    parser.add_argument("--overhead", action="store_true", help="real trials whose stages are in the store")
    parser.add_argument("--throughput", action="store_true", help="two workers beside one")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24, help="of the throughput")
    parser.add_argument("--products", type=int, default=300, help="matrix products of a trial, for the throughput")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds that a trial sleeps, for the throughput")
    parser.add_argument("--workers", action="store_true", help="simulated workers")
    parser.add_argument("--table", action="store_true", help="print the record as Markdown and run nothing")
    parser.add_argument("--scratch", type=Path, help="folder for stores, emptied; default: the system's")
    parser.add_argument("--out", type=Path, default=Path("results/sweep_scale.json"))
    arguments = parser.parse_args()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def keep(part: str, found: object) -> None:
        record[part] = found
        record.setdefault("provenance", {})[part] = provenance(0, ["python", *sys.argv])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")

    if arguments.overhead:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            keep("overhead", alone(overhead, Path(scratch)))
    elif arguments.throughput:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            keep(
                "throughput",
                throughput(Path(scratch), arguments.pairs, arguments.trials, arguments.products, arguments.pause),
            )
    elif arguments.workers:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            keep(
                "workers", [alone(crowd, sweep_of(size), n, Path(scratch)) for size in arguments.sizes for n in CROWDS]
            )
    elif not arguments.table:
        for size in arguments.sizes:
            for executor in arguments.executors:
                if executor == "ray" and importlib.util.find_spec("ray") is None:
                    print("Ray is not installed: its rows are left out")
                    continue
                with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                    row = measure(size, executor, Path(scratch))
                print(json.dumps(row), flush=True)
                others = [
                    old for old in record.get("scale", []) if (old["trials"], old["executor"]) != (size, executor)
                ]
                keep(
                    "scale",
                    sorted([*others, row], key=lambda row: (row["trials"], list(WORKERS).index(row["executor"]))),
                )
    print(table(record))


if __name__ == "__main__":
    main()
