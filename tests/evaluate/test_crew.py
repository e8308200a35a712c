"""One attack by several threads: the same results, callbacks one at a time, nothing left behind, errors heard."""

from __future__ import annotations

import threading
import time
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from coldforge.attacks import AttackResult, ThreatModel, parse_attack
from coldforge.compress import quantize
from coldforge.evaluate import Target, crew, evaluate
from coldforge.evaluate.crew import attack_all, workers_of
from coldforge.recipe import QuantizeSpec

FIELDS = [entry.name for entry in fields(AttackResult)]


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "the number of threads was not put back"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(crew, "_FEWEST", 8)


def asked(task, threat, name="pgd-6", judge=None, **options):
    model, data = task
    images, labels = data.pixels(), data.labels
    names = torch.arange(100, 100 + len(images))
    return attack_all(parse_attack(name), model, images, labels, threat, seed=3, indices=names, judge=judge, **options)


def test_workers_depend_on_threads_and_the_size_of_images_alone():
    assert workers_of(1, 784) == 1
    assert workers_of(2, 784) == 2
    assert workers_of(8, 3 * 32 * 32) == 8
    assert workers_of(16, 3 * 32 * 32) == 8, "two threads for each leave none idle"
    assert workers_of(64, 3 * 32 * 32) == 9
    assert workers_of(8, 3 * 224 * 224) == 1, "large images fill the memory"


@pytest.mark.parametrize("name", ["pgd-6", "apgd-t-6-2", "fab-t-6-2", "square-40"])
def test_results_are_those_of_one_thread(task, threat, three_threads, name):
    shared = asked(task, threat, name)
    torch.set_num_threads(1)
    alone = asked(task, threat, name)
    torch.set_num_threads(3)
    assert alone.fooled.any()
    for what in FIELDS:
        assert torch.equal(getattr(shared, what), getattr(alone, what)), what


def test_a_judge_is_asked_by_all_and_everyone_is_told_once(task, threat, three_threads):
    model, _ = task
    who: set[int] = set()
    inside = threading.Lock()
    done: list[int] = []
    fractions: list[float] = []

    def judge(points: Tensor) -> Tensor:
        who.add(threading.get_ident())
        with torch.no_grad():
            return model(points).argmax(1)

    def alone() -> None:
        assert inside.acquire(blocking=False), "two callbacks at a time"
        time.sleep(0.01)
        inside.release()

    def on_done(result: AttackResult, positions: list[int]) -> None:
        alone()
        assert result.finished[positions].all()
        done.extend(positions)

    def on_progress(fraction: float) -> None:
        alone()
        fractions.append(fraction)

    found = asked(task, threat, judge=judge, on_done=on_done, on_progress=on_progress)
    assert sorted(done) == list(range(40))
    assert len(who) == 3
    assert threading.get_ident() not in who
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert found.finished.all()


@pytest.mark.parametrize(("name", "workers"), [("fab-t-6-3", 2), ("pgd-6", 1), ("square-40", 1)])
def test_a_few_images_of_many_runs_are_shared(task, threat, three_threads, name, workers):
    model, data = task
    who: set[int] = set()

    def spy(points: Tensor) -> Tensor:
        who.add(threading.get_ident())
        return model(points)

    found = asked((spy, data.take(slice(4))), threat, name)
    assert found.finished.all()
    assert len(who - {threading.get_ident()}) == workers


def test_a_stop_stops_all(task, threat, three_threads):
    found = asked(task, threat, stop=lambda: True)
    assert not found.finished.any()
    assert not found.fooled.any()
    assert torch.equal(found.adversarial, task[1].pixels())


def test_what_one_raises_is_raised_and_the_others_stop(task, threat, three_threads):
    model, data = task
    raised = threading.Event()
    first = threading.Lock()
    after = []

    def judge(points: Tensor) -> Tensor:
        if first.acquire(blocking=False):
            raised.set()
            raise ZeroDivisionError("from the judge")
        with torch.no_grad():
            return model(points).argmax(1)

    def spy(points: Tensor) -> Tensor:
        after.extend([1] * raised.is_set())
        return model(points)

    images, names = data.pixels(), torch.arange(40)
    with pytest.raises(ZeroDivisionError, match="from the judge"):
        attack_all(
            parse_attack("square-5000"),
            spy,
            images,
            data.labels,
            ThreatModel("linf", 1e-4),  # next to nobody falls, so that the others would make all of their 5,000 steps
            seed=0,
            indices=names,
            judge=judge,
        )
    assert len(after) < 2000, "the others searched to the end"


def test_a_network_that_draws_random_numbers_is_attacked_by_one(task, threat, three_threads):
    model, data = task
    who = set()

    def noisy(x: Tensor) -> Tensor:
        who.add(threading.get_ident())
        return model(x) + torch.randn(1)

    images = data.pixels()
    with torch.random.fork_rng():
        attack_all(
            parse_attack("pgd-3"), noisy, images, data.labels, threat, seed=0, indices=torch.arange(40), judge=None
        )
    assert who == {threading.get_ident()}


class Remembers(nn.Module):
    """Keeps what it computes, as foreign networks do for their hooks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        time.sleep(1e-4)
        return self.network(self.seen)


def test_a_network_that_remembers_what_it_saw_answers_everybody_his_own(task, threat, three_threads):
    model, data = task
    plain = asked(task, threat)
    kept = asked((Remembers(model), data), threat)
    for what in FIELDS:
        assert torch.equal(getattr(kept, what), getattr(plain, what)), what


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_an_evaluation_has_the_same_ledger(task, threat, three_threads, precision, tmp_path):
    model, data = task
    twin = quantize(model, QuantizeSpec(calibration="minmax"), data.pixels())
    attacks = [parse_attack(name) for name in ("pgd-6", "fab-t-5-2", "square-40")]
    target = Target(twin, surrogates={"the parent": model})

    def ledger(name):
        found = evaluate(target, data, attacks, threat, precision=precision, checkpoint=tmp_path / name)
        found.write(tmp_path / f"{name}.parquet")
        return (tmp_path / f"{name}.parquet").read_bytes()

    shared = ledger("shared")
    killed = (tmp_path / "shared").read_text().splitlines()
    (tmp_path / "half").write_text("\n".join(killed[: len(killed) // 2]) + "\n")
    resumed = ledger("half")
    torch.set_num_threads(1)
    alone = ledger("alone")
    torch.set_num_threads(3)
    assert shared == alone
    assert resumed == alone


def test_flags_of_the_network_are_put_back_when_the_last_one_is_through(task, threat, three_threads):
    model, _ = task
    model.train()
    model[0].weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        asked(task, threat)
        assert all(module.training for module in model.modules())
        assert model[0].weight.requires_grad
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    finally:
        model.eval()


def test_no_images(task, threat, three_threads):
    model, data = task
    nothing = torch.arange(0)
    found = attack_all(
        parse_attack("pgd-3"), model, data.pixels()[:0], data.labels[:0], threat, seed=0, indices=nothing, judge=None
    )
    assert len(found.fooled) == 0
