import math

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldforge.attacks import parse_attack, predict
from coldforge.compress import attacking, quantize
from coldforge.data import ImageSet
from coldforge.errors import AttackError
from coldforge.evaluate import Ledger, Target, evaluate, robustness, summarize, wilson_interval
from coldforge.evaluate.ledger import Row
from coldforge.evaluate.robustness import names_of
from coldforge.recipe import QuantizeSpec

NAMES = ("fgsm", "pgd-5", "pgd-4-2")
ATTACKS = [parse_attack(name) for name in NAMES]


class File:
    """A deployed file, as far as gradient attacks ask it."""

    def __init__(self, labels):
        self.labels = labels

    def logits(self, images):
        return 2 * torch.nn.functional.one_hot(self.labels(images), 10) - 1  # a file of one's own may count in integers


def slow_ledger(model, data, attacks, threat, n, seed):
    """The ledger as a list of rows: each image alone, attacked only where it is right when clean."""
    rows = []
    for index in range(len(data)):
        image, label = data.pixels([index]), data.labels[index : index + 1]
        answer = int(predict(model, image).argmax(1))
        row = {"label": int(label), "answer": answer}
        for attack in attacks if index < n else ():
            if answer != int(label):
                row[attack.name] = (True, -1, -1, 0, True)
                continue
            result = attack(model, image, label, threat, seed=seed, indices=names_of(image))
            row[attack.name] = tuple(
                column.item() for column in (result.fooled, result.step, result.restart, result.queries)
            )
            rounded = predict(model, threat.rounded(result.adversarial, image)).argmax(1) != label
            row[attack.name] += (bool(result.fooled) and bool(rounded),)
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def ledger(task, threat):
    model, data = task
    return evaluate(Target(model), data, ATTACKS, threat, seed=5)


# --- the ledger


def test_the_ledger_equals_its_slow_twin(task, threat):
    model, data = task
    found = evaluate(Target(model), data, ATTACKS, threat, n=30, seed=5)
    rows = slow_ledger(model, data, ATTACKS, threat, n=30, seed=5)
    assert found.labels.tolist() == [row["label"] for row in rows]
    assert found.answers.tolist() == [row["answer"] for row in rows]
    for name in NAMES:
        columns = (
            found.fooled[name],
            found.step[name],
            found.restart[name],
            found.queries[name],
            found.fooled_8bit[name],
        )
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == [row[name] for row in rows[:30]]
    # and the task shows every kind of row
    assert 0 < int((~found.right).sum()) < 20
    assert 0 < sum(row["pgd-5"][0] and row["pgd-5"][1] >= 0 for row in rows[:30]) < 30
    robust = summarize(found, data.classes)
    for name in NAMES:
        assert robust.robust_accuracy[name] == sum(not row[name][0] for row in rows[:30]) / 30
        assert robust.robust_accuracy_8bit[name] == sum(not row[name][-1] for row in rows[:30]) / 30
    assert (
        robust.robust_accuracy["worst_case"] == sum(not any(row[name][0] for name in NAMES) for row in rows[:30]) / 30
    )
    in_8_bits = sum(not any(row[name][-1] for name in NAMES) for row in rows[:30]) / 30
    assert robust.robust_accuracy_8bit["worst_case"] == in_8_bits
    assert robust.clean_accuracy == sum(row["label"] == row["answer"] for row in rows) / 40


class Even(torch.nn.Module):
    """Class 1 where any pixel is no whole step of 8 bits: to be fooled by what no 8-bit image can hold."""

    def forward(self, images):
        steps = 255 * images.flatten(1)
        off = (steps - steps.detach().round()).abs().amax(1)
        return torch.stack([0.1 - off, off - 0.1], 1)


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_what_fools_only_between_two_8_bit_levels_is_said(task, threat, precision):
    _, data = task
    data = ImageSet(data.images[:9], torch.zeros(9, dtype=torch.int64), ("a", "b"))
    found = summarize(evaluate(Target(Even()), data, ATTACKS, threat, precision=precision), data.classes)
    assert found.robust_accuracy["worst_case"] == 0
    assert found.robust_accuracy_8bit == dict.fromkeys([*NAMES, "worst_case"], 1.0)


