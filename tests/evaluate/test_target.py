"""Targets: kill and resume, budget, verified fast searches, files, black boxes, transfer."""

from __future__ import annotations

import copy
import json
import math

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coldforge.attacks import TILE, Ensemble, ThreatModel, base, parse_attack, predict
from coldforge.compress import attacking, quantize
from coldforge.data import ImageSet
from coldforge.deploy import OnnxSession, export_onnx
from coldforge.errors import AttackError
from coldforge.evaluate import (
    TRANSFER,
    Target,
    evaluate,
    fast_copy,
    find_adversarial,
    mcnemar,
    paired_interval,
    robustness,
)
from coldforge.evaluate.ledger import Journal
from coldforge.evaluate.robustness import names_of
from coldforge.evaluate.target import Ways
from coldforge.recipe import QuantizeSpec
from traces import draw_a_little, traces, unsettle

ATTACKS = [parse_attack("pgd-5"), parse_attack("autoattack-lite")]
PARTS = tuple(parse_attack(name) for name in ("apgd-ce-6", "apgd-t-4-2", "fab-t-4-2", "square-30"))
SHORT = [ATTACKS[0], Ensemble(label="short", parts=PARTS)]
"""Every kind of attack, in little time."""
COLUMNS = ("fooled", "step", "restart", "queries", "norm", "margin", "by", "finished", "disputed", "fooled_8bit")


class File:
    """A deployed file whose logits are those of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.asked = network, 0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += len(images)
        return predict(self.network, images)

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(images).argmax(1)


class Uneven(nn.Module):
    """Rounds as kernels may: not alike for every number of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images) + 1e-4 * (len(images) != TILE) * torch.arange(4)


def rows(ledger, images):
    """All that a ledger says of some images, to be compared."""
    said = {}
    for what in COLUMNS:
        for attack, column in getattr(ledger, what).items():
            values = column if isinstance(column, list) else column.double().nan_to_num(-7, posinf=-8).tolist()
            said[what, attack] = [values[image] for image in images]
    return said


def same(first, second) -> bool:
    """Every column of two ledgers."""
    return rows(first, range(len(first.labels))) == rows(second, range(len(second.labels)))


@pytest.fixture(scope="module")
def rounded(task):
    model, data = task
    return quantize(model, QuantizeSpec(weight_bits=3, activation_bits=3, edge_bits=3), data.pixels())


@pytest.fixture(scope="module")
def exported(task, tmp_path_factory):
    """(int8 network, its ONNX file)"""
    model, data = task
    twin = quantize(model, QuantizeSpec(), data.pixels())
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(twin, path, image_shape=(1, 8, 8), classes=data.classes)
    return twin, path


PIPELINES = [
    ("float network", "exact"),
    ("float network", "fp32"),
    ("float network", "bf16"),
    ("network that rounds by the batch", "bf16"),
    ("network of 3 bits", "exact"),
    ("network of 3 bits", "bf16"),
    ("int8 file with twin and parent", "exact"),
    ("int8 file with twin and parent", "fp32"),
    ("int8 file with twin and parent", "bf16"),
]
each_pipeline = pytest.mark.parametrize(("what", "precision"), PIPELINES)


@pytest.fixture(scope="module")
def targets(task, rounded, exported):
    """What is attacked, by the names in :data:`PIPELINES`."""
    model, _ = task
    twin, path = exported
    made = (
        Target(model),
        Target(Uneven(model)),
        Target(rounded, File(rounded)),
        Target(twin, OnnxSession(path, threads=1), {"its parent": copy.deepcopy(model)}),
    )
    return dict(zip(dict(PIPELINES), made, strict=True))


@pytest.fixture(scope="module")
def whole(task, threat):
    model, data = task
    return evaluate(Target(model), data, SHORT, threat, seed=2)


# --- kill and resume


class Killed(Exception):
    """The machine went away."""


