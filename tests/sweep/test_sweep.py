"""Sweeps of toy stages: what is shared, who does it, what fails, what survives a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import ToyWorkshop

from coldforge.errors import RecipeError, StoreError, UsageError
from coldforge.records import Record, load_record
from coldforge.spec import spec_hash
from coldforge.store import Store
from coldforge.sweep import (
    Listener,
    State,
    SweepSpec,
    alone_in,
    conduct,
    executors,
    expand,
    load_sweep,
    make_executor,
    survey,
    time_left,
)
from coldforge.sweep.graph import Task
from coldforge.sweep.outcome import MOST_LOSSES
from coldforge.sweep.plan import notes_on, plan_of, trial_of
from coldforge.sweep.table import load_results, over_seeds, pick, write_tables

RAY = pytest.param(
    "ray", marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
)
EXECUTORS = ["serial", "process", RAY]
AXES = {"prune.ratio": [0.1, 0.3, 0.5], "quantize.weight_bits": [8, 4]}
SWEEP = {"name": "toy", "recipe": {"name": "r"}, "seeds": [0, 1], "axes": AXES}
TRIALS = 3 * 2 * 2


@pytest.fixture(scope="session")
def record() -> Record:
    return load_record(Path(__file__).parents[2] / "results" / "fashion-mnist")


def spec(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate({**SWEEP, **changes})


def run(
    folder, record, executor="serial", *, trouble=None, workers=2, seconds=0.0, listener=None, given=None, **options
):
    workshop = ToyWorkshop(folder / "store", record, trouble=trouble, seconds=seconds)
    chosen = given or spec()
    state = survey(chosen, expand(chosen), workshop, folder / "out")
    hands = make_executor(executor, workshop, workers=workers, threads=1)
    return conduct(state, workshop, hands, folder / "out", listener=listener or Listener(), **options)


def made(folder: Path) -> Counter[str]:
    lines = (folder / "log").read_text(encoding="utf-8").splitlines()
    return Counter(line.split()[-1] for line in lines if line.split()[2] == "made")


def records(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (folder / "out" / "records").glob("[!.]*.json")}


def write_sweep(folder: Path, record: Record) -> SweepSpec:
    """Files for ``toy.py``; and what the sweep file says."""
    (folder / "sweep.toml").write_text(
        'name = "toy"\nseeds = [0, 1]\n[axes]\n"prune.ratio" = [0.1, 0.3, 0.5]\n"quantize.weight_bits" = [8, 4]\n',
        encoding="utf-8",
    )
    (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    return load_sweep(folder / "sweep.toml")


# --- trials


def test_every_combination_once_for_every_seed():
    trials = expand(spec())
    assert len(trials) == len({trial.id for trial in trials}) == TRIALS
    assert trials[0].label == "prune.ratio=0.1 quantize.weight_bits=8 seed=0"
    assert {(t.recipe.prune.ratio, t.recipe.quantize.weight_bits, t.recipe.seed) for t in trials} == {
        (ratio, bits, seed) for ratio in (0.1, 0.3, 0.5) for bits in (8, 4) for seed in (0, 1)
    }
    assert all(trial.recipe.compute.threads == 1 for trial in trials)


def test_ranges_tables_of_keys_grids_and_exclusions():
    bits = [
        {"label": "low", "quantize.weight_bits": 2, "quantize.activation_bits": 4},
        {"quantize.weight_bits": 8, "quantize.activation_bits": 8},
    ]
    grids = [
        {"axes": {"prune.ratio": {"from": 0.1, "to": 0.9, "step": 0.1}}},
        {"axes": {"bits": bits, "prune.ratio": [0.5]}},
        {"axes": {"prune.importance": ["l2"]}, "set": {"finetune": {"lr": 0.5}}},
    ]
    rules = [{"prune.ratio": [0.7, 0.8]}, {"bits": "low", "seed": 1}]
    trials = expand(spec(axes={}, grid=grids, exclude=rules, set={"finetune.epochs": 7}))
    ratios = [trial.recipe.prune.ratio for trial in trials if {*trial.point} == {"prune.ratio"} and trial.seed == 0]
    assert ratios == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9]
    low = [trial for trial in trials if trial.point.get("bits") == "low"]
    assert [(t.seed, t.recipe.quantize.weight_bits, t.recipe.quantize.activation_bits) for t in low] == [(0, 2, 4)]
    assert all(trial.recipe.finetune.epochs == 7 for trial in trials)
    assert all((trial.recipe.finetune.lr == 0.5) == ("prune.importance" in trial.point) for trial in trials)
    assert len(trials) == 7 * 2 + 1 + 2, "8/8 bits at 0.5 is in the first grid already"


def test_keys_may_be_written_without_quotes(tmp_path):
    text = """
        recipe = "fashion-mnist"
        [set]
        finetune.epochs = 7
        [axes]
        bits = [{ label = "low", quantize.weight_bits = 2 }, { label = "high", quantize.weight_bits = 8 }]
        prune.ratio = { from = 0.25, to = 0.5, step = 0.25 }
        prune.importance = ["l2"]
        [[exclude]]
        quantize.weight_bits = 8
    """
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    trial, other = expand(load_sweep(tmp_path / "x.toml", overrides=["finetune.lr=0.5", "evaluate.n=9"]))
    finetune = trial.recipe.finetune
    assert (trial.point["bits"], trial.recipe.quantize.weight_bits, trial.recipe.evaluate.n) == ("low", 2, 9)
    assert (finetune.epochs, finetune.lr, finetune.rel_eps) == (7, 0.5, 1.08), "the rest is the preset's"
    assert (trial.recipe.prune.ratio, other.recipe.prune.ratio, other.recipe.prune.importance) == (0.25, 0.5, "l2")
    with pytest.raises(RecipeError, match="expected key=value"):
        load_sweep(tmp_path / "x.toml", overrides=["finetune.lr"])


def test_names_decide_nothing():
    first, second = (expand(spec(name=name)) for name in ("a", "b"))
    assert [trial.id for trial in first] == [trial.id for trial in second]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"prune.ration": [0.1]}}, "unknown key 'prune.ration'; did you mean 'ratio'"),
        ({"axes": {"prune.ratio": [1.5]}}, r"prune\.ratio: expected a part of the channels"),
        ({"exclude": [{"seed": [0, 1]}]}, "every combination is excluded"),
        (
            {"exclude": [{"prune.ration": 0.5}]},
            r"exclude: expected axes, .* 'prune.ration'; did you mean 'prune.ratio'",
        ),
        ({"exclude": [{"prune.ratio": 0.7}]}, r"expected values that prune.ratio takes \(0.1, 0.3, 0.5\), got 0.7"),
        ({"recipe": {"compute": {"devices": 2}}}, r"compute\.devices, .*: expected 1 in a sweep"),
        (
            {
                "axes": {},
                "grid": [{"axes": {"prune.ratio": [0.5]}, "set": {"finetune.epochs": epochs}} for epochs in (3, 9)],
            },
            "two trials are called prune.ratio=0.5 .*their results would be taken for those of two seeds",
        ),
        (
            {"axes": {"bits": [{"label": "8", "quantize.weight_bits": bits} for bits in (8, 4)]}},
            "two trials are called bits=8 seed=0",
        ),
    ],
)
def test_trials_that_cannot_be(changes, message):
    with pytest.raises(RecipeError, match=message):
        expand(spec(**changes))


def test_an_exclusion_may_name_a_list_as_a_whole():
    axes = {"evaluate.attacks": [["fgsm"], ["fgsm", "pgd-20"]]}
    trials = expand(spec(axes=axes, seeds=[0], exclude=[{"evaluate.attacks": ["fgsm", "pgd-20"]}]))
    assert [trial.recipe.evaluate.attacks for trial in trials] == [("fgsm",)]
    assert len(expand(spec(seeds=[0], exclude=[{"seed": 1}]))) == TRIALS / 2, "a seed that this call leaves out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not valid TOML"),
        ('color = "red"', "color: Extra inputs"),
        ('axes."prune.ratio" = 0.5', "expected a list of values, or { from, to, step }, got 0.5"),
        ('axes."prune.ratio" = { from = 0.1 }', "expected a list of values"),
        ('axes."prune.ratio" = { from = 0.5, to = 0.1, step = 0.1 }', "expected a step above 0 and to >= from"),
        ("seeds = []", "seeds: .*at least 1 item"),
        ("set.seed = 7", "seed cannot be set in a sweep; use seeds, or --seeds"),
        ("axes.seed = [1, 2]", "axes: seed cannot be set in a sweep"),
        ("set.compute.threads = 4", "compute.threads cannot be set in a sweep; use threads"),
        ("set.compute.devices = 2", "compute.devices cannot be set in a sweep; use `coldforge run`"),
        ('axes.x = [{ label = "a", "seed" = 1 }]', "seed cannot be set in a sweep"),
        ('axes.weight_bits = [{ label = "8", "quantize.weight_bits" = 8 }]', "an axis cannot be called weight_bits"),
    ],
)
def test_files_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_sweep(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match="found nothing at"):
        load_sweep(tmp_path / "y.toml")


def test_the_recipe_is_found_beside_the_file(tmp_path):
    (tmp_path / "mine.toml").write_text("[finetune]\nepochs = 9\n", encoding="utf-8")
    (tmp_path / "x.toml").write_text('recipe = "mine.toml"\n', encoding="utf-8")
    loaded = load_sweep(tmp_path / "x.toml")
    assert loaded.name == "x"
    assert [trial.recipe.finetune.epochs for trial in expand(loaded)] == [9]


# --- sharing


def test_shared_stages_are_made_once_and_counted(tmp_path, record):
    workshop = ToyWorkshop(tmp_path / "store", record)
    state = survey(spec(), expand(spec()), workshop)
    plan = plan_of(state, macs_per_second=10.0)
    assert plan.kinds == {"base": (2, 0), "middle": (6, 0), "leaf": (12, 0), "measure": (12, 0)}
    assert plan.stages_alone == 4 * TRIALS
    assert plan.macs == 2 * 100 + 6 * 10 + 12
    assert plan.macs_alone == TRIALS * 111
    assert plan.seconds_left == pytest.approx(27.2 + 1.2)
    assert plan.shared[0] == ("base 0", 6, 1)
    run(tmp_path, record)
    assert set(made(tmp_path).values()) == {1}
    assert sum(made(tmp_path).values()) == 2 + 6 + 12 + 12
    again = survey(spec(), expand(spec()), workshop, tmp_path / "out")
    assert len(again.finished) == TRIALS
    assert plan_of(again, 1.0).seconds_left == 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_all_executors_give_the_same_records(executor, tmp_path, record):
    expected = run(tmp_path / "reference", record)
    state = run(tmp_path / "other", record, executor)
    assert (len(state.finished), state.failures) == (TRIALS, {})
    assert records(tmp_path / "other") == records(tmp_path / "reference")
    assert set(made(tmp_path / "other").values()) == {1}
    assert expected.done == state.done


def test_ray_is_not_started_for_nothing_and_fills_its_cluster(tmp_path, record):
    ray = pytest.importorskip("ray")
    run(tmp_path, record)
    assert len(run(tmp_path, record, "ray").finished) == TRIALS
    hands = make_executor("ray", ToyWorkshop(tmp_path / "store", record), workers=0, threads=1)
    try:
        assert not ray.is_initialized()
        assert hands.slots == int(ray.cluster_resources()["CPU"]) >= 1
    finally:
        hands.close()
    assert not ray.is_initialized()


def test_ray_refuses_what_no_machine_of_its_cluster_has_room_for(tmp_path, record, monkeypatch):
    pytest.importorskip("ray")
    from coldforge.sweep.ray_executor import RayExecutor

    monkeypatch.setattr(RayExecutor, "_rooms", lambda self: [2, 2])
    hands = make_executor("ray", ToyWorkshop(tmp_path / "store", record), workers=0, threads=4)
    try:
        with pytest.raises(UsageError, match="expected at most 2, the processors of the largest machine"):
            assert hands.slots
    finally:
        hands.close()


@pytest.mark.parametrize("executor", EXECUTORS[1:])
def test_a_workshop_comes_to_each_worker_once(executor, tmp_path, record):
    run(tmp_path, record, executor)
    lines = [line.split() for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    workers = Counter(pid for _, pid, what, *_ in lines if what == "came")
    assert set(workers) == {pid for _, pid, what, *_ in lines if what == "made"} - {str(os.getpid())}
    assert set(workers.values()) == {1}


def test_what_is_timed_runs_alone(tmp_path, record):
    run(tmp_path, record, "process", workers=3, seconds=0.03)
    events = [line.split(maxsplit=3) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    running: set[str] = set()
    together = 0
    for _, pid, what, label in sorted(events, key=lambda event: float(event[0])):
        if what == "begin":
            if label.startswith("measure"):
                assert not running
                assert int(pid) == os.getpid(), "a worker, with its share of the processors, is another machine"
            running.add(pid)
            together = max(together, len(running))
        else:
            running.discard(pid)
    assert together > 1


def test_two_sweeps_on_one_store_share_the_work(tmp_path, record):
    write_sweep(tmp_path, record)
    command = [sys.executable, str(Path(__file__).with_name("toy.py")), str(tmp_path / "sweep.toml")]
    command += [str(tmp_path / "record.json"), "process", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for one in both:
        assert json.loads(one.communicate(timeout=120)[0]) == {"finished": TRIALS, "failures": 0}
    built = [path for path in (tmp_path / "store" / "stages").glob("*/*") if path.is_dir()]
    assert len(built) == 2 + 6 + 12 + 12


# --- what goes wrong


@pytest.mark.parametrize("executor", ["serial", "process"])
def test_a_failure_is_kept_and_the_rest_goes_on(executor, tmp_path, record):
    trouble = {"middle 0.3": "error"}
    state = run(tmp_path, record, executor, trouble=trouble)
    assert len(state.finished) == 8
    assert time_left(state, 1) == 0
    assert plan_of(state, 1.0).seconds_left == 0
    assert [failure.error for failure in state.failures.values()] == ["ValueError: this cannot be made"] * 2
    assert set(state.lost) == {trial.id for trial in state.trials if trial.recipe.prune.ratio == 0.3}
    assert set(state.lost.values()) == {"middle 0.3: ValueError: this cannot be made"}
    failures = json.loads((tmp_path / "out" / "failures.json").read_text(encoding="utf-8"))
    assert all("this cannot be made" in failure["details"] for failure in failures.values())
    before = made(tmp_path)
    again = run(tmp_path, record, executor)  # the cause is gone, but nobody asked for it
    assert (len(again.finished), made(tmp_path)) == (8, before)
    healed = run(tmp_path, record, executor, retry_failed=True)
    assert (len(healed.finished), healed.failures) == (TRIALS, {})
    assert json.loads((tmp_path / "out" / "failures.json").read_text(encoding="utf-8")) == {}


def test_seeds_may_be_computed_one_by_one_into_one_folder(tmp_path, record):
    run(tmp_path, record, given=spec(seeds=(0,)), trouble={"middle 0.3": "error"})
    other = run(tmp_path, record, given=spec(seeds=(1,)))
    assert (len(other.finished), len(other.failures)) == (6, 0)
    found = load_results(tmp_path / "out")
    assert (found.seeds, found.trials, len(found.finished)) == ((0, 1), TRIALS, 10)
    assert [failure.label for failure in found.failures] == ["middle 0.3"]
    assert {trial_of(tmp_path / "out", trial).seed for trial in found.finished} == {0, 1}
    whole = run(tmp_path, record)
    assert (len(whole.finished), len(whole.failures)) == (10, 1)  # what failed is left alone, as ever
    assert len(run(tmp_path, record, retry_failed=True).finished) == TRIALS
    assert load_results(tmp_path / "out").failures == ()


def test_a_failure_that_another_sweep_healed_is_gone(tmp_path, record):
    run(tmp_path, record, given=spec(seeds=(0,)), trouble={"middle 0.3": "error"})
    workshop, elsewhere = ToyWorkshop(tmp_path / "store", record), tmp_path / "elsewhere"
    hands = make_executor("serial", workshop, workers=1, threads=1)
    conduct(survey(spec(), expand(spec()), workshop, elsewhere), workshop, hands, elsewhere, listener=Listener())
    assert len(run(tmp_path, record).finished) == TRIALS
    assert load_results(tmp_path / "out").failures == ()


def test_other_settings_take_the_folder_over(tmp_path, record):
    run(tmp_path, record, trouble={"middle 0.3": "error"})
    run(tmp_path, record, given=spec(seeds=(0,), axes={"prune.ratio": [0.2]}))
    found = load_results(tmp_path / "out")
    assert (found.trials, found.failures) == (1, ())


def test_another_recipe_behind_the_same_file_is_another_sweep(tmp_path, record, monkeypatch):
    """Its trials must not be averaged with the old ones as if they were seeds; and they can be found again."""
    base, file = tmp_path / "base.toml", tmp_path / "toy.toml"
    file.write_text('recipe = "base.toml"\nseeds = [0]\naxes.prune.ratio = [0.1, 0.5]\n', encoding="utf-8")

    def go(seed, epochs, here):
        base.write_text(f"[finetune]\nepochs = {epochs}\n", encoding="utf-8")
        monkeypatch.chdir(here)
        given = load_sweep(os.path.relpath(file), seeds=[seed])
        state = run(tmp_path, record, given=given)
        found = load_results(tmp_path / "out")
        return notes_on(state), found.seeds, sorted({mean.n for mean in over_seeds(found)})

    (tmp_path / "elsewhere").mkdir()
    assert go(0, 3, tmp_path) == ([], (0,), [1])
    assert go(1, 3, tmp_path / "elsewhere") == ([], (0, 1), [2]), "a path, seen from elsewhere, is the same path"
    notes, *found = go(1, 9, tmp_path)
    assert found == [(1,), [1]]
    assert notes == [next(note for note in notes if "leave the table: 4;" in note)]
    base.write_text("[finetune]\nepochs = 1\n", encoding="utf-8")
    for trial in load_results(tmp_path / "out").finished:
        assert trial_of(tmp_path / "out", trial).recipe.finetune.epochs == 9


def test_a_sweep_that_grows_keeps_its_records(tmp_path, record):
    """A trial's name says all that decides it: more values of an axis make no other trials of the old ones."""
    small = spec(axes={**AXES, "prune.ratio": [0.1, 0.3]})
    run(tmp_path, record, given=small)
    state = survey(spec(), expand(spec()), ToyWorkshop(tmp_path / "store", record), tmp_path / "out")
    assert state.finished == {trial.id for trial in expand(small)}
    assert notes_on(state) == []


