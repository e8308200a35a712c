"""The commands about several networks: ``coldforge sweep``, ``coldforge pick`` and ``coldforge compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter


def add_commands(app: App) -> None:
    """Add the commands to the command line."""
    app.command(
        sweep,
        help_epilogue="Examples:\n\n"
        "coldforge sweep my-sweep.toml --dry-run\n\n"
        "coldforge sweep my-sweep.toml --executor process --workers 4\n\n"
        "coldforge sweep my-sweep.toml --executor ray --address auto",
    )
    app.command(
        pick,
        help_epilogue="Examples:\n\n"
        "coldforge pick sweep-my-sweep --min robust=0.70 --minimize latency\n\n"
        "coldforge pick sweep-my-sweep --max bytes=100000 --maximize robust",
    )
    app.command(compare, help_epilogue="Example:\n\ncoldforge compare coldforge-fashion-mnist coldforge-other")


def sweep(
    file: Path,
    /,
    *,
    executor: Literal["serial", "process", "ray"] = "process",
    workers: int = 0,
    address: str = "",
    set_: Annotated[tuple[str, ...], Parameter(name="--set", show_default=False)] = (),
    seeds: Annotated[tuple[int, ...], Parameter(show_default=False)] = (),
    out: Path | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    json: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> int:
    """Make every trial of a sweep; stages that trials share are made once.

    Stop with Ctrl-C, or kill it, whenever you like: the same command continues. A trial that fails is kept with its
    error and the rest goes on; the exit code is then 1. At the end report.html in the folder shows all trials: a plot
    and a table to sort and filter, and the best trial for each question.

    Args:
        file: a TOML file: a recipe, axes, seeds (docs/sweeps.md).
        executor: who does the work: this process, processes of this machine, or a Ray cluster (coldforge[ray]).
        workers: trials at a time; 0: the processors divided by the threads of a trial.
        address: of a Ray cluster; without it a local one is started.
        set_: change a key of the recipe in all trials, such as evaluate.n=100; may be repeated. Axes win.
        seeds: these, in place of the file's, such as --seeds 0; may be repeated.
        out: folder for the records, the table and report.html; default ./sweep-NAME.
        retry_failed: try again what failed before.
        dry_run: only show the trials, what is shared, what is there already and what the rest will take.
        json: print as JSON.
        quiet: no progress.
    """
    from coldforge.console import print_json
    from coldforge.console_sweep import SweepListener, print_plan, print_sweep
    from coldforge.pipeline import resolve
    from coldforge.report.sweep import draw_sweep
    from coldforge.store import Store
    from coldforge.sweep import alone_in, conduct, expand, load_sweep, make_executor, survey
    from coldforge.sweep.plan import plan_of
    from coldforge.sweep.table import load_results, write_tables
    from coldforge.sweep.workshop import RecipeWorkshop

    spec = load_sweep(file, overrides=set_, seeds=seeds)
    folder = out or Path(f"sweep-{spec.name}")
    workshop = RecipeWorkshop(Store())
    trials = expand(spec, resolve=resolve)
    if dry_run:
        state = survey(spec, trials, workshop, folder)
        plan = plan_of(state, workshop.macs_per_second(trials[0]) if state.done != set(state.graph.tasks) else 1.0)
        print_json(plan.to_dict()) if json else print_plan(plan)
        return 0
    hands = make_executor(executor, workshop, workers=workers, threads=spec.threads, address=address)
    with alone_in(folder):
        state = survey(spec, trials, workshop, folder)
        with SweepListener(slots=hands.slots, quiet=quiet) as listener:
            conduct(state, workshop, hands, folder, retry_failed=retry_failed, listener=listener)
        results = load_results(folder)
        write_tables(results)
        page = draw_sweep(folder)
    if json:
        print_json({"rows": results.rows, "failed": state.lost, "report": str(page)})
    else:
        print_sweep(results, state, page)
    return 1 if state.failures else 0


def pick(
    folder: Path,
    /,
    *,
    min_: Annotated[tuple[str, ...], Parameter(name="--min", show_default=False)] = (),
    max_: Annotated[tuple[str, ...], Parameter(name="--max", show_default=False)] = (),
    minimize: str = "",
    maximize: str = "",
    rebuild: bool = False,
    json: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Find the trial that answers a question best, and write its whole folder, with the file to ship.

    Columns have the names of table.csv; short ones are robust (worst case), clean, latency (batch 1), bytes, packed,
    params, macs and energy. Trials whose masking verdict is suspect are passed over.

    Args:
        folder: what `coldforge sweep` has written.
        min_: at least, such as robust=0.70; may be repeated.
        max_: at most, such as bytes=200000; may be repeated.
        minimize: column that is to be small.
        maximize: column that is to be large.
        rebuild: make again what this store lacks; numbers may then differ from the sweep's.
        json: print the row as JSON.
        quiet: no progress.
    """
    from rich.console import Console

    from coldforge.console import RichProgress, print_json
    from coldforge.report.folder import draw
    from coldforge.report.verdict import verdict_lines
    from coldforge.store import Store
    from coldforge.sweep.plan import trial_of
    from coldforge.sweep.table import flat, load_results
    from coldforge.sweep.table import pick as pick_row
    from coldforge.sweep.workshop import RecipeWorkshop

    results = load_results(folder)
    row = pick_row(results, least=min_, most=max_, minimize=minimize, maximize=maximize)
    trial = trial_of(folder, row["trial"])
    target = folder / "trials" / trial.id
    workshop = RecipeWorkshop(Store())
    if not rebuild:
        workshop.refuse_missing(trial)
    with RichProgress(Console(stderr=True), quiet=quiet) as progress:
        record = workshop.write_folder(trial, target, progress)
    draw(target)
    artifact = record.stage("artifact")
    assert artifact is not None
    row = {**row, **flat(artifact.model_dump(mode="json"))}
    if json:
        print_json({**row, "folder": str(target)})
        return
    sys.stdout.write(f"{target}\n  {trial.label}\n")
    for name in ("robust:worst_case", "clean_accuracy", "size_bytes", "macs"):
        flag = " SUSPECT" if name.startswith("robust") and row["masking"] == "suspect" else ""
        sys.stdout.write(f"  {name} {row[name]:g}{flag}\n")
    if row["masking"] == "suspect":  # made again, it may be judged otherwise
        sys.stdout.write("\n".join(verdict_lines(artifact.masking)) + "\n")