@each_pipeline
def test_pitfall_resume_a_killed_evaluation_ends_like_an_undisturbed_one(
    task, threat, targets, monkeypatch, tmp_path, what, precision
):
    """After any pass; what stood until then is in the journal, also of the try that was under way."""
    _, data = task

    def evaluated(**options):
        return evaluate(targets[what], data, SHORT, threat, seed=2, precision=precision, **options)

    undisturbed = evaluated()
    monkeypatch.setattr(base, "_PROGRESS_PASSES", 1)
    monkeypatch.setattr(robustness, "_FLUSH_SECONDS", -1.0)
    for percent, torn in ((7, 0), (34, 290), (61, 5), (88, 120)):

        def kill(fraction, name, percent=percent):
            if fraction >= percent / 100:
                raise Killed

        journal = tmp_path / str(percent)
        with pytest.raises(Killed):
            evaluated(checkpoint=journal, on_progress=kill)
        text = journal.read_bytes()
        journal.write_bytes(text[: max(len(text) - torn, 1)])  # whole lines may be lost, and the last one is torn
        assert same(evaluated(checkpoint=journal), undisturbed), percent


def test_nothing_is_computed_twice(task, threat, whole, tmp_path):
    model, data = task
    evaluate(Target(model), data, SHORT, threat, seed=2, checkpoint=tmp_path / "journal")
    queries = []
    handle = model.register_forward_hook(lambda *_: queries.append(1))
    try:
        again = evaluate(Target(model), data, SHORT, threat, seed=2, checkpoint=tmp_path / "journal")
    finally:
        handle.remove()
    assert same(again, whole)
    assert len(queries) == 2, "only the clean images are asked about, and whether the answers are logits"


def test_a_journal_of_another_evaluation_is_not_used(task, threat, tmp_path):
    model, data = task
    for seed, attacks, tm in ((2, SHORT, threat), (3, SHORT, threat), (3, SHORT[:1], threat)):
        found = evaluate(Target(model), data, attacks, tm, seed=seed, checkpoint=tmp_path / "journal")
        assert same(found, evaluate(Target(model), data, attacks, tm, seed=seed))
    stronger = ThreatModel("linf", 0.2)
    found = evaluate(Target(model), data, SHORT[:1], stronger, seed=3, checkpoint=tmp_path / "journal")
    assert same(found, evaluate(Target(model), data, SHORT[:1], stronger, seed=3))


def test_a_journal_of_another_network_file_or_images_is_not_used(task, threat, tmp_path):
    """They answer the clean images alike."""
    model, data = task
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].weight.mul_(1.01)
    brighter = ImageSet((data.images.int() + 1).clamp(0, 255).to(torch.uint8), data.labels, data.classes)
    square = [parse_attack("square-20")]
    for target, images, attacks in (
        (Target(model), data, SHORT),
        (Target(other), data, SHORT),
        (Target(other), brighter, SHORT),
        (Target(None, File(model)), data, square),
        (Target(None, File(other)), data, square),
    ):
        found = evaluate(target, images, attacks, threat, checkpoint=tmp_path / "journal")
        assert torch.equal(found.answers, target.answers(data.pixels()))
        assert same(found, evaluate(target, images, attacks, threat))


# --- nothing but the image decides, and nothing is left behind