class Renewed(ToyWorkshop):
    """After a change of the code that makes leaves."""

    def tasks(self, trial):
        *before, leaf, measure = super().tasks(trial)
        leaf = replace(leaf, key=spec_hash("new", leaf.key))
        return [*before, leaf, replace(measure, key=spec_hash("new", measure.key), inputs=(leaf.key,))]


@pytest.mark.parametrize("made_before", [False, True])
def test_records_of_stages_that_are_made_anew_are_written_anew(made_before, tmp_path, record):
    """Also where another sweep on this store has made them already."""
    run(tmp_path, record)
    before = records(tmp_path)
    renewed = Renewed(tmp_path / "store", record)

    def again(folder):
        state = survey(spec(), expand(spec()), renewed, folder)
        assert not state.finished
        conduct(state, renewed, make_executor("serial", renewed, workers=1, threads=1), folder, listener=Listener())

    if made_before:
        again(tmp_path / "elsewhere")
    again(tmp_path / "out")
    after = records(tmp_path)
    assert len(survey(spec(), expand(spec()), renewed, tmp_path / "out").finished) == TRIALS
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    assert len(survey(spec(), expand(spec()), renewed, tmp_path / "out").finished) == TRIALS


def test_a_record_stands_until_there_is_a_new_one(tmp_path, record):
    """After an update, Ctrl-C must not leave a sweep without results; and none of the old ones counts as new."""
    run(tmp_path, record)
    before, renewed = records(tmp_path), Renewed(tmp_path / "store", record)

    class Impatient(Listener):
        def changed(self, state):
            if len(state.finished) == 3:
                raise KeyboardInterrupt

    def again(listener):
        state = survey(spec(), expand(spec()), renewed, tmp_path / "out")
        hands = make_executor("serial", renewed, workers=1, threads=1)
        conduct(state, renewed, hands, tmp_path / "out", listener=listener)
        return state

    assert "made anew: 12;" in notes_on(survey(spec(), expand(spec()), renewed, tmp_path / "out"))[0]
    with pytest.raises(KeyboardInterrupt):
        again(Impatient())
    between = records(tmp_path)
    assert sum(between[name] != before[name] for name in before) == 3
    assert len(survey(spec(), expand(spec()), renewed, tmp_path / "out").finished) == 3
    assert len(again(Listener()).finished) == TRIALS
    assert all(after != before[name] for name, after in records(tmp_path).items())


