"""What the panel promises whatever it finds: names, words, thresholds, refusals, black boxes, files, no traces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coldforge.attacks import ThreatModel, predict
from coldforge.compress import quantize
from coldforge.data import ImageSet
from coldforge.errors import AttackError, ModelError
from coldforge.evaluate import Target, evaluate, masking_panel
from coldforge.evaluate.masking_attacks import NOISE_POINTS, Task, fooled_by_noise, named
from coldforge.evaluate.masking_checks import allowed, check
from coldforge.evaluate.masking_gradients import gradient_of
from coldforge.models.checks import refuse_probabilities, sum_tolerance
from coldforge.recipe import QuantizeSpec
from coldforge.records import MaskingRecord
from traces import draw_a_little, traces, unsettle

ANSWERS = ("repeatable", "independent_of_neighbours")
GRADIENTS = (
    "nan_gradients",
    "zero_gradients_ce",
    "zero_gradients_margin",
    "zero_gradients_nearby",
    "gradients_at_images",
    "gradients_agree",
)
ATTACKS = (
    "more_steps_never_weaker",
    "steps_converged",
    "restarts",
    "larger_eps_never_weaker",
    "unbounded",
    "fgsm_beats_pgd",
    "noise_beats_gradient",
    "scores_vary",
    "square_beats_gradient",
)
BLACK_BOX = ("differentiable", "larger_eps_never_weaker", "unbounded", "noise_beats_square", "scores_vary")
BALL = ThreatModel("linf", 0.08)


def toy(classes, seed=0):
    """(network trained a little, 40 images (1, 8, 8), labels): right on most images, fooled on some."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, 8, 8, generator=generator)
    labels = torch.randint(classes, (340,), generator=generator)
    images = (0.5 * patterns[labels] + 0.4 * torch.rand(340, 1, 8, 8, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
        )
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(15):
        loss = F.cross_entropy(network(images[:300]), labels[:300])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return network.eval(), images[300:], labels[300:]


@pytest.fixture(scope="module")
def task():
    return toy(4)


class File:
    """Stands for a session of a deployed file; counts what it is asked."""

    def __init__(self, network):
        self.network, self.asked = network, 0

    def logits(self, images):
        self.asked += len(images)
        return predict(self.network, images)

    def labels(self, images):
        return self.logits(images).argmax(1)


class Changed(nn.Module):
    def __init__(self, network, *, before=None, after=None):
        super().__init__()
        self.network = network
        self.before, self.after = before or (lambda images: images), after or (lambda logits: logits)

    def forward(self, images):
        return self.after(self.network(self.before(images)))


def names(record):
    return tuple(found.name for found in record.checks)


def failing(record):
    return {found.name for found in record.checks if not found.passed}


# --- names, words, verdict


def test_the_checks_of_a_float_network(task):
    network, images, labels = task
    said = []
    state = torch.random.get_rng_state()
    found = masking_panel(Target(network), images, labels, BALL, on_progress=lambda *words: said.append(words))
    assert names(found) == (*ANSWERS, *GRADIENTS, *ATTACKS, "binarization")
    assert found.verdict == "ok"
    assert all(one.meaning for one in found.checks)
    assert torch.equal(torch.random.get_rng_state(), state)
    fractions = [fraction for fraction, _ in said]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len({part for _, part in said}) > 5
    turned = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert masking_panel(Target(network), images[turned], labels[turned], BALL) == found  # the same seed and images


def test_a_quantized_network_is_also_attacked_from_its_float_twin(task):
    network, images, labels = task
    quantized = quantize(network, QuantizeSpec(), images)
    found = masking_panel(Target(quantized), images, labels, BALL)
    assert names(found) == (*ANSWERS, *GRADIENTS, *ATTACKS, "transfer_beats_gradient", "binarization")
    assert found.verdict == "ok"


@pytest.mark.parametrize("quantized", [False, True])
def test_pitfalls_15_16_19_the_panel_leaves_nothing_behind(quantized, task):
    parent, images, labels = task
    parent = copy.deepcopy(parent)
    network = quantize(parent, QuantizeSpec(), images) if quantized else copy.deepcopy(parent)
    predict(network, images)  # quantizers read their zero points once
    file = File(copy.deepcopy(network)) if quantized else None
    for each in (network, parent):
        unsettle(each)
    draw_a_little()
    before = traces(network, parent, images, labels)
    masking_panel(Target(network, file, {"its parent": parent}), images[:20], labels[:20], BALL)
    assert traces(network, parent, images, labels) == before


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    network, images, labels = toy(classes)
    assert masking_panel(Target(network), images, labels, BALL).verdict == "ok"


def test_what_failed_says_what_to_do():
    kept = check("name", 0.5, 0.5, "fine", "wrong", "do this")
    assert (kept.passed, kept.meaning) == (True, "fine")
    broken = check("name", 0.51, 0.5, "fine", "wrong", "do this")
    assert (broken.passed, broken.meaning) == (False, "wrong; do this")
    assert check("name", 0.5, 0.5, "fine", "wrong", "do this", at_least=True).passed
    assert not check("name", 0.49, 0.5, "fine", "wrong", "do this", at_least=True).passed


def test_one_or_two_images_are_never_enough_to_suspect():
    for n in range(1, 200):
        assert 2 / n <= allowed(n)
        assert 3 / n > allowed(n) or 3 / n <= 0.02
    assert allowed(1000) == 0.02


def test_nan_never_passes():
    assert not check("name", float("nan"), 0.5, "fine", "wrong", "do this").passed
    assert not check("name", float("nan"), 0.5, "fine", "wrong", "do this", at_least=True).passed


# --- refusals, and too few images


@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_pitfall_14_probabilities_are_refused_whoever_answers(scale, in_8_bits, task):
    network, images, labels = task

    def after(z):
        soft = (0.2 * z).softmax(1)
        return scale * ((soft * 256).round() / 256 if in_8_bits else soft)

    soft = Changed(network, after=after)
    data = ImageSet((255 * images).to(torch.uint8), labels, tuple("abcd"))
    for target in (Target(soft), Target(None, File(soft)), Target(network, File(soft))):
        with pytest.raises(ModelError, match="returns probabilities; expected logits; remove the softmax"):
            masking_panel(target, images, labels, BALL)
        with pytest.raises(ModelError, match="returns probabilities; expected logits; remove the softmax"):
            evaluate(target, data, [], BALL)
    with pytest.raises(ModelError, match="returns probabilities; expected logits; remove the softmax"):
        evaluate(Target(network, surrogates={"soft": soft}), data, [], BALL)


def test_log_probabilities_and_positive_logits_are_logits(task):
    network, images, labels = task
    for after in (lambda z: z.log_softmax(1), lambda z: z - z.amin(1, keepdim=True) + 1):
        assert masking_panel(Target(Changed(network, after=after)), images, labels, BALL).verdict == "ok"


def test_logits_with_nearly_the_same_sum_are_no_probabilities_of_8_bits(task):
    network, images, _ = task
    logits = predict(network, images) + 20
    sums = logits.sum(1)
    assert 1e-3 < (sums / sums.mean() - 1).abs().max() < sum_tolerance(4)
    refuse_probabilities(logits)


def test_logits_far_above_zero_are_no_probabilities(task):
    network, images, _ = task
    logits = predict(network, images) + 3000
    sums = logits.sum(1)
    assert (sums / sums.mean() - 1).abs().max() < 1e-3
    refuse_probabilities(logits)


def test_nan_logits_are_refused(task):
    network, images, labels = task
    holed = Changed(network, after=lambda z: torch.where(z.amax(1, keepdim=True) > 1e-3, z / z.relu().sign(), z))
    with pytest.raises(ModelError, match=r"expected finite logits, got NaN or infinity for \d+ of 40 test images"):
        masking_panel(Target(holed), images, labels, BALL)


def test_images_are_checked(task):
    network, images, labels = task
    with pytest.raises(AttackError, match="got none"):
        masking_panel(Target(network), images[:0], labels[:0], BALL)
    with pytest.raises(AttackError, match=r"inside \[0, 1\]"):
        masking_panel(Target(network), images * 2 + 0.1, labels, BALL)


def test_too_few_right_images_are_no_verdict(task):
    network, images, labels = task
    wrong = (labels + 1) % 4
    found = masking_panel(Target(network), images, torch.where(torch.arange(40) < 5, labels, wrong), BALL)
    assert found.verdict == "not_run"
    assert names(found) == (*ANSWERS, "enough_images")
    assert "at least 10 are needed" in found.checks[-1].meaning


def test_randomness_is_suspect_however_few_images_are_right(task):
    network, images, labels = task
    noisy = Changed(network, after=lambda z: z + 0.01 * torch.randn_like(z))
    found = masking_panel(Target(noisy), images[:5], labels[:5], BALL)
    assert found.verdict == "suspect"
    assert "repeatable" in failing(found)


# --- black boxes and files


def test_a_black_box_is_asked_what_needs_no_gradients(task):
    network, images, labels = task
    found = masking_panel(Target(None, File(network)), images, labels, BALL)
    assert names(found) == (*ANSWERS, *BLACK_BOX)
    assert found.verdict == "ok"
    assert "an upper bound" in found.checks[2].meaning


def test_a_random_black_box_is_suspect(task):
    network, images, labels = task
    noisy = Changed(network, before=lambda x: x + 0.1 * torch.randn_like(x))
    found = masking_panel(Target(None, File(noisy)), images, labels, BALL)
    assert "repeatable" in failing(found)


def test_a_black_box_that_tells_labels_only_is_suspect(task):
    """Square then finds next to nothing, however easily the network is fooled."""
    network, images, labels = task
    closed = File(Changed(network, after=lambda z: 8.0 * F.one_hot(z.argmax(1), 4) - 3))
    assert failing(masking_panel(Target(None, closed), images, labels, BALL)) == {"scores_vary"}
    beside = masking_panel(Target(None, closed, {"open": network}), images, labels, BALL)
    assert failing(beside) == {"scores_vary", "transfer_beats_square"}
    honest = masking_panel(Target(None, File(network), {"open": network}), images, labels, BALL)
    assert names(honest) == (*ANSWERS, *BLACK_BOX, "transfer_beats_square")
    assert honest.verdict == "ok"


def test_a_ball_smaller_than_the_steps_of_the_input_says_nothing_of_the_scores(task):
    network, images, labels = task
    stepped = File(Changed(network, before=lambda x: (x * 255).round() / 255))
    exact = (images * 255).round() / 255
    found = masking_panel(Target(None, stepped), exact, labels, ThreatModel("linf", 0.001))
    (scores,) = [check for check in found.checks if check.name == "scores_vary"]
    assert scores.value == 1.0
    assert scores.passed
    assert not scores.conclusive
    assert found.verdict == "ok"


def test_noise_is_judged_by_the_file_too(task):
    """It stands everywhere; that its twin does not is no sign of masking."""
    network, images, labels = task

    class Firm(nn.Module):
        def forward(self, points):
            nearest = torch.cdist(points.flatten(1), images.flatten(1)).argmin(1)
            return network(points) * 1e-3 + 30 * F.one_hot(labels[nearest], 4)

    found = masking_panel(Target(network, File(Firm())), images, labels, ThreatModel("linf", 0.3))
    assert "noise_beats_gradient" not in failing(found)
    assert next(check.value for check in found.checks if check.name == "noise_beats_gradient") <= 1 / 40


def test_who_judges_the_gradient_attacks_is_the_file(task):
    """A twin that falls where its file stands must not pass for attacks that work."""
    network, images, labels = task
    firm = File(Changed(network, before=lambda x: (x * 4).round() / 4))  # small steps do not reach it
    alone, judged = (masking_panel(Target(network, file), images, labels, BALL) for file in (None, firm))
    curve = (
        {found.name: found.meaning for found in alone.checks},
        {found.name: found.meaning for found in judged.checks},
    )
    assert curve[0]["more_steps_never_weaker"] != curve[1]["more_steps_never_weaker"]


def test_a_network_without_gradients_is_suspect_and_attacked_as_a_black_box(task):
    network, images, labels = task
    found = masking_panel(Target(Changed(network, before=lambda x: (x > 0.4).float())), images, labels, BALL)
    assert names(found) == (*ANSWERS, *BLACK_BOX)
    assert failing(found) >= {"differentiable"}
    assert found.verdict == "suspect"


def test_square_asks_the_file(task):
    """Its answers are what Square counts."""
    network, images, labels = task
    file = File(network)
    white = Changed(network, before=lambda x: x.detach() + 0 * x)  # gradients of zero: the white box finds nothing
    found = masking_panel(Target(white, file), images, labels, BALL)
    assert file.asked > 40 * 10
    assert failing(found) >= {"square_beats_gradient", "zero_gradients_ce"}


def test_a_file_that_answers_at_random_is_suspect(task):
    network, images, labels = task
    noisy = File(Changed(network, after=lambda z: z + 0.01 * torch.randn_like(z)))
    assert "repeatable" in failing(masking_panel(Target(network, noisy), images, labels, BALL))


def test_transfer_beats_a_network_whose_gradients_are_stopped(task):
    network, images, labels = task
    stopped = Changed(network, before=lambda x: x.detach() + 0 * x)
    found = masking_panel(Target(stopped, surrogates={"open": network}), images, labels, BALL)
    assert failing(found) >= {"transfer_beats_gradient", "square_beats_gradient", "zero_gradients_nearby"}
    assert MaskingRecord.model_validate_json(found.model_dump_json()) == found  # JSON knows no infinity


# --- the pieces


def test_the_naive_gradient_underflows_where_logits_are_far_apart_and_the_margin_does_not(task):
    network, images, labels = task
    right = predict(network, images).argmax(1) == labels
    images, labels = images[right], labels[right]
    far = Changed(network, after=lambda z: 1e4 * z)
    assert (gradient_of(far, images, labels, loss="ce") == 0).flatten(1).all(1).double().mean() > 0.9
    assert not (gradient_of(far, images, labels, loss="margin") == 0).flatten(1).all(1).any()
    assert not (gradient_of(network, images, labels, loss="ce") == 0).flatten(1).all(1).any()


def test_gradients_do_not_mix_images(task):
    network, images, labels = task
    together = gradient_of(network, images, labels, loss="ce")
    for i in (0, 17):
        assert torch.allclose(together[i], gradient_of(network, images[i : i + 1], labels[i : i + 1], loss="ce")[0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_stays_inside_the_ball_and_is_drawn_that_often(norm, task):
    _, images, labels = task
    ball, seen = ThreatModel(norm, 0.3), []

    def right(points):
        seen.append(points[: len(images)])
        return F.one_hot(labels, 4).float().repeat(2, 1)[: len(points)]

    fooled = fooled_by_noise(right, Task(images, labels, ball, 0), torch.ones(len(images), dtype=torch.bool))
    assert not fooled.any()
    assert len(seen) == NOISE_POINTS
    assert all(ball.contains(points, images).all() for points in seen)
    sizes = torch.stack([ball.size(points - images) for points in seen])
    assert sizes.amax() > 0.29
    assert len({float(points.sum()) for points in seen}) == NOISE_POINTS


def test_the_whole_box_holds_every_image(task):
    _, images, labels = task
    for norm in ("linf", "l2"):
        whole = Task(images, labels, ThreatModel(norm, 0.1), 0).whole_box().ball
        assert whole.contains(torch.zeros_like(images), torch.ones_like(images)).all()
        assert whole.contains(1 - images.round(), images.round()).all()


def test_only_images_within_are_attacked(task):
    network, images, labels = task
    within = torch.arange(40) % 2 == 0
    fooled = Task(images, labels, ThreatModel("linf", 0.5), 0).run(named("pgd-5"), network, within)
    assert fooled[within].double().mean() > 0.9
    assert not fooled[~within].any()


def test_the_cost_is_what_the_module_says(task):
    """Where no attack succeeds, nothing is saved: 700 passes with gradients and 1,600 without, on each image."""
    network, images, labels = task
    counted = {True: 0, False: 0}

    class Firm(nn.Module):  # never fooled, and gradients are there
        def forward(self, points):
            counted[torch.is_grad_enabled()] += len(points)
            return network(points) * 1e-3 + 30 * truth(points)

    def truth(points):
        nearest = torch.cdist(points.detach().flatten(1), images.flatten(1)).argmin(1)
        return F.one_hot(labels[nearest], 4).float()

    tile = 64
    masking_panel(Target(Firm()), images, labels, ThreatModel("linf", 1e-3))
    assert counted[True] <= 700 * tile
    assert counted[False] <= 1600 * tile
    assert counted[True] > 300 * tile