@each_pipeline
def test_pitfall_18_results_do_not_move_with_batch_or_order(task, threat, targets, what, precision, monkeypatch):
    """1, 7 and 256 images at the front of the test set, which are others each time."""
    _, data = task
    monkeypatch.setattr("coldforge.evaluate.target._NOISE", 100.0)  # many are tried once more in float32, not few
    copies = [data.images.roll(shift, 3) for shift in range(7)]  # more than 256, many of the same brightness
    many = ImageSet(torch.cat(copies), data.labels.repeat(7), data.classes)

    def evaluated(order, n):
        part = ImageSet(many.images[order], many.labels[order], many.classes)
        return evaluate(targets[what], part, SHORT, threat, n=n, seed=2, precision=precision)

    whole = evaluated(torch.arange(len(many)), 0)
    hardest = whole.queries["short"].argsort(descending=True, stable=True)
    shuffled = torch.randperm(len(many), generator=torch.Generator().manual_seed(1))
    if precision == "bf16":
        near = Ways(targets[what], many.pixels(), "bf16").of(SHORT[0])[1].near
        stands, margin = whole.survived("pgd-5"), whole.margin["pgd-5"]
        assert 0 < (stands & (margin < near)).sum() < stands.sum()
    for n, order in ((1, hardest), (1, hardest.roll(-1)), (7, hardest.roll(-2)), (256, shuffled)):
        found = evaluated(order, n)
        assert rows(found, range(n)) == rows(whole, order[:n].tolist()), n


@each_pipeline
def test_pitfalls_15_16_19_an_evaluation_leaves_nothing_behind(task, threat, targets, what, precision):
    """Networks in a state that no evaluation would choose come back in it, also after a kill, and are judged alike."""
    _, data = task
    given = targets[what]
    surrogates = {name: copy.deepcopy(network) for name, network in given.surrogates.items()}
    target = Target(copy.deepcopy(given.network), given.file, surrogates)
    networks = [target.network, *surrogates.values()]

    def evaluated(target, **options):
        return evaluate(target, data, SHORT, threat, n=9, seed=2, precision=precision, **options)

    for network in networks:
        predict(network, data.pixels())  # quantizers read their zero points once
        unsettle(network)
    draw_a_little()
    before = traces(*networks, data.images, data.labels)
    found = evaluated(target)
    assert traces(*networks, data.images, data.labels) == before
    assert rows(found, range(9)) == rows(evaluated(given), range(9))
    for tried in found.fooled:

        def kill(fraction, name, tried=tried):
            if name == tried:
                raise Killed

        with pytest.raises(Killed):
            evaluated(target, on_progress=kill)
        assert traces(*networks, data.images, data.labels) == before, tried


# --- budget


def test_a_budget_is_said_and_what_is_left_counts_as_standing(task, threat, whole):
    model, data = task
    short = evaluate(Target(model), data, SHORT, threat, seed=2, budget_s=1e-9)
    right = int(whole.right.sum())
    assert short.unfinished == {"pgd-5": right, "short": right}
    assert torch.equal(short.survived("worst_case"), whole.right)
    long = evaluate(Target(model), data, SHORT, threat, seed=2, budget_s=1e6)
    assert long.unfinished == {}
    assert same(long, whole)


def test_a_larger_budget_goes_on_where_a_smaller_one_ended_and_time_is_counted_once(task, threat, whole, tmp_path):
    model, data = task
    path, clock = tmp_path / "journal", pytest.MonkeyPatch()
    asked = []

    def evaluated(seconds, budget):
        """With a clock that moves by so many seconds whenever it is looked at."""
        now = [0.0]

        def tick():
            now[0] += seconds
            return now[0]

        asked.clear()
        with clock.context() as patched:
            patched.setattr("time.monotonic", tick)
            return evaluate(
                Target(model),
                data,
                SHORT,
                threat,
                seed=2,
                budget_s=budget,
                checkpoint=path,
                on_progress=lambda fraction, name: asked.append(name),
            )

    short = evaluated(1.0, 12.0)
    assert 0 < sum(short.unfinished.values()) < 2 * int(whole.right.sum())
    spent = json.loads(path.read_text().splitlines()[-1])["spent"]
    assert spent > 12
    again = evaluated(1.0, 12.0)  # nothing is left of it
    assert again.unfinished == short.unfinished
    assert same(evaluated(1e-6, 1e6), whole)


@pytest.mark.parametrize("spent", ["null", '"long"', "-3.0", "NaN", "[1.0]"])
def test_a_damaged_time_is_no_time(tmp_path, spent):
    path = tmp_path / "journal"
    path.write_text(f'{{"evaluation": "key"}}\n{{"spent": 7.5}}\n{{"spent": {spent}}}\n')
    assert 7.5 <= Journal(path, "key").spent < 60