def compare(first: Path, second: Path, /, *, json: bool = False) -> None:
    """Compare two networks on the same test images, image by image.

    Prints clean accuracy, robust accuracy under each attack that both were attacked with, and the worst case; of each
    the difference in points with its 95 % interval for paired images, and the p-value of McNemar's exact test.

    Args:
        first: a folder that `coldforge run` (its artifact counts) or `coldforge evaluate` wrote.
        second: another, of the same images and the same threat model.
        json: print as JSON.
    """
    from dataclasses import asdict

    from coldforge.console import print_json, print_table
    from coldforge.evaluation.compare import compare as compare_folders

    found = compare_folders(first, second)
    if json:
        print_json(asdict(found))
        return
    headers = ("", "images", "first %", "second %", "difference, points", "only first right", "only second", "p")
    print_table(
        headers,
        [
            (
                each.what,
                each.n,
                *(
                    f"{100 * accuracy:.1f}{' suspect' if suspect else ''}"
                    for accuracy, suspect in zip((each.first, each.second), each.suspect, strict=True)
                ),
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                    100 * (each.first - each.second), *(100 * end for end in each.interval)
                ),
                each.only_first,
                each.only_second,
                f"{each.p:.3g}",
            )
            for each in found.differences
        ],
    )
    for note in found.notes:
        sys.stdout.write(f"{note}\n")