def test_a_full_disk_stops_the_sweep_and_is_no_failure_of_a_stage(tmp_path, record):
    class Full(ToyWorkshop):
        def make(self, trial, key):
            raise StoreError("cannot write to the store: no space left on device")

    full = Full(tmp_path / "store", record)
    state = survey(spec(), expand(spec()), full, tmp_path / "out")
    hands = make_executor("serial", full, workers=1, threads=1)
    with pytest.raises(StoreError, match="no space left"):
        conduct(state, full, hands, tmp_path / "out", listener=Listener())
    assert len(run(tmp_path, record).finished) == TRIALS, "the same call continues"


def test_a_folder_that_cannot_be_written_is_said(tmp_path, record, monkeypatch):
    def refuse(self, trial, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(ToyWorkshop, "finish", refuse)
    with pytest.raises(StoreError, match=r"cannot write the sweep into .*: Permission denied"):
        run(tmp_path, record)


def test_two_sweeps_do_not_write_into_one_folder(tmp_path):
    with alone_in(tmp_path / "out"):
        again = alone_in(tmp_path / "out")
        with pytest.raises(UsageError, match=r"another sweep is at work in .*name another folder"):
            again.__enter__()
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "out"):
        pass


def test_nobody_deletes_what_a_sweep_is_about_to_read(tmp_path, record):
    run(tmp_path, record)
    shutil.rmtree(tmp_path / "out")  # nothing is registered by the toy; only the sweep's process keeps its stages
    workshop = ToyWorkshop(tmp_path / "store", record)
    other = "import sys; from coldforge.store import Store; print(len(Store(sys.argv[1]).prune(dry_run=True).entries))"
    ask = [sys.executable, "-c", other, str(tmp_path / "store")]
    survey(spec(seeds=(0,)), expand(spec(seeds=(0,))), workshop, tmp_path / "out")
    assert int(subprocess.run(ask, check=True, capture_output=True, text=True).stdout) == 0 + 1 + 3 + 6 + 6