class Noisy(torch.nn.Module):
    """Draws from the global random state at every pass, as dropout left on does."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images + 0.02 * torch.randn_like(images))


def test_asking_about_8_bits_moves_no_result(task, threat, monkeypatch):
    """Whenever what is known is brought to the disk, and though the network draws random numbers."""
    model, data = task
    found = []
    for seconds in (-1.0, math.inf, 0.0):
        monkeypatch.setattr(robustness, "_FLUSH_SECONDS", seconds)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(evaluate(Target(Noisy(model)), data, [parse_attack("square-60")], threat, seed=5))
    for what in ("fooled", "queries", "step", "fooled_8bit"):
        first, *others = (getattr(one, what)["square-60"] for one in found)
        assert all(torch.equal(first, other) for other in others), what
    assert 0 < int(first.sum()) < 40


def test_pitfall_18_a_copy_is_measured_on_the_same_images_in_whatever_order_they_come(task):
    """Many are of the same brightness: mirrored ones, say."""
    _, data = task
    images = torch.cat([data.pixels().roll(shift, 3) for shift in range(7)])
    expected = robustness._some(images)
    assert len(expected) == 128
    for seed in range(3):
        turned = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
        assert torch.equal(robustness._some(turned), expected)
    assert torch.equal(robustness._some(images[:5])[names_of(images[:5]).argsort().argsort()], images[:5])
    assert len(robustness._some(images[:0])) == 0


def test_wrong_when_clean_is_not_attacked_and_not_robust(ledger):
    wrong = ~ledger.right
    assert wrong.any()
    for name in NAMES:
        assert ledger.fooled[name][wrong].all()
        assert (ledger.step[name][wrong] == -1).all()
        assert (ledger.queries[name][wrong] == 0).all()
        assert not ledger.margin[name][wrong].isfinite().any()
        assert ledger.margin[name][~wrong].isfinite().all()
        assert (ledger.queries[name][~wrong] > 0).all()
        assert not (ledger.survived(name) & wrong).any()


def test_the_denominator_is_every_attacked_image(ledger, task):
    _, data = task
    found = summarize(ledger, data.classes)
    assert found.robust_n == dict.fromkeys([*NAMES, "worst_case"], 40)
    assert found.n == 40
    for name in NAMES:
        survivors = int((~ledger.fooled[name]).sum())
        assert found.robust_accuracy[name] == survivors / 40
        assert found.robust_ci95[name] == wilson_interval(survivors, 40)
        assert found.robust_accuracy["worst_case"] <= found.robust_accuracy[name] <= found.clean_accuracy
    assert found.clean_ci95 == wilson_interval(int(ledger.right.sum()), 40)


def test_fewer_attacked_images_are_the_front_of_the_test_set(ledger, task, threat):
    model, data = task
    found = evaluate(Target(model), data, ATTACKS, threat, n=17, seed=5)
    assert torch.equal(found.answers, ledger.answers)  # clean verdicts are of all images
    for name in NAMES:
        assert torch.equal(found.fooled[name], ledger.fooled[name][:17])
        assert torch.equal(found.step[name], ledger.step[name][:17])
    robust = summarize(found, data.classes)
    assert robust.n == 40
    assert robust.robust_n["worst_case"] == 17
    too_many = evaluate(Target(model), data, ATTACKS[:1], threat, n=1000)
    assert len(too_many.fooled["fgsm"]) == 40


def test_the_seed_moves_the_starts(ledger, task, threat):
    model, data = task
    again, other = (evaluate(Target(model), data, ATTACKS, threat, seed=seed) for seed in (5, 6))
    assert torch.equal(again.margin["pgd-5"].nan_to_num(9, posinf=9), ledger.margin["pgd-5"].nan_to_num(9, posinf=9))
    assert not torch.equal(
        other.margin["pgd-5"].nan_to_num(9, posinf=9), ledger.margin["pgd-5"].nan_to_num(9, posinf=9)
    )
    assert torch.equal(other.fooled["fgsm"], ledger.fooled["fgsm"])  # starts at the image


def test_without_attacks_the_worst_case_is_clean(task, threat):
    model, data = task
    found = summarize(evaluate(Target(model), data, [], threat), data.classes)
    assert found.robust_accuracy == {"worst_case": found.clean_accuracy}


def test_no_images(task, threat):
    model, _ = task

    class Empty:
        def __len__(self):
            return 0

    with pytest.raises(AttackError, match="expected test images, got none"):
        evaluate(Target(model), Empty(), ATTACKS, threat)


def test_progress_rises_to_1_over_all_attacks(task, threat):
    model, data = task
    said = []
    evaluate(Target(model), data, ATTACKS, threat, on_progress=lambda *words: said.append(words))
    fractions = [fraction for fraction, _ in said]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert list(dict.fromkeys(name for _, name in said)) == list(NAMES)


# --- quantized networks: every image that stands one gradient through the rounding is tried with the other


def test_a_quantized_network_must_stand_both_gradients(task, threat):
    model, data = task
    network = quantize(model, QuantizeSpec(weight_bits=3, activation_bits=2), data.pixels())
    attack = parse_attack("pgd-5")
    found = evaluate(Target(network), data, [attack], threat, n=30, seed=5)
    standing = (predict(network, data.pixels()).argmax(1) == data.labels)[:30]
    queries, names = torch.zeros(30, dtype=torch.int64), names_of(data.pixels())
    fooled_by = {}
    for backward in ("pass_through", "clipped"):
        left = standing.nonzero()[:, 0]
        with attacking(network, backward):
            result = attack(network, data.pixels(left), data.labels[left], threat, seed=5, indices=names[left])
        queries[left] += result.queries
        standing[left[result.fooled]] = False
        fooled_by[backward] = int(result.fooled.sum())
    assert torch.equal(found.survived("pgd-5"), standing)
    assert torch.equal(found.queries["pgd-5"], queries)
    assert fooled_by["pass_through"] > 0
    said = []
    evaluate(Target(network), data, ATTACKS[:2], threat, on_progress=lambda fraction, _: said.append(fraction))
    assert said == sorted(said)
    assert said[-1] == 1


# --- the judge: verdicts are those of a deployed file


def test_a_judge_that_cannot_be_fooled(task, threat):
    model, data = task
    nearest = data.pixels().flatten(1)

    def judge(images):
        return data.labels[torch.cdist(images.flatten(1), nearest).argmin(1)]

    found = summarize(evaluate(Target(model, File(judge)), data, ATTACKS, threat), data.classes)
    assert found.clean_accuracy == 1
    assert set(found.robust_accuracy.values()) == {1.0}


def test_a_judge_that_is_always_wrong(task, threat):
    model, data = task
    found = evaluate(Target(model, File(lambda images: torch.full((len(images),), 9))), data, ATTACKS, threat)
    assert not found.right.any()
    for name in NAMES:
        assert found.fooled[name].all()
        assert (found.queries[name] == 0).all()
    assert summarize(found, data.classes).robust_accuracy["worst_case"] == 0


def test_a_judge_that_is_the_network_changes_nothing(task, threat, ledger):
    model, data = task
    found = evaluate(
        Target(model, File(lambda images: predict(model, images).argmax(1))), data, ATTACKS, threat, seed=5
    )
    for name in NAMES:
        assert torch.equal(found.fooled[name], ledger.fooled[name])
        assert torch.equal(found.step[name], ledger.step[name])


def test_fooled_means_that_the_file_is_fooled(task, threat):
    """A coarser file than its twin: every adversarial verdict must be the file's."""
    model, data = task
    file = quantize(model, QuantizeSpec(weight_bits=3, activation_bits=3, edge_bits=3), data.pixels())
    found = evaluate(
        Target(model, File(lambda images: predict(file, images).argmax(1))), data, [parse_attack("pgd-5")], threat
    )
    assert torch.equal(found.answers, predict(file, data.pixels()).argmax(1))
    right = found.right.nonzero()[:, 0]
    result = parse_attack("pgd-5")(
        model,
        data.pixels(right),
        data.labels[right],
        threat,
        indices=names_of(data.pixels(right)),
        judge=lambda images: predict(file, images).argmax(1),
    )
    fooled_file = predict(file, result.adversarial).argmax(1) != data.labels[right]
    assert torch.equal(found.fooled["pgd-5"][right], fooled_file)
    assert 0 < int(fooled_file.sum()) < len(right)


