"""The command line: thin commands over the library. Nothing imports this module.

Results go to standard output (``--json`` for machines), progress and errors to standard error. Exit codes: 0 done,
1 failed, 2 wrong usage or recipe, 130 interrupted. Everything heavy is imported inside the commands, so that
``coldforge --help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from coldforge._version import __version__
from coldforge.cli_store import store_app
from coldforge.cli_sweep import add_commands
from coldforge.errors import ColdforgeError, RecipeError, UsageError
from coldforge.evaluation.request import DEFAULTS, EXAMPLES, SCAN_DEFAULTS, Request, ScanRequest

if TYPE_CHECKING:
    from coldforge.console import RichProgress
    from coldforge.recipe import Recipe
    from coldforge.store import Store

CONTINUE = "interrupted; finished stages are kept; run the same command again to continue"
CONTINUE_EVALUATION = "interrupted; finished images are kept; run the same command again to continue"

app = App(
    name="coldforge",
    version=__version__,
    help="Make a trained image classifier small, fast and hard to fool, and prove it on the ONNX file that ships.",
    help_epilogue="Start with: coldforge run\n\nAdd --debug to any command for the traceback of an error.",
    help_format="plaintext",
    default_parameter=Parameter(
        negative="", show_default=lambda it: None if it is False or it in (None, "") else str(it)
    ),
    suppress_keyboard_interrupt=False,
)
app.command(store_app)
add_commands(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one readable message on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("COLDFORGE_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        return int(app(words, exit_on_error=False, result_action="return_value") or 0)
    except CycloptsError:  # said already
        return 2
    except KeyboardInterrupt:
        ways = {"run": CONTINUE, "sweep": CONTINUE, "evaluate": CONTINUE_EVALUATION}
        return _fail(ways.get(next(iter(words), ""), "interrupted"), 130, debug)
    except ColdforgeError as error:
        return _fail(f"error: {error}", 2 if isinstance(error, (RecipeError, UsageError)) else 1, debug)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        advice = "this should not happen; run again with --debug for the traceback, and report it"
        return _fail(f"unexpected error: {type(error).__name__}: {error}\n{advice}", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"coldforge: {message}\n")
    return code


# --- the main job ----------------------------------------------------------------------------------------------------


@app.command(
    help_epilogue="Examples:\n\n"
    "coldforge run\n\n"
    "coldforge run fashion-mnist --out results/fashion\n\n"
    "coldforge run my-recipe.toml --set finetune.epochs=5 --set threat_model.eps=8/255\n\n"
    "For a trained network of your own, write model.source, checkpoint, mean and std into a recipe: see the README."
)
def run(
    recipe: str = "quickstart",
    /,
    *,
    out: Path | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, show_default=False)] = (),
    devices: int | None = None,
    num_nodes: int | None = None,
    plan: bool = False,
    json: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Compress a classifier, fine-tune it adversarially, export it, and measure the file.

    Finished stages are kept in the store: stop with Ctrl-C whenever you like, and run the same command to continue.

    Args:
        recipe: a preset (see `coldforge recipes`) or the path of a TOML file.
        out: folder for record.json, report.html and model.onnx; default ./coldforge-NAME.
        set_: change keys of the recipe, such as finetune.epochs=5; may be repeated.
        devices: processes of each machine that train one network together (compute.devices); default 1, or what
            torchrun or SLURM has started.
        num_nodes: machines that do, each started by torchrun or SLURM (compute.num_nodes); default 1.
        plan: only show the stages and how long each will take.
        json: print the record as JSON instead of the table.
        quiet: no progress; notes and errors only.
    """
    from coldforge.recipe import load_recipe

    if words := [text for text in set_ if "=" not in text]:
        raise UsageError(f"--set: expected key=value, got {words[0]!r}; write the recipe before --set")
    flags = {"devices": devices, "num_nodes": num_nodes}
    asked = [f"compute.{name}={value}" for name, value in flags.items() if value is not None]
    resolved = load_recipe(recipe, overrides=[*set_, *asked])

    from coldforge.train import help_out, launched, placed

    resolved = resolved.model_copy(update={"compute": placed(resolved.compute)})
    world = launched()
    if world is not None and world.rank:
        help_out(resolved.compute)
        return
    if plan:
        _plan(resolved, json)
        return
    folder = out or Path(f"coldforge-{resolved.name.replace(os.sep, '-')}")
    given = [word for text in (*set_, *asked) for word in ("--set", text)]
    command = shlex.join(["coldforge", "run", recipe, *given])

    from coldforge.pipeline import run as run_recipe
    from coldforge.report.folder import draw

    with _progress(quiet) as progress:
        record = run_recipe(resolved, out=folder, store=_store(), progress=progress, command=command)
        progress.begin("report")
        draw(folder)
        progress.end("report")
    if json:
        sys.stdout.write(record.to_json())
        return
    from coldforge.console import stdout
    from coldforge.report.table import subject, summary_table
    from coldforge.report.verdict import headline, verdict_lines

    console = stdout()
    console.print(summary_table(record, width=console.width if console.is_terminal else None))
    console.print(headline(record), markup=False, highlight=False)
    masking = subject(record).masking
    if masking.checks:
        console.print("\n".join(verdict_lines(masking)), markup=False, highlight=False)
    sys.stdout.write("\nWritten:\n" + "".join(f"  {path}\n" for path in sorted(folder.iterdir())))


