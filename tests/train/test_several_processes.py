"""Two processes with gloo train what one process trains: the same losses, weights and accuracy within rounding."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from coldforge.data import from_arrays
from coldforge.errors import ModelError, RecipeError, TrainingError, UsageError
from coldforge.recipe import ComputeSpec, FinetuneSpec
from coldforge.train import Team, loop, train
from coldforge.train import team as teams
from coldforge.train import world as worlds
from coldforge.train.world import LostError, World

# Weights of gradient sums in another order; signs of an attack's gradient may flip at zero.
LOSS, WEIGHT = {"rel": 2e-4}, {"rtol": 1e-3, "atol": 1e-4}


def spec_of(**settings):
    plain = {
        "objective": "natural",
        "optimizer": "sgd",
        "epochs": 2,
        "batch_size": 15,
        "lr": 0.02,
        "weight_decay": 5e-4,
    }
    return FinetuneSpec.model_construct(**{**FinetuneSpec().model_dump(), **plain, **settings})


@pytest.fixture(scope="module")
def team():
    made = Team(ComputeSpec(devices=2))
    yield made
    made.close(done=True)


@pytest.fixture
def losses(monkeypatch):
    """Of each step, as rank 0 reports them."""
    found = []
    plain = loop._Attempt._step

    def step(self, *arguments):
        found.append(plain(self, *arguments))
        return found[-1]

    monkeypatch.setattr(loop._Attempt, "_step", step)
    return found


def both(team, losses, *arguments, **settings):
    """The results of one process and of two, and the losses of each."""
    alone = train(*arguments, **settings)
    first = losses.copy()
    losses.clear()
    shared = team.call(train, *arguments, here={}, **settings)
    return alone, shared, first, losses


CASES = {
    "natural": {},
    "uneven": {"batch_size": 13},
    "fgsm-rs": {"objective": "adversarial", "attack": "fgsm-rs"},
    "pgd": {"objective": "adversarial", "attack": "pgd-3"},
    "noise": {"objective": "trades", "attack": "n-fgsm"},
    "muon": {"objective": "adversarial", "attack": "pgd-2", "optimizer": "muon"},
    "reuse": {"objective": "adversarial", "attack": "fgsm-reuse", "epochs": 3},
    "average and awp": {"objective": "adversarial", "attack": "pgd-2", "ema": 0.9, "awp": 0.01, "keep": "best"},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case, team, losses, build, splits, threat):
    spec = spec_of(**CASES[case])
    alone, shared, first, second = both(team, losses, build("float"), splits, spec, threat, seed=1)
    assert second == pytest.approx(first, **LOSS)
    assert len(second) == spec.epochs * (66 // spec.batch_size)
    after = shared.model.state_dict()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(after[name], tensor, **WEIGHT)
    assert [point.clean_accuracy for point in shared.curve] == [point.clean_accuracy for point in alone.curve]
    assert [point.robust_accuracy for point in shared.curve] == [point.robust_accuracy for point in alone.curve]
    assert (shared.macs, shared.notes) == (alone.macs, alone.notes)


@pytest.mark.parametrize("objective", ["natural", "trades"])
@pytest.mark.parametrize("kind", ["batchnorm", "quantized"])
def test_batchnorm_and_rounding_are_shared_too(kind, objective, team, losses, build, splits, threat):
    spec = spec_of(objective=objective, attack="pgd-2", batch_size=13)
    alone, shared, first, second = both(team, losses, build(kind), splits, spec, threat)
    assert second[:2] == pytest.approx(first[:2], **LOSS)  # before and after a step of the optimizer
    assert torch.tensor(second).isfinite().all()
    if kind == "batchnorm":  # rounding jumps: what was 1e-7 apart may be a whole step apart later
        assert second == pytest.approx(first, **LOSS)
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(shared.model.state_dict()[name], tensor, **WEIGHT)
        assert type(shared.model.network[1]) is nn.BatchNorm2d
    assert shared.curve[-1].clean_accuracy == pytest.approx(alone.curve[-1].clean_accuracy, abs=0.07)


def test_augmentation_and_distillation(team, losses, build, splits, threat):
    moved = from_arrays(
        *(splits.train.images, splits.train.labels, splits.test.images, splits.test.labels),
        validation=18,
        augment="crop-flip",
    )
    spec = spec_of(objective="distill", attack="pgd-2")
    arguments = (build("float"), moved, spec, threat)
    _, _, first, second = both(team, losses, *arguments, teacher=build("batchnorm"))
    assert second == pytest.approx(first, **LOSS)


# --- what may go wrong


def test_a_collapse_is_decided_once(team, build, splits, threat):
    spec = spec_of(epochs=1, lr=1e5, retries=20)
    alone = train(build("float"), splits, spec, threat)
    shared = team.call(train, build("float"), splits, spec, threat, here={})
    assert len(alone.notes) > 2
    assert len(shared.notes) > 2
    with pytest.raises(TrainingError, match="collapsed"):
        team.call(train, build("float"), splits, spec_of(epochs=1, lr=1e5, retries=0), threat, here={})
    with pytest.raises(RecipeError, match="at least one image for each of 2 processes, got a batch of 1"):
        team.call(train, build("float"), splits, spec_of(batch_size=1), threat, here={})
    team.call(train, build("float"), splits, spec_of(epochs=1), threat, here={})  # the helper is still there


def test_what_cannot_be_sent(team, build, splits, threat):
    class Local(nn.Flatten):
        pass

    with pytest.raises(ModelError, match=r"sent to another process.*Local"):
        team.call(train, Local(), splits, spec_of(), threat, here={})
    with pytest.raises(TrainingError, match=r"cannot read what it was sent: ValueError"):
        team.call(train, build("float"), splits, spec_of(), threat, teacher=Unreadable(), here={})


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


class Stop(Exception):
    pass


def test_stopped_and_continued_to_the_same_bits(team, build, splits, threat, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    spec = spec_of(objective="adversarial", attack="fgsm-reuse", ema=0.9)
    arguments = (train, build("quantized"), splits, spec, threat)
    undisturbed = team.call(*arguments, here={})

    def stop(fraction, line):
        if fraction > 0.6:  # in the second epoch, whose attack starts where the first has ended
            raise Stop

    with pytest.raises(Stop):
        team.call(*arguments, here={"folder": tmp_path, "on_progress": stop})
    team.close(done=False)
    fractions = []
    found = team.call(*arguments, here={"folder": tmp_path, "on_progress": lambda part, _: fractions.append(part)})
    assert min(fractions) > 0.6
    assert found.curve == undisturbed.curve
    after = found.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in undisturbed.model.state_dict().items())


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_is_an_error_and_no_hang(how, team, build, splits, threat, monkeypatch):
    team.close(done=True)
    monkeypatch.setattr(worlds, "PATIENCE_S", 20.0 if how == "SIGKILL" else 4.0)
    begin = []

    def lose(fraction, line):
        if not begin:
            begin.append(time.monotonic())
            os.kill(team._helpers[0].pid, signal.Signals[how])

    with pytest.raises(LostError, match="has ended, or was silent for"):
        team.call(train, build("float"), splits, spec_of(), threat, here={"on_progress": lose})
    assert time.monotonic() - begin[0] < 30
    team.close(done=False)


# --- who takes part


@pytest.fixture
def torchrun(monkeypatch):
    """As in the second process of two."""
    world = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)


def test_the_world_of_torchrun_is_taken(torchrun):
    assert teams.placed(ComputeSpec()) == ComputeSpec(devices=2, num_nodes=2)
    assert teams.placed(ComputeSpec(devices=2, num_nodes=2)) == ComputeSpec(devices=2, num_nodes=2)
    with pytest.raises(UsageError, match=r"expected 4 devices on each of 1 .* started 2 on each of 2"):
        teams.placed(ComputeSpec(devices=4))
    with pytest.raises(UsageError, match="rank 1 of torchrun"):
        Team(ComputeSpec(devices=2, num_nodes=2))


def test_the_world_of_srun_is_taken(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert teams.placed(ComputeSpec()) == ComputeSpec()  # sbatch without srun: one process
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "6")
    monkeypatch.setenv("SLURM_PROCID", "5")
    with pytest.raises(UsageError, match="--ntasks-per-node"):
        teams.placed(ComputeSpec())
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
    assert teams.launched() == teams.Launch("SLURM", 5, 3, 2)


def test_more_than_there_is():
    with pytest.raises(UsageError, match="expected to be started by torchrun or srun"):
        teams.placed(ComputeSpec(num_nodes=2))
    with pytest.raises(UsageError, match=r"expected at most .* processors here, got 100000"):
        Team(ComputeSpec(devices=100000))


SCRIPT = """
import torch
from torch import nn
from coldforge.attacks import ThreatModel
from coldforge.data import from_arrays
from coldforge.recipe import ComputeSpec, TrainSpec
from coldforge.train import gathered, help_out, launched, placed, train

draw = torch.Generator().manual_seed(0)
images, labels = torch.rand(40, 1, 4, 4, generator=draw), torch.arange(40) % 2
images[labels == 1, :, :2] = 1
images[labels == 0, :, 2:] = 1
data = from_arrays(images, labels, images, labels, validation=10)
torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
here = launched()
if here is not None and here.rank:
    help_out(ComputeSpec())
else:
    with gathered(placed(ComputeSpec())) as team:
        found = team.call(train, network, data, TrainSpec(epochs=2, batch_size=10), ThreatModel("linf", 0.1), here={})
        print("losses", *(point.loss for point in found.curve), "shared" if team.used else "alone")
"""


def test_started_by_torchrun(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with torch.random.fork_rng():
        runpy.run_path(str(path))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = [*capsys.readouterr().out.splitlines(), *done.stdout.splitlines()]
    said = [line.split()[1:] for line in lines if line.startswith("losses")]
    assert [each.pop() for each in said] == ["alone", "shared"]
    assert list(map(float, said[1])) == pytest.approx(list(map(float, said[0])), **LOSS)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [5, 6, 64])
def test_shares_are_a_batch(n, size):
    shares = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        shares += range(n)[world.share(n)]
    assert shares == list(range(n))