# --- fast searches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pitfall_26_every_success_of_a_fast_search_holds_in_float32(task, threat, precision):
    model, data = task
    images, labels = data.pixels(), data.labels
    for attack in ATTACKS:
        found = find_adversarial(Target(model), attack, images, labels, threat, precision=precision)
        exact = find_adversarial(Target(model), attack, images, labels, threat)
        wrong = predict(model, found.adversarial).argmax(1) != labels
        assert wrong[found.fooled].all()
        assert abs(int(found.fooled.sum()) - int(exact.fooled.sum())) <= 2
        threat.verify(found.adversarial, images)


def test_pitfall_26_what_bfloat16_cannot_decide_is_tried_again_in_float32(task, threat):
    """A copy with errors as large as the margins, as bfloat16 has them near the boundary, finds what float32 finds."""
    model, data = task
    images = data.pixels()
    attack = parse_attack("apgd-ce-20")
    target = Target(model)
    ways = Ways(target, images, "bf16").of(attack)
    assert [way.label for way in ways] == ["", "in float32"]
    assert ways[0].near == math.inf
    errors = predict(ways[0].model, images) - predict(model, images)
    assert ways[1].near == pytest.approx(4 * float(errors.square().mean().sqrt()), rel=1e-3)
    assert [way.label for way in Ways(target, images, "fp32").of(attack)] == [""]
    assert [way.label for way in Ways(target, images, "bf16").of(parse_attack("fab-t-5-2"))] == ["", "in float32"]
    found = evaluate(target, data, [attack], threat, precision="bf16")
    stands = ~found.fooled["apgd-ce-20"]
    tried_twice = stands & (found.queries["apgd-ce-20"] > 21)
    assert torch.equal(tried_twice, stands & (found.margin["apgd-ce-20"] < ways[1].near))
    assert found.unfinished == {}


def test_near_the_boundary_the_second_try_decides(task, threat, monkeypatch):
    """With every image "near", the copy does not matter any more."""
    model, data = task
    monkeypatch.setattr("coldforge.evaluate.target._NOISE", 1e6)
    attack = parse_attack("pgd-5")
    found = evaluate(Target(model), data, [attack], threat, precision="bf16")
    exact = evaluate(Target(model), data, [attack], threat, precision="fp32")
    assert not (exact.fooled["pgd-5"] ^ (found.fooled["pgd-5"] & exact.fooled["pgd-5"])).any()
    assert {by for by in found.by["pgd-5"] if by} <= {"pgd-5", "in float32"}
    assert found.unfinished == {}


def test_a_network_that_refuses_bfloat16_is_attacked_as_it_is(task, threat):
    model, data = task

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("only float32")
            return self.inner(x) if float(x.detach().sum()) > -1 else x  # cannot be traced either

    found = evaluate(Target(Picky().eval()), data, ATTACKS[:1], threat, seed=2, precision="bf16")
    exact = evaluate(Target(model), data, ATTACKS[:1], threat, seed=2)
    assert torch.equal(found.fooled["pgd-5"], exact.fooled["pgd-5"])


def test_the_fast_copy_is_apart(task):
    model, data = task
    before = copy.deepcopy(model.state_dict())
    copied = fast_copy(model, "bf16")
    assert torch.allclose(predict(copied, data.pixels()), predict(model, data.pixels()), atol=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())


# --- quantized networks and files