def _plan(recipe: Recipe, json: bool) -> None:
    from coldforge.console import about, plan_line, print_json, print_table
    from coldforge.pipeline import plan

    with _progress(quiet=False) as progress:
        steps = plan(recipe, store=_store(), progress=progress)
    if json:
        print_json([{"label": step.label, "estimate_s": step.estimate_s, "cached": step.cached} for step in steps])
        return
    print_table(("stage", "time"), [(it.label, "in the store" if it.cached else about(it.estimate_s)) for it in steps])
    sys.stdout.write(plan_line(steps) + "\n")


def _progress(quiet: bool) -> RichProgress:
    from rich.console import Console

    from coldforge.console import RichProgress

    return RichProgress(Console(stderr=True), quiet=quiet)


def _store() -> Store:
    from coldforge.store import Store

    return Store()


@app.command(help_epilogue="Examples:\n\ncoldforge report coldforge-quickstart\n\ncoldforge report sweep-my-sweep")
def report(folder: Path, /) -> None:
    """Draw the page of a run or a sweep (report.html) or of an evaluation (evaluation.html) again, from its records.

    A sweep that is still under way, or was stopped, has a page too: of the trials that are finished.

    Args:
        folder: where a run has left its record.json, an evaluation its evaluation.json, or a sweep its sweep.json.
    """
    from coldforge.report.folder import draw_any

    sys.stdout.write(f"{draw_any(folder)}\n")


# --- what does it withstand? -----------------------------------------------------------------------------------------


