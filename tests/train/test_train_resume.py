"""A training that was stopped at any step ends with the same bits as one that was not."""

import random

import pytest
import torch

from coldforge.data import from_arrays
from coldforge.recipe import TrainSpec
from coldforge.train import checkpoint, loop, train
from coldforge.train.checkpoint import TrainState, load_state, save_state
from coldforge.train.guard import Overfitting, SameAnswer


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def save_every_step(monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)


@pytest.fixture(scope="module")
def augmented(splits):
    train_set, test = splits.train, splits.test
    return from_arrays(train_set.images, train_set.labels, test.images, test.labels, validation=18, augment="crop-flip")


def same(first, second):
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert first.curve == second.curve
    assert (first.macs, first.notes) == (second.macs, second.notes)


def stop_after(calls):
    """Raises in the call after ``calls`` more steps were done."""
    left = iter(range(calls))

    def on_progress(fraction, text):
        if next(left, None) is None:
            raise Stop

    return on_progress


def interrupted(folder, moments, *arguments, **keywords):
    stops = 0
    for moment in moments:
        try:
            return train(*arguments, folder=folder, on_progress=stop_after(moment), **keywords), stops
        except Stop:
            stops += 1
    return train(*arguments, folder=folder, **keywords), stops


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "sgd"), ("bf16", "sgd"), ("fp32", "muon")])
@pytest.mark.parametrize("objective", ["natural", "adversarial"])
@pytest.mark.parametrize("kind", ["float", "batchnorm", "quantized"])
def test_stopped_and_continued(kind, objective, precision, optimizer, build, augmented, threat, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "refuse_collapse", lambda *_: None)  # so few steps may end anywhere
    spec = TrainSpec(epochs=3, batch_size=12, lr=0.02, objective=objective, attack="pgd-2", optimizer=optimizer)
    arguments = (build(kind), augmented, spec, threat)
    undisturbed = train(*arguments, seed=3, precision=precision)
    draw = random.Random(f"{kind} {objective} {precision}")
    moments = [draw.randint(1, 4) for _ in range(5)]
    found, stops = interrupted(tmp_path, moments, *arguments, seed=3, precision=precision)
    assert stops >= 2
    same(found, undisturbed)


def test_a_checkpoint_at_the_very_end_is_the_result(build, splits, threat, tmp_path):
    arguments = (build("float"), splits, TrainSpec(epochs=1, batch_size=16), threat)
    first = train(*arguments, folder=tmp_path)
    second = train(*arguments, folder=tmp_path, on_progress=lambda *_: pytest.fail("trained again"))
    same(first, second)
    assert second.seconds >= first.seconds - 0.1  # the time before the stop counts


def test_without_a_folder_nothing_is_written(build, splits, threat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "save_state", lambda *_: pytest.fail("written"))
    train(build("float"), splits, TrainSpec(epochs=1, batch_size=16), threat)
    assert list(tmp_path.iterdir()) == []


def test_a_retry_is_remembered(build, splits, threat, tmp_path):
    """Stopped in the second attempt, it goes on there and does not collapse once more."""
    spec = TrainSpec(epochs=1, batch_size=12, lr=1e5, retries=20)
    undisturbed = train(build("float"), splits, spec, threat)
    assert len(undisturbed.notes) > 2
    assert undisturbed.notes[0].startswith("training with lr 1e+05 collapsed (")
    draw = random.Random(0)
    notes = []
    moments = [draw.randint(3, 12) for _ in range(4)]
    found, stops = interrupted(tmp_path, moments, build("float"), splits, spec, threat, on_note=notes.append)
    assert stops >= 2
    same(found, undisturbed)
    assert tuple(notes) == undisturbed.notes  # each said once


def test_a_slower_rise_of_eps_is_remembered(build, splits, threat, tmp_path, monkeypatch):
    def gave_up(network, validation, curve, inner, spec):
        if curve[-1].eps == threat.eps and len(curve) < 2:
            raise SameAnswer("gave up")

    monkeypatch.setattr(loop, "refuse_collapse", gave_up)
    spec = TrainSpec(epochs=2, batch_size=16, lr=0.01, eps_ramp=0.5, objective="adversarial")
    arguments = (build("float"), splits, spec, threat)
    undisturbed = train(*arguments)
    assert len(undisturbed.notes) == 1
    assert undisturbed.notes[0].endswith("started again with lr 0.01 and fgsm-rs, eps rising over 75% of training")
    found, stops = interrupted(tmp_path, [6, 3], *arguments)  # four steps, then two of the second attempt
    assert stops == 2
    same(found, undisturbed)


def test_a_stronger_inner_attack_is_remembered(build, splits, threat, tmp_path, monkeypatch):
    """As above, for the other kind of retry."""

    def overfitted(network, validation, curve, inner, spec):
        if inner.label == "fgsm-rs":
            raise Overfitting("overfitted")

    monkeypatch.setattr(loop, "refuse_collapse", overfitted)
    spec = TrainSpec(epochs=2, batch_size=16, lr=0.01, objective="adversarial", attack="fgsm-rs")
    arguments = (build("float"), splits, spec, threat)
    undisturbed = train(*arguments)
    assert undisturbed.notes == (
        "training with lr 0.01 and fgsm-rs collapsed (overfitted); started again with lr 0.01 and pgd-2",
    )
    found, stops = interrupted(tmp_path, [6, 3], *arguments)  # four steps, then two of the second attempt
    assert stops == 2
    same(found, undisturbed)


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "no state", "half a state"])
def test_a_damaged_checkpoint_starts_anew(damage, build, splits, threat, tmp_path):
    arguments = (build("float"), splits, TrainSpec(epochs=1, batch_size=16), threat)
    undisturbed = train(*arguments)
    with pytest.raises(Stop):
        train(*arguments, folder=tmp_path, on_progress=stop_after(2))
    path = tmp_path / checkpoint._NOW
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "garbage": b"\xff" * 100,
        "no state": content.replace(b'"state"', b'"statt"'),
        "half a state": content.replace(b'\\"step\\"', b'\\"stop\\"'),
    }[damage]
    assert damaged != content
    path.write_bytes(damaged)
    steps = []
    found = train(*arguments, folder=tmp_path, on_progress=lambda fraction, _: steps.append(fraction))
    assert len(steps) == 4
    same(found, undisturbed)


def test_a_state_survives_its_file(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert load_state(path) is None
    state = TrainState(
        attempt=1,
        step=7,
        epoch_loss=0.1 + 0.2,
        seconds=1.5,
        notes=("said",),
        model={"w": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)},
        momentum={"0": torch.rand(5)},
        averaged={"w": torch.rand(2)},
        best={"w": torch.rand(2)},
    )
    save_state(path, state)
    found = load_state(path)
    for part in ("model", "momentum", "averaged", "best"):
        old, new = getattr(state, part), getattr(found, part)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert (found.attempt, found.step, found.epoch_loss, found.seconds) == (1, 7, 0.1 + 0.2, 1.5)
    assert (found.notes, found.curve) == (("said",), ())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]  # a name that the store keeps