def test_workers_are_as_many_as_there_is_room_for(tmp_path, record, monkeypatch):
    workshop = ToyWorkshop(tmp_path / "store", record)
    monkeypatch.setattr("coldforge.sweep.executors.physical_cores", lambda: 6)
    assert [make_executor("process", workshop, workers=0, threads=each).slots for each in (1, 4, 9)] == [6, 1, 1]
    with pytest.raises(UsageError, match="--workers: expected 1 or more"):
        make_executor("process", workshop, workers=-1, threads=1)


@pytest.mark.parametrize(("workers", "pinned"), [(2, [{2}, {3}]), (1, [None])])
def test_workers_are_pinned_only_where_they_take_all_processors(workers, pinned, monkeypatch):
    chosen: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: chosen.append(set(share)), raising=False)
    for number in range(workers):
        executors._pin(number, 1, workers)
    assert chosen == [share for share in pinned if share is not None]


@pytest.mark.parametrize(("deaths", "fine"), [(MOST_LOSSES - 1, True), (MOST_LOSSES, False)])
def test_a_worker_that_dies_is_replaced(deaths, fine, tmp_path, record):
    state = run(tmp_path, record, "process", trouble={"base 0": deaths})
    if fine:
        assert (len(state.finished), state.failures) == (TRIALS, {})
    else:
        (failure,) = state.failures.values()
        assert failure.error.startswith("the worker died 3 times (exit code -9)")
        assert len(state.finished) == TRIALS / 2