# --- worst case and classes, from ledgers made by hand


def by_hand(labels, answers, **fooled):
    columns = {name: torch.tensor(column, dtype=torch.bool) for name, column in fooled.items()}
    return Ledger(torch.tensor(labels), torch.tensor(answers), columns, fooled_8bit=columns)


def test_the_worst_case_is_point_wise():
    """Two attacks that break different halves leave nothing, although each alone leaves half."""
    found = summarize(
        by_hand([0, 1, 0, 1], [0, 1, 0, 1], first=[True, True, False, False], second=[False, False, True, True]),
        ("a", "b"),
    )
    assert found.robust_accuracy == {"first": 0.5, "second": 0.5, "worst_case": 0.0}


def test_a_wrong_clean_answer_breaks_the_worst_case_whatever_the_attacks_say():
    found = by_hand([0, 1], [0, 0], only=[False, False])
    assert found.survived("worst_case").tolist() == [True, False]


def test_attacks_on_fewer_images_shorten_the_worst_case():
    found = by_hand([0, 1, 0, 1], [0, 1, 0, 1], long=[False, True, False, False], short=[False, False])
    assert found.survived("worst_case").tolist() == [True, False]
    robust = summarize(found, ("a", "b"))
    assert robust.robust_n == {"long": 4, "short": 2, "worst_case": 2}
    assert robust.robust_accuracy == {"long": 0.75, "short": 1.0, "worst_case": 0.5}