@app.command(help_epilogue=EXAMPLES)
def evaluate(
    target: Path,
    /,
    *,
    request: Annotated[Request, Parameter(name="*")] = DEFAULTS,
    out: Path | None = None,
    json: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Attack a network or a file, and say what it withstands and whether that number holds.

    Every verdict about a file is the file's. Stop with Ctrl-C whenever you like; the same command continues.

    Args:
        target: a folder of `coldforge run`, a checkpoint with --model, --mean and --std, or any .onnx classifier.
        out: folder for evaluation.json, evaluation.html and ledger.parquet; default ./evaluation-NAME.
        json: print the record as JSON instead of the table.
        quiet: no progress; notes and errors only.
    """
    from coldforge.evaluation.job import evaluate_path
    from coldforge.report.evaluation import draw_evaluation

    folder = out or Path(f"evaluation-{target.resolve().name if target.is_dir() else target.stem}")
    command = shlex.join(["coldforge", "evaluate", str(target), *request.words()])
    with _progress(quiet) as progress:
        record = evaluate_path(target, request, out=folder, progress=progress, command=command)
        draw_evaluation(folder)
    if json:
        sys.stdout.write(record.to_json())
        return
    from coldforge.console import print_evaluation

    print_evaluation(record)
    sys.stdout.write("\nWritten:\n" + "".join(f"  {path}\n" for path in sorted(folder.iterdir())))


@app.command(
    help_epilogue="Examples:\n\n"
    "coldforge sensitivity results/networks/fashion-mnist-cnn8 --data fashion-mnist --eps 0.1\n\n"
    "coldforge sensitivity net.pt --model zoo:resnet20 --mean 0.5 --std 0.25 --data cifar10 --eps 8/255 --bits 4"
)
def sensitivity(
    target: Path,
    /,
    *,
    request: Annotated[ScanRequest, Parameter(name="*")] = SCAN_DEFAULTS,
    json: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Compress one layer at a time, and say what that costs in accuracy and robust accuracy.

    On validation images, which are split from the training images, and without any training: which layers can lose
    channels or bits, and which must not?

    Args:
        target: a float network: a checkpoint with --model, --mean and --std, or a folder with model.safetensors.
        json: print the rows as JSON.
        quiet: no progress.
    """
    from coldforge.console import print_json, print_sensitivity
    from coldforge.evaluation.sensitivity import scan

    with _progress(quiet) as progress:
        rows = scan(target, request, progress)
    print_json([row.to_dict() for row in rows]) if json else print_sensitivity(rows)


# --- the file on its machine -----------------------------------------------------------------------------------------


@app.command(help_epilogue="Example:\n\ncoldforge verify coldforge-quickstart")
def verify(folder: Path, /, *, json: bool = False) -> int:
    """Ask the file again on this machine. Fails (exit code 1) if it is another file, if fewer than 99.5 % of the
    recorded answers come back, if its integer kernels are not used, or if over twice as slow on the same CPU model.

    Args:
        folder: what `coldforge run` has written, copied to this machine.
        json: print the checks as JSON.
    """
    from dataclasses import asdict

    from coldforge.console import print_json, print_table
    from coldforge.deploy.verify import verify_folder

    verdict = verify_folder(folder)
    if json:
        checks = [asdict(check) for check in verdict.checks]
        print_json({"ok": verdict.ok, "checks": checks, "differences": list(verdict.differences)})
    else:
        rows = [(it.name, "ok" if it.passed else "FAILED", it.expected, it.found, it.meaning) for it in verdict.checks]
        print_table(("check", "", "expected", "found", "meaning"), rows)
        failed = sum(not check.passed for check in verdict.checks)
        sys.stdout.write("all checks passed\n" if verdict.ok else f"{failed} of {len(rows)} checks failed\n")
        if verdict.differences:
            sys.stdout.write("\nNot as where it was made:\n" + "".join(f"  {line}\n" for line in verdict.differences))
    return 0 if verdict.ok else 1


@app.command(
    help_epilogue="Examples:\n\n"
    "coldforge bench coldforge-quickstart\n\n"
    "coldforge bench before.onnx after.onnx --batch 1 --batch 64 --threads 2"
)
def bench(
    *artifacts: Path,
    batch: Annotated[tuple[int, ...], Parameter(show_default=False)] = (1, 64),
    threads: int = 0,
    seconds: float = 1.0,
    runtime: Annotated[tuple[str, ...], Parameter(show_default=False)] = ("onnxruntime",),
    json: bool = False,
) -> None:
    """Measure latency, throughput, size and energy of files, side by side.

    Args:
        artifacts: ONNX files, or folders that `coldforge run` has written.
        batch: images per call; may be repeated. Default: 1 and 64.
        threads: threads of the runtime; 0 takes all physical cores.
        seconds: how long to measure each.
        runtime: onnxruntime or openvino; may be repeated. Default: onnxruntime.
        json: print the rows as JSON.
    """
    if not artifacts:
        raise UsageError("expected at least one ONNX file or folder, got none; try: coldforge bench model.onnx")
    if missing := [path for path in artifacts if not path.exists()]:
        raise UsageError(f"expected an ONNX file or a folder of a run, found nothing at {missing[0]}")
    from dataclasses import asdict

    from coldforge.console import print_bench, print_json
    from coldforge.deploy.bench import bench as measure

    rows = measure(artifacts, batches=batch, threads=threads, seconds=seconds, runtimes=runtime)
    if json:
        print_json([asdict(row) for row in rows])
    else:
        print_bench(rows)


# --- recipes ---------------------------------------------------------------------------------------------------------


@app.command(
    help_epilogue="Examples:\n\n"
    "coldforge recipes\n\n"
    "coldforge recipes quickstart > my-recipe.toml\n\n"
    "coldforge recipes quickstart --keys"
)
def recipes(name: str = "", /, *, keys: bool = False, attacks: bool = False, json: bool = False) -> None:
    """List the recipes that ship with coldforge, or print one as TOML.

    Args:
        name: a preset or the path of a TOML file; without it, all presets are listed.
        keys: print every key, each with what it means.
        attacks: list the names of attacks that a recipe may hold: of its evaluation, and of its trainings.
        json: print as JSON.
    """
    from coldforge.console import documented_toml, print_json, print_table
    from coldforge.recipe import load_recipe, preset_names, to_toml

    if attacks:
        from coldforge.attacks import ATTACK_FORMS, INNER_FORMS

        forms = {"evaluation": ATTACK_FORMS, "training": INNER_FORMS}
        rows = [(name, meaning, use) for use, names in forms.items() for name, meaning in names.items()]
        print_json(forms) if json else print_table(("attack", "meaning", "of"), rows)
    elif name or keys:
        recipe = load_recipe(name or "quickstart")
        if json:
            print_json(recipe.model_dump(mode="json"))
        else:
            sys.stdout.write(documented_toml(recipe) if keys else to_toml(recipe))
    else:
        found = {preset: load_recipe(preset).description for preset in preset_names()}
        print_json(found) if json else print_table(("recipe", "description"), list(found.items()))


# --- this machine ----------------------------------------------------------------------------------------------------


@app.command(help_epilogue="Example:\n\ncoldforge doctor")
def doctor(*, json: bool = False) -> None:
    """Say what this machine can do: versions, processor, data sets, energy meter, store; with advice.

    Args:
        json: print as JSON.
    """
    from coldforge.console import print_json, print_table
    from coldforge.doctor import examine

    findings = examine(_store())
    if json:
        print_json([{"topic": item.topic, "found": item.found, "advice": item.advice} for item in findings])
    else:
        print_table(("", "found", "advice"), [(item.topic, item.found, item.advice) for item in findings])