def test_ctrl_c_stops_at_once_and_the_next_call_continues(tmp_path, record):
    class Impatient(Listener):
        def changed(self, state):
            if len(state.done) > 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, record, "process", listener=Impatient(), seconds=0.01)
    state = run(tmp_path, record, "process")
    assert len(state.finished) == TRIALS
    assert state.found > 10
    assert set(made(tmp_path).values()) == {1}


def test_what_an_unfinished_sweep_needs_is_not_pruned(tmp_path, record):
    """Not even after its process has ended; a sweep is given up by deleting its folder."""
    state = run(tmp_path, record, trouble={"middle 0.3": "error"})
    shutil.rmtree(tmp_path / "store" / "running")
    store = Store(tmp_path / "store")
    for file in (tmp_path / "out" / "records").iterdir():
        file.unlink()  # these alone would keep the stages of trials that are finished
    assert len(state.done) > 0
    assert store.prune(dry_run=True).entries == ()
    shutil.rmtree(tmp_path / "out")
    assert {entry.key for entry in store.prune().entries} >= state.done


@pytest.mark.parametrize("executor", EXECUTORS)
def test_ten_kills_change_nothing(executor, tmp_path, record):
    """Killed at random moments, with workers that live a little longer; the table is that of an undisturbed run."""
    written = write_sweep(tmp_path, record)
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("toy.py")), str(tmp_path / "sweep.toml")]
    command += [str(tmp_path / "record.json"), executor, str(folder)]
    draw, killed = random.Random(executor), 0
    while killed < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = (folder / "log").stat().st_size if (folder / "log").exists() else 0
        until = time.monotonic() + 30
        while time.monotonic() < until and process.poll() is None:  # not before it works
            if (folder / "log").exists() and (folder / "log").stat().st_size > begun:
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.12))
        if process.poll() is not None:  # it was done: begin anew
            shutil.rmtree(folder / "store")
            shutil.rmtree(folder / "out")
            (folder / "log").unlink()
            continue
        process.kill()
        process.wait()
        killed += 1
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(found.stdout.splitlines()[-1]) == {"finished": TRIALS, "failures": 0}
    run(tmp_path / "reference", record, given=written)
    assert records(folder) == records(tmp_path / "reference")
    for name, count in made(folder).items():
        assert count == 1, f"{name} was made again"
    tables = [write_tables(load_results(place / "out"))[1].read_text() for place in (folder, tmp_path / "reference")]
    assert tables[0] == tables[1]