@st.composite
def ledgers(draw):
    n = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    answers = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    columns = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True)):
        m = draw(st.integers(1, n))
        columns[name] = draw(st.lists(st.booleans(), min_size=m, max_size=m))
    return labels, answers, columns


@given(ledgers())
def test_summary_equals_counting_by_hand(drawn):
    labels, answers, columns = drawn
    found = summarize(by_hand(labels, answers, **columns), ("x", "y", "z"))
    part = min([len(labels), *map(len, columns.values())])
    survived = [labels[i] == answers[i] and not any(column[i] for column in columns.values()) for i in range(part)]
    assert found.n == len(labels)
    assert found.robust_n["worst_case"] == part
    assert found.robust_accuracy["worst_case"] == sum(survived) / part
    for index, name in enumerate("xyz"):
        members = [i for i in range(len(labels)) if labels[i] == index]
        attacked = [i for i in members if i < part]
        if not attacked:
            assert name not in found.per_class
            continue
        expected = {
            "n": len(members),
            "n_attacked": len(attacked),
            "clean": sum(labels[i] == answers[i] for i in members) / len(members),
            "worst_case": sum(survived[i] for i in attacked) / len(attacked),
        }
        assert found.per_class[name] == pytest.approx(expected)


def test_classes_add_up(ledger, task):
    _, data = task
    found = summarize(ledger, data.classes)
    assert list(found.per_class) == ["a", "b", "c", "d"]
    assert sum(row["n"] for row in found.per_class.values()) == 40
    for what, total in (("clean", found.clean_accuracy), ("worst_case", found.robust_accuracy["worst_case"])):
        weighted = sum(row["n"] * row[what] for row in found.per_class.values()) / 40
        assert weighted == pytest.approx(total)


# --- parquet


def test_parquet_holds_every_image(task, threat, tmp_path):
    model, data = task
    found = evaluate(Target(model), data, ATTACKS, threat, n=25)
    found.write(tmp_path / "ledger.parquet")
    table = pq.read_table(tmp_path / "ledger.parquet").to_pydict()
    assert table["image"] == list(range(40))
    assert table["label"] == found.labels.tolist()
    assert table["clean_answer"] == found.answers.tolist()
    assert table["clean_right"] == found.right.tolist()
    for name in NAMES:
        for what in ("fooled", "step", "restart", "queries", "fooled_8bit"):
            assert table[f"{name}:{what}"] == getattr(found, what)[name].tolist() + [None] * 15
        margins = table[f"{name}:margin"]
        assert margins[25:] == [None] * 15
        for read, kept in zip(margins, found.margin[name].tolist(), strict=False):
            assert read == kept or (math.isnan(read) and math.isnan(kept))
    assert len(table) == 5 + 10 * len(NAMES)


@pytest.mark.parametrize("margins", [(math.nan, 0.5), (0.5, math.nan)])
def test_a_margin_that_was_no_number_is_remembered(margins):
    """Such images are tried once more in float32."""
    ledger = Ledger(torch.tensor([0]), torch.tensor([0]), {}, seed=0)
    ledger.open("pgd-5", 1)
    for margin in margins:
        row = Row(False, -1, -1, 1, math.nan, margin, disputed=False, fooled_8bit=False)
        ledger.enter("pgd-5", 0, row, "pgd-5", last=False)
    assert math.isnan(ledger.margin["pgd-5"][0])
