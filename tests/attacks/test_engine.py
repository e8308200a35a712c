"""The queue of the engine, and every named attack's independence of batch and order."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coldforge.attacks import ATTACK_FORMS, PGD, Attack, AttackResult, Ensemble, ThreatModel, parse_attack, predict
from coldforge.attacks.fab import FAB
from coldforge.attacks.query import TILE
from traces import draw_a_little, traces

LINF = ThreatModel("linf", 0.2)
NAMES = {
    "fgsm": "fgsm",
    "fgsm-rs": "fgsm-rs",
    "pgd-K": "pgd-6",
    "pgd-K-R": "pgd-3-3",
    "pgd-K-paper": "pgd-80-paper",
    "apgd-ce-K": "apgd-ce-10",
    "apgd-t-K-T": "apgd-t-6-2",
    "fab-t-K-T": "fab-t-6-2",
    "square-Q": "square-40",
    "autoattack": "autoattack",
    "autoattack-lite": "autoattack-lite",
}
"""A short one of every form."""
COLUMNS = ("fooled", "adversarial", "step", "restart", "queries", "margin", "part", "finished", "disputed")


def short(form: str) -> Ensemble | Attack:
    """The attack; an ensemble with short parts."""
    attack = parse_attack(NAMES[form])
    if isinstance(attack, Ensemble):
        names = [part.name for part in attack.parts]
        parts = {"apgd-ce": "apgd-ce-4", "apgd-t": "apgd-t-3-2", "fab-t": "fab-t-3-2", "square": "square-20"}
        kinds = [next(kind for kind in parts if name.startswith(kind)) for name in names]
        return Ensemble(label=attack.label, parts=tuple(parse_attack(parts[kind]) for kind in kinds))
    return attack


def test_every_form_has_a_short_attack_here() -> None:
    assert set(NAMES) == set(ATTACK_FORMS)


@pytest.mark.parametrize("form", NAMES)
def test_the_time_of_an_attack_is_foreseen(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    """What an image that stands takes; plans and estimates are made from it."""
    model, images, labels = task
    easy = (predict(model, images).argmax(1) == labels).nonzero()[:12, 0]
    still = ThreatModel("linf", 1e-6)
    for part in short(form).parts if isinstance(short(form), Ensemble) else (short(form),):
        found = part(model, images[easy], labels[easy], still)
        each = 2.0 if isinstance(part, FAB) else 3.0 if part.uses_gradients else 1.0  # FAB's steps back need none
        assert not found.fooled.any()
        assert found.queries.float().mean() * each == pytest.approx(part.passes(4), rel=0.35), part.name


# --- nothing but the image decides, and nothing is left behind


@pytest.mark.parametrize("form", NAMES)
def test_pitfall_18_results_do_not_move_with_batch_or_order(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    model, images, labels = task
    images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)  # more than 256
    attack = short(form)
    whole = attack(model, images, labels, LINF)
    for size, upto in ((1, 14), (7, 14), (256, len(images))):
        for start in range(0, upto, size):
            names = torch.arange(start, min(start + size, len(images)))
            assert len(names) < len(images)
            part = attack(model, images[names], labels[names], LINF, indices=names)
            for what in COLUMNS:
                assert torch.equal(getattr(part, what), getattr(whole, what)[names]), what
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    turned = attack(model, images[order], labels[order], LINF, indices=order)
    for what in COLUMNS:
        assert torch.equal(getattr(turned, what), getattr(whole, what)[order]), what


@pytest.mark.parametrize("name", ["pgd-6", "apgd-t-6-2", "fab-t-6-2", "square-40"])
def test_pitfall_18_a_judge_does_not_tie_images_together(task: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, images, labels = task
    images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    asked: list[int] = []

    def judge(points: Tensor) -> Tensor:
        asked.append(len(points))
        return predict(lambda x: model((x * 12).round() / 12), points).argmax(1)

    attack = parse_attack(name)
    whole = attack(model, images, labels, LINF, judge=judge)
    assert whole.disputed.any()
    assert max(asked) > 7, "several images are judged at a time"
    for size, upto in ((1, 7), (7, 14), (256, len(images))):
        for start in range(0, upto, size):
            names = torch.arange(start, min(start + size, len(images)))
            part = attack(model, images[names], labels[names], LINF, judge=judge, indices=names)
            for what in COLUMNS:
                assert torch.equal(getattr(part, what), getattr(whole, what)[names]), what


@pytest.mark.parametrize("name", ["fgsm-rs", "pgd-6", "apgd-ce-6", "square-40"])
def test_a_seed_repeats_and_another_differs(task: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, images, labels = task
    first, again, other = (
        parse_attack(name)(model, images[:20], labels[:20], LINF, seed=seed).adversarial for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert ((first != other).flatten(1).any(1)).all()


@pytest.mark.parametrize("form", NAMES)
def test_pitfalls_15_16_19_nothing_is_left_behind(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    model, images, labels = task
    model[1].train()
    model[0].weight.requires_grad_(False)
    model[-1].bias.grad = torch.ones(4)
    arguments = images[:5].clone(), labels[:5].clone()

    draw_a_little()
    before = traces(model, *arguments)
    try:
        short(form)(model, *arguments, LINF)
        assert traces(model, *arguments) == before
        with pytest.raises(ZeroDivisionError):
            parse_attack("pgd-3")(model, *arguments, LINF, judge=lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
        assert traces(model, *arguments) == before, "after an error, too"
    finally:
        model.eval()
        model[0].weight.requires_grad_(True)
        model[-1].bias.grad = None


def test_results_carry_no_graph(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    found = parse_attack("pgd-3")(model, images[:3].clone().requires_grad_(), labels[:3], LINF)
    assert not found.adversarial.requires_grad


# --- the queue


@pytest.mark.parametrize("name", ["pgd-2-3", "apgd-t-4-3", "fab-t-4-2", "square-20"])
def test_more_images_than_slots_and_several_runs(task: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, images, labels = task
    done: list[int] = []
    rows: dict[int, tuple[str, ...]] = {}

    def row(result: AttackResult, image: int) -> tuple[str, ...]:
        return tuple(str(getattr(result, what)[image].tolist()) for what in COLUMNS)

    def keep(result: AttackResult, positions: list[int]) -> None:
        assert result.finished[positions].all()
        assert (result.queries[positions] > 0).all()
        assert ((result.step[positions] >= 0) == result.fooled[positions]).all()
        done.extend(positions)
        rows.update({image: row(result, image) for image in positions})

    found = parse_attack(name)(model, images, labels, ThreatModel("linf", 0.19), on_done=keep)
    assert len(images) > 2 * TILE
    assert sorted(done) == list(range(len(images))), "each image once"
    assert all(rows[image] == row(found, image) for image in range(len(images))), "and nothing changes afterwards"
    assert found.finished.all()
    standing = ~found.fooled
    assert standing.any()
    if name == "pgd-2-3":
        assert found.restart[found.fooled].unique().numel() > 1
        assert (found.queries[standing] == 9).all()
        run, step = found.restart[found.fooled], found.step[found.fooled]
        assert torch.equal(found.queries[found.fooled], 3 * run + step + 1)


def test_an_image_is_asked_about_once_in_a_pass_and_first_runs_come_first(
    task: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, images, labels = task
    seen: list[set[int]] = []

    class Watched(PGD):
        def advance(self, slots, threat_model):  # type: ignore[no-untyped-def]
            seen.append(set(slots.run[slots.step == 0].tolist()))
            return super().advance(slots, threat_model)

    found = Watched(label="watched", steps=2, restarts=3, rel_step=1.0)(model, images, labels, LINF)
    begun = [run for runs in seen for run in sorted(runs)]
    assert begun == sorted(begun), "no image gets a second run before every image had its first"
    assert set(begun) == {0, 1, 2}
    assert found.finished.all()


def test_a_stop_leaves_the_rest_unfinished(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    whole = parse_attack("pgd-10-2")(model, images, labels, LINF)
    for passes in (0, 12, 25, 32):
        asked = iter([False] * passes)
        done: list[int] = []
        seen: list[float] = []
        stopped = parse_attack("pgd-10-2")(
            model,
            images,
            labels,
            LINF,
            stop=lambda: next(asked, True),  # noqa: B023
            on_done=lambda _, positions: done.extend(positions),  # noqa: B023
            on_progress=seen.append,
        )
        over = stopped.finished
        assert sorted(done) == over.nonzero()[:, 0].tolist()
        assert int(over.sum()) < len(images)
        assert bool(over.any()) == (passes > 0)
        for what in COLUMNS:
            assert torch.equal(getattr(stopped, what)[over], getattr(whole, what)[over])
        assert not stopped.fooled[~over].any()
        assert torch.equal(stopped.adversarial[~over], images[~over])
        assert 1.0 not in seen


def test_what_a_later_run_found_before_the_first_one_ended_counts() -> None:
    class SecondWins(PGD):
        def start(self, slots, rows, threat_model):  # type: ignore[no-untyped-def]
            return slots.clean[rows] + 0.1 * (slots.run[rows] == 1).view(-1, 1, 1, 1)

        def advance(self, slots, threat_model):  # type: ignore[no-untyped-def]
            return slots.points

    def model(x: Tensor) -> Tensor:
        return torch.stack([0.5 - x.flatten(1)[:, 0], x.flatten(1)[:, 0] - 0.5], 1)

    attack = SecondWins(label="second", steps=5, restarts=3, rel_step=1.0)
    image, label = torch.full((1, 1, 1, 1), 0.45), torch.tensor([0])
    whole = attack(model, image, label, LINF)
    assert (whole.restart.item(), whole.step.item(), whole.queries.item()) == (1, 0, 7), "as one after the other"
    assert whole.margin.item() == pytest.approx(-0.1)
    asked, done = iter([False] * 3), list[int]()
    stopped = attack(
        model, image, label, LINF, stop=lambda: next(asked, True), on_done=lambda _, positions: done.extend(positions)
    )
    assert bool(stopped.fooled & stopped.finished)
    assert done == [0]


def test_keep_last_goes_on_after_the_first_success(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = task
    plain = parse_attack("pgd-8")(model, images, labels, LINF)
    kept = parse_attack("pgd-8")(model, images, labels, LINF, keep_last=True)
    for what in ("fooled", "step", "restart"):
        assert torch.equal(getattr(kept, what), getattr(plain, what))
    assert torch.equal(kept.adversarial, plain.adversarial), "the first success stays"
    assert (kept.queries == 9).all()
    assert plain.last.numel() == 0
    LINF.verify(kept.last, images)
    early = plain.fooled & (plain.step < 8)
    assert early.sum() > 20
    assert (kept.last != plain.adversarial).flatten(1).any(1)[early].all()
    assert torch.equal(kept.last[~plain.fooled], plain.adversarial[~plain.fooled])


@pytest.mark.parametrize("form", NAMES)
def test_pitfall_24_no_image_and_one_image(task: tuple[nn.Module, Tensor, Tensor], form: str) -> None:
    model, images, labels = task
    for count in (0, 1):
        found = short(form)(model, images[:count], labels[:count], LINF)
        for each in fields(found):
            if each.name != "last":
                assert len(getattr(found, each.name)) == count
        assert found.adversarial.shape == (count, 1, 8, 8)


def test_pitfall_24_no_images_have_no_answers(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, _ = task
    assert len(predict(model, images[:0])) == 0


# --- ball and box


def moved(norm: str, clean: Tensor, size: float, seed: int) -> Tensor:
    """``clean`` plus a perturbation of that size in a random direction, in float32."""
    direction = torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    direction /= direction.abs().max() if norm == "linf" else direction.norm()
    return (clean.double() + size * direction).float()


@given(st.sampled_from(["linf", "l2"]), st.floats(0.01, 0.4), st.integers(0, 2**31), st.booleans())
def test_pitfall_20_a_hair_outside_is_outside_and_rounding_is_not(norm: str, eps: float, seed: int, box: bool) -> None:
    tm = ThreatModel(norm, eps, box=box)  # type: ignore[arg-type]
    clean = torch.full((1, 2, 4, 4), 0.5)
    assert tm.contains(moved(norm, clean, eps * (1 - 1e-4), seed), clean)
    assert tm.contains(moved(norm, clean, eps, seed), clean), "float32 rounds a point of the sphere to either side"
    assert not tm.contains(moved(norm, clean, eps + 3e-6, seed), clean)
    assert tm.contains(tm.project(moved(norm, clean, 3 * eps, seed), clean), clean)


@given(st.sampled_from(["linf", "l2"]), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.booleans())
def test_what_is_no_number_is_outside(norm: str, value: float, box: bool) -> None:
    tm = ThreatModel(norm, 0.1, box=box)  # type: ignore[arg-type]
    clean = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    points = clean.clone()
    points[1, 1, 3, 3] = value
    assert tm.contains(points, clean).tolist() == [True, False, True]


@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_box_has_no_tolerance(norm: str, edge: float) -> None:
    clean = torch.full((1, 1, 2, 2), edge)
    beyond = clean.clone()
    beyond[0, 0, 0, 0] = torch.nextafter(clean[0, 0, 0, 0], torch.tensor(2 * edge - 0.5))
    boxed, free = (ThreatModel(norm, 0.1, box=box) for box in (True, False))  # type: ignore[arg-type]
    assert boxed.contains(clean, clean)
    assert not boxed.contains(beyond, clean)
    assert free.contains(beyond, clean)
    assert torch.equal(boxed.project(beyond, clean), clean)


@given(st.sampled_from(["linf", "l2"]), st.lists(st.floats(1e-3, 1), min_size=4, max_size=4), st.integers(0, 2**31))
def test_each_image_can_have_a_step_length_of_its_own(norm: str, lengths: list[float], seed: int) -> None:
    tm = ThreatModel(norm, 0.1)  # type: ignore[arg-type]
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    together = tm.step(gradient, torch.tensor(lengths).view(-1, 1, 1, 1))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row : row + 1], tm.step(gradient[row : row + 1], length))
    torch.testing.assert_close(tm.size(together), torch.tensor(lengths))


@given(st.sampled_from(["linf", "l2"]), st.floats(-30, 10))
def test_steps_do_not_depend_on_the_scale_of_the_gradient(norm: str, exponent: float) -> None:
    tm = ThreatModel(norm, 0.1)  # type: ignore[arg-type]
    gradient = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    if norm == "l2" and exponent < -15:
        return  # the squares underflow; the direction is kept all the same, and the projection cuts the length
    torch.testing.assert_close(tm.step(gradient * 10.0**exponent, 0.3), tm.step(gradient, 0.3), rtol=1e-4, atol=1e-6)


def test_pitfall_20_l2_points_of_large_images_lie_inside_when_projected() -> None:
    """eps 3 at 3x224x224: the usual l2 threat on ImageNet. A success that is refused here counts as robustness."""
    generator = torch.Generator().manual_seed(0)
    tm = ThreatModel("l2", 3.0)
    clean = 0.3 + 0.4 * torch.rand(2, 3, 224, 224, generator=generator)
    points = clean + 0.02 * torch.randn(clean.shape, generator=generator)
    assert tm.contains(tm.project(points, clean), clean).all()


def test_a_norm_that_is_not_known_is_refused() -> None:
    with pytest.raises(Exception, match="norm"):
        ThreatModel("Linf", 0.1)  # type: ignore[arg-type]