# --- results


@pytest.fixture(scope="module")
def results(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("results")
    run(folder, record)
    return load_results(folder / "out")


def test_the_table_has_a_row_a_stage_and_reads_back(results):
    import pyarrow.parquet as pq

    parquet, text = write_tables(results)
    table = pq.read_table(parquet)
    assert table.num_rows == len(results.rows) == TRIALS == len(text.read_text(encoding="utf-8").splitlines()) - 1
    row = table.to_pylist()[0]
    assert row["prune.ratio"] == "0.1"
    for name in ("trial", "seed", "name", "clean_accuracy", "robust:worst_case", "size_bytes", "latency:onnxruntime:1"):
        assert row[name] is not None, name


def test_means_over_seeds(results):
    means = over_seeds(results)
    assert len(means) == 6
    for mean in means:
        rows = [row["params"] for row in results.rows if tuple(row[axis] for axis in results.axes) == mean.point]
        assert mean.n == len(rows) == 2
        assert mean.mean["params"] == sum(rows) / 2
        assert mean.spread["params"] == pytest.approx(abs(rows[0] - rows[1]) / 2**0.5)


def test_the_best_trial_for_a_question(results):
    best = pick(results, least=["clean=0.2"], minimize="params")
    allowed = [row for row in results.rows if row["clean_accuracy"] >= 0.2]
    assert best["params"] == min(row["params"] for row in allowed)
    assert pick(results, most=["clean_accuracy=0.2"], maximize="clean")["clean_accuracy"] == 0.1
    assert pick(results, minimize="latency")
    suspect = [{**row, "masking": "suspect"} for row in results.rows]
    with pytest.raises(UsageError, match="masking verdict of every trial is suspect"):
        pick(type(results)(**{**vars(results), "rows": tuple(suspect)}), minimize="params")


def test_robust_accuracies_of_several_threat_models_are_not_compared(results):
    eps, in_8_bits = "threat_model:eps", "robust_8bit:worst_case"
    rows = [{**row, eps: row[eps] * (1 + row["seed"]), in_8_bits: 0.5} for row in results.rows]
    mixed = type(results)(**{**vars(results), "rows": tuple(rows)})
    questions = [{"maximize": "robust"}, {"least": ["robust=0.1"], "minimize": "params"}, {"maximize": in_8_bits}]
    for question in questions:
        with pytest.raises(UsageError, match="attacked under 2 threat models"):
            pick(mixed, **question)
    assert pick(mixed, minimize="params")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"least": ["robust=0.99"], "minimize": "params"},
            "no trial has robust of at least 0.99: the best of those left",
        ),
        ({"least": ["robust"], "minimize": "params"}, "expected a condition such as robust=0.70, got 'robust'"),
        ({"minimize": "beauty"}, "expected one of robust, clean, .*; got 'beauty'"),
        ({}, "expected one of --minimize and --maximize"),
    ],
)
def test_questions_without_an_answer(question, message, results):
    with pytest.raises(UsageError, match=message):
        pick(results, **question)


