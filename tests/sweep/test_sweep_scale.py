"""What a sweep of many trials must not do: look twice, read again, write again, draw without end."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from toy import ToyWorkshop

from coldforge import console_sweep
from coldforge.console_sweep import SweepListener, print_sweep
from coldforge.errors import UsageError
from coldforge.records import Record, load_record
from coldforge.store import Store
from coldforge.sweep import Failure, Listener, State, SweepSpec, conduct, expand, make_executor, survey
from coldforge.sweep import run as module
from coldforge.sweep.table import load_results, write_tables
from coldforge.sweep.workshop import RecipeWorkshop

TRIALS = 2 * 10 * 2
SWEEP = SweepSpec(
    recipe={"name": "r"},
    seeds=(0, 1),
    axes={"prune.ratio": [number / 20 for number in range(10)], "quantize.weight_bits": [8, 4]},
)


@pytest.fixture(scope="module")
def record() -> Record:
    return load_record(Path(__file__).parents[2] / "results" / "fashion-mnist")


def go(folder: Path, workshop: ToyWorkshop, listener: Listener | None = None) -> State:
    state = survey(SWEEP, expand(SWEEP), workshop, folder / "out")
    hands = make_executor("serial", workshop, workers=1, threads=1)
    return conduct(state, workshop, hands, folder / "out", listener=listener or Listener())


@pytest.fixture(scope="module")
def swept(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("swept")
    return folder, go(folder, ToyWorkshop(folder / "store", record))


def test_a_survey_looks_at_each_stage_once(swept, record):
    folder, state = swept
    looked: Counter[str] = Counter()

    class Watched(ToyWorkshop):
        def has(self, task):
            looked[task.key] += 1
            return super().has(task)

    survey(SWEEP, expand(SWEEP), Watched(folder / "store", record), folder / "out")
    assert looked == Counter(list(state.graph.tasks))


def test_resuming_what_is_done_reads_no_record_and_writes_one_file(tmp_path, record, monkeypatch):
    go(tmp_path, ToyWorkshop(tmp_path / "store", record))
    for path in (tmp_path / "out" / "records").iterdir():
        path.write_text("nobody reads this", encoding="utf-8")

    def stamps():
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "running")  # its lease
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    assert len(go(tmp_path, ToyWorkshop(tmp_path / "store", record)).finished) == TRIALS
    changed = {path.name for path, stamp in stamps().items() if before.get(path) != stamp}
    assert changed == {"sweep.json"}


def test_a_table_reads_each_record_once(swept, monkeypatch):
    folder, _ = swept
    read: Counter[str] = Counter()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.update([path.name]), read_bytes(path))[1])
    results = load_results(folder / "out")
    write_tables(results)
    assert len(read) == TRIALS
    assert set(read.values()) == {1}


def test_trials_share_the_tables_that_are_equal():
    trials = expand(SWEEP)
    assert len({id(trial.recipe.finetune) for trial in trials}) == 1
    assert len({id(trial.recipe.prune) for trial in trials}) == 10
    by_id = {trial.id: trial.recipe for trial in trials}
    for seed in (0, 1):
        (alone,) = expand(
            SweepSpec(recipe={"name": "r"}, seeds=(seed,), axes={"prune.ratio": [0.25], "quantize.weight_bits": [4]})
        )
        assert by_id[alone.id].model_dump_json() == alone.recipe.model_dump_json()


@pytest.mark.parametrize("terminal", [True, False])
def test_drawing_takes_a_twentieth_of_the_time(terminal, tmp_path, record, monkeypatch):
    now, drawn = 0.0, 0

    def clock():
        nonlocal now
        now += 0.01
        return now

    def slow(state, slots):
        nonlocal now, drawn
        drawn, now = drawn + 1, now + 1.0
        return f"{len(state.finished)} finished"

    monkeypatch.setattr(console_sweep, "_line", slow)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with SweepListener(slots=1, console=console, clock=clock) as listener:
        state = go(tmp_path, ToyWorkshop(tmp_path / "store", record), listener)
        if terminal:  # stop the thread that draws
            listener._live.stop()
        begin, before = now, drawn
        for _ in range(10_000):
            listener._drawn() if terminal else listener.changed(state)
        assert 2 <= drawn - before <= (now - begin) / 15
    if not terminal:
        assert console.file.getvalue().endswith(f"{TRIALS} finished\n")


def test_a_thousand_workers_do_not_fill_the_screen(swept):
    _, state = swept
    console = Console(file=io.StringIO(), width=500)
    busy = {key: 0.0 for key, task in state.graph.tasks.items() if task.kind == "leaf"}
    console.print(SweepListener(slots=1000)._table(dataclasses.replace(state, running=busy)))
    assert f" … and {TRIALS - 8} more" in console.file.getvalue()


def test_failures_are_said_once_and_written_now_and_then(tmp_path, record, monkeypatch):
    class Clock:
        now, writes = 0.0, 0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)

    def slow(out, failures):
        Clock.writes, Clock.now = Clock.writes + 1, Clock.now + 1.0

    monkeypatch.setattr(module, "_write_failures", slow)
    failures: dict[str, Failure] = {}
    file = module._FailureFile(tmp_path, failures)
    for number in range(1000):
        failures[str(number)] = Failure("a", "b", "c")
        file.changed = True
        Clock.now += 0.1
        file.save()
    assert 4 <= Clock.writes <= 6
    file.save(at_once=True)
    assert not file.changed
    writes = Clock.writes
    file.save(at_once=True)
    assert Clock.writes == writes


def test_each_failure_is_said_once(tmp_path, record):
    console = Console(file=io.StringIO(), width=200)
    trouble = {f"middle {number / 20:g}": "error" for number in range(10)}
    with SweepListener(slots=1, quiet=True, console=console) as listener:
        state = go(tmp_path, ToyWorkshop(tmp_path / "store", record, trouble=trouble), listener)
    assert len(state.failures) == 20
    said = [line for line in console.file.getvalue().splitlines() if line.startswith("failed:")]
    assert Counter(said) == Counter(f"failed: {failure.label}: {failure.error}" for failure in state.failures.values())


def test_what_was_lost_is_found_out_once(swept, monkeypatch, capsys):
    folder, state = swept
    asked = []
    monkeypatch.setattr(State, "lost", property(lambda state: asked.append(1) or {state.trials[0].id: "why"}))
    print_sweep(load_results(folder / "out"), state, folder / "out" / "report.html")
    assert len(asked) == 1
    assert f"failed: {state.trials[0].label}: why" in capsys.readouterr().out


def test_a_worker_that_declares_other_stages_says_so(tmp_path):
    workshop = RecipeWorkshop(Store(tmp_path))
    trial = expand(SweepSpec(set={"data.train_n": 200, "data.test_n": 20}))[0]
    with pytest.raises(UsageError, match=r"expected a stage 0{16} in trial .* other data, or has other versions"):
        workshop.make(trial, "0" * 64)