@pytest.mark.parametrize("direction", ["to the file", "to the quantized network", "back to the parent"])
def test_pitfall_32_transfer_is_searched_elsewhere_and_judged_here(task, threat, rounded, exported, direction):
    """Each source as it would be attacked by hand, one after the other, on what stands."""
    model, data = task
    twin, path = exported
    before = copy.deepcopy(model)  # it was trained further
    before[4].weight.data += 0.05 * torch.randn(before[4].weight.shape, generator=torch.Generator().manual_seed(5))
    parent = ("its parent", "pass_through", before)
    target, sources = {
        "to the file": (
            Target(twin, OnnxSession(path, threads=1), {"its parent": before}),
            [("its float twin", "unrounded", twin), parent],
        ),
        "to the quantized network": (
            Target(rounded, surrogates={"its parent": before}),
            [("its float twin", "unrounded", rounded), parent],
        ),
        "back to the parent": (
            Target(model, surrogates={"what it became": rounded}),
            [("what it became", "pass_through", rounded)],
        ),
    }[direction]
    found = evaluate(target, data, [parse_attack("fgsm")], threat, seed=3)
    assert list(found.fooled) == ["fgsm", TRANSFER]
    images, labels, names = data.pixels(), data.labels, names_of(data.pixels())
    assert [way.label for way in Ways(target, images, "exact").transfer()[1]] == [
        f"from {name}" for name, *_ in sources
    ]
    stands, disputed = found.right.clone(), torch.zeros(len(data), dtype=torch.bool)
    for name, mode, source in sources:
        left, search = stands.nonzero()[:, 0], copy.deepcopy(source)
        with attacking(search, mode):
            result = parse_attack("pgd-20")(
                search, images[left], labels[left], threat, seed=3, indices=names[left], judge=target.answers
            )
        fell = left[result.fooled]
        assert torch.equal(target.answers(result.adversarial) != labels[left], result.fooled)
        assert {found.by[TRANSFER][image] for image in fell.tolist()} <= {f"pgd-20 from {name}"}
        stands[fell] = False
        disputed[left] |= result.disputed
    assert torch.equal(found.survived(TRANSFER), stands)
    assert torch.equal(found.disputed[TRANSFER], disputed)
    assert (found.right & ~stands).any()
    assert (disputed & stands).any(), "what fools only the source breaks nothing"
    assert not (found.survived("worst_case") & ~stands).any()
    assert TRANSFER not in evaluate(target, data, ATTACKS[:1], threat, transfer=False).fooled


def test_pitfall_32_transfer_breaks_what_masked_gradients_hide(task, threat):
    model, data = task

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.detach() + 0 * images)

    alone = evaluate(Target(Masked()), data, ATTACKS[:1], threat)
    assert list(alone.fooled) == ["pgd-5"], "there is nothing to transfer from"
    found = evaluate(Target(Masked(), surrogates={"an open copy": model}), data, ATTACKS[:1], threat)
    hidden = found.survived("pgd-5") & found.fooled[TRANSFER]
    assert hidden.sum() > 5
    assert torch.equal(found.survived("worst_case"), alone.survived("worst_case") & ~hidden)


def test_unrounded_is_the_float_parent(task, rounded):
    model, data = task
    with attacking(rounded, "unrounded"):
        loose = predict(rounded, data.pixels())
    assert torch.allclose(loose, predict(model, data.pixels()), atol=1e-4)
    assert not torch.allclose(predict(rounded, data.pixels()), loose, atol=1e-2)


def test_pitfall_31_every_verdict_is_the_files(task, threat):
    model, data = task
    images, labels = data.pixels(), data.labels
    coarse = quantize(model, QuantizeSpec(weight_bits=3, activation_bits=3, edge_bits=3), images)
    answers = predict(coarse, images).argmax(1)
    assert (answers != predict(model, images).argmax(1)).any(), "or the network's answers would do"
    target, square = Target(model, File(coarse)), parse_attack("square-50")
    found = evaluate(target, data, [ATTACKS[0], square], threat, seed=1)
    assert torch.equal(found.answers, answers)
    assert {by for by in found.by[square.name] if by} == {"on the file"}, "what needs no gradients asks nothing else"
    assert found.disputed[ATTACKS[0].name].any(), "a coarse file disputes its float network"
    right = found.right.nonzero()[:, 0]
    for attack in ATTACKS:
        images_of = find_adversarial(target, attack, images[right], labels[right], threat, indices=right)
        wrong = predict(coarse, images_of.adversarial).argmax(1) != labels[right]
        assert images_of.fooled.any()
        assert torch.equal(wrong, images_of.fooled)