def test_a_folder_that_holds_no_sweep(tmp_path):
    with pytest.raises(UsageError, match="expected a folder that `coldforge sweep` wrote"):
        load_results(tmp_path)


def test_a_trial_is_found_again_by_its_name(results):
    row = results.rows[3]
    assert trial_of(results.folder, row["trial"]).label.endswith(f"seed={row['seed']}")
    with pytest.raises(UsageError, match="expected the trial nobody, found none"):
        trial_of(results.folder, "nobody")


def test_another_sweep_does_not_overwrite(tmp_path, record):
    run(tmp_path, record)
    with pytest.raises(UsageError, match="holds another sweep"):
        run(tmp_path, record, given=spec(name="other"))


def test_time_left_follows_what_was_spent(tmp_path, record):
    seen = []

    class Watch(Listener):
        def changed(self, state):
            seen.append(time_left(state, 1))

    run(tmp_path, record, seconds=0.01, listener=Watch())
    assert all(left is not None for left in seen)
    assert seen[-1] == 0


def test_time_left_does_not_take_seconds_for_multiply_adds():
    """A baseline from a checkpoint has none: it must not tell how long a training takes."""
    names = ("read", "train", "measure")
    tasks = {
        name: Task(name, name, name, (), macs=macs, seconds=seconds)
        for name, macs, seconds in zip(names, (0, 1e12, 0), (2.0, 0, 10.0), strict=True)
    }
    graph = SimpleNamespace(tasks=tasks, blocked_by=lambda failed: {})
    state = State(spec(), (), graph, done={"read"}, spent={("read", False): (4.0, 2.0)})
    assert time_left(state, 1) is None
    state.spent["train", True] = (100.0, 2e12)
    assert time_left(state, 1) == pytest.approx(50 + 2 * 10)
    assert time_left(state, 2) == pytest.approx(50 / 2 + 2 * 10), "what is timed runs alone"