@pytest.mark.parametrize("searched", ["its twin", "its float parent"])
def test_pitfall_31_plain_onnxruntime_says_the_same_of_an_int8_file(task, threat, exported, searched):
    """Every image is asked again in a session that this project did not make."""
    model, data = task
    twin, path = exported
    images, labels = data.pixels(), data.labels
    target = Target(twin if searched == "its twin" else model, OnnxSession(path, threads=1))
    assert target.file.uses_integer_kernels()
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def wrong(points):
        (logits,) = plain.run(None, {plain.get_inputs()[0].name: points.numpy()})
        return torch.from_numpy(logits).argmax(1) != labels

    attacks = [parse_attack(name) for name in ("pgd-5", "apgd-t-6-3", "square-50")]
    found = evaluate(target, data, attacks, threat, seed=1)
    assert torch.equal(found.right, ~wrong(images))
    for attack in attacks:
        result = find_adversarial(target, attack, images, labels, threat, seed=1)
        threat.verify(result.adversarial, images)
        assert torch.equal(wrong(result.adversarial), result.fooled), "broken: wrong; standing: right to the last"
        assert torch.equal(found.fooled[attack.name], result.fooled | wrong(images))
        assert 0 < (found.fooled[attack.name] & found.right).sum() < found.right.sum()
        in_8_bits = wrong(threat.rounded(result.adversarial, images)) & result.fooled
        assert torch.equal(found.fooled_8bit[attack.name], in_8_bits | wrong(images))
    assert not wrong(images)[found.survived("worst_case")].any()
    if searched == "its float parent":
        assert sum(int(column.sum()) for column in found.disputed.values()) > 0, "or the network could have judged"


def test_pitfall_28_a_black_box_has_no_gradients_and_says_so(task, threat):
    model, data = task
    file = File(model)
    with pytest.raises(AttackError, match=r"pgd-5 needs gradients, and a file has none; give a surrogate"):
        evaluate(Target(None, file), data, ATTACKS[:1], threat)
    square = evaluate(Target(None, file), data, [parse_attack("square-50")], threat)
    assert square.fooled["square-50"].sum() > (~square.right).sum()
    helped = evaluate(Target(None, file, {"a copy": copy.deepcopy(model)}), data, ATTACKS[:1], threat, seed=2)
    exact = evaluate(Target(model), data, ATTACKS[:1], threat, seed=2)
    assert torch.equal(helped.fooled["pgd-5"], exact.fooled["pgd-5"])
    assert {by for by in helped.by["pgd-5"] if by} == {"from a copy"}


def test_neither_network_nor_file_is_refused():
    with pytest.raises(AttackError, match="expected a network or a file to evaluate, got neither"):
        Target(None)


# --- paired statistics


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_tossing_coins(first, second):
    chances = [1.0]  # of so many heads, one toss after the other
    for _ in range(first + second):
        chances = [(a + b) / 2 for a, b in zip([0.0, *chances], [*chances, 0.0], strict=True)]
    as_rare = sum(chance for chance in chances if chance <= chances[first] * (1 + 1e-9))
    assert mcnemar(first, second) == pytest.approx(min(1.0, as_rare))
    assert mcnemar(first, second) == mcnemar(second, first)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 2000))
def test_the_paired_interval_holds_the_difference(first, second, n):
    low, high = paired_interval(first, second, n)
    assert low < high
    assert low <= (first - second) / (n + 2) <= high
    mirrored = paired_interval(second, first, n)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="expected counts of 0 or more"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="together at most n"):
        paired_interval(5, 6, 10)
