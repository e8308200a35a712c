"""What the ledger of an evaluation says of its own attacks."""

from __future__ import annotations

import pytest
import torch

from coldforge.attacks import parse_attack
from coldforge.evaluate import TRANSFER, Ledger, ledger_check
from coldforge.records import MaskingCheckRecord, MaskingRecord

N = 200
ENSEMBLE = [parse_attack("autoattack")]


def ledger(broken: dict[str, dict[str, int]], *, right: int = N, unfinished: int = 0) -> Ledger:
    """Attack to what broke how many images: others each, from the first one on."""
    found = Ledger(torch.zeros(N, dtype=torch.int64), (torch.arange(N) >= right).long())
    for attack, parts in broken.items():
        found.open(attack, N)
        found.finished[attack][:] = torch.arange(N) < N - unfinished
        found.finished[attack][: sum(parts.values())] = True
        image = 0
        for by, count in parts.items():
            for _ in range(count):
                found.fooled[attack][image], found.by[attack][image] = True, by
                image += 1
    return found


@pytest.mark.parametrize(("alone", "passed"), [(0, True), (12, True), (13, False)])
def test_square_on_the_file_may_break_little_that_gradients_leave(alone, passed):
    by = {"apgd-ce pass_through": 60, "fab-t clipped": 3, "square on the file": alone}
    found = ledger_check(ledger({"autoattack": by}), ENSEMBLE)
    assert found is not None
    assert (found.name, found.value, found.passed) == ("beyond_gradients", alone / N, passed)
    assert passed or "BPDA" in found.meaning


def test_transfer_counts_with_it_and_not_where_gradients_broke_the_image_too():
    by = {"autoattack": {"apgd-ce": 60}, TRANSFER: {"from its float parent": 90}}
    assert ledger_check(ledger(by), ENSEMBLE).value == 30 / N


def test_attacks_that_stand_alone_are_known_by_their_column():
    columns = {"apgd-t": {"apgd-t": 40}, "square": {"on the file": 70}}
    found = ledger_check(ledger(columns), [parse_attack("apgd-t"), parse_attack("square")])
    assert found.value == 30 / N
    assert not found.passed
    assert found.meaning.startswith("Square fooled 30 of 200 images")


@pytest.mark.parametrize(
    ("broken", "attacks", "changes"),
    [
        ({"fgsm": {"fgsm": 9}, "square": {"on the file": 99}}, ["fgsm", "square"], {}),  # one step is not strong
        ({"pgd-20": {"pgd-20": 9}, "square": {"on the file": 99}}, ["pgd-20", "square"], {}),  # nor one loss
        ({"apgd-t": {"apgd-t": 9}}, ["apgd-t"], {}),  # nothing else was tried
        ({"square": {"on the file": 99}}, ["square"], {}),
        ({"autoattack": {"square on the file": 40}}, ["autoattack"], {"right": 49}),
        (
            {"autoattack": {"square on the file": 40}},
            ["autoattack"],
            {"unfinished": 1},
        ),  # Square was cut off: only its victims are known
    ],
)
def test_where_nothing_can_be_said_nothing_is(broken, attacks, changes):
    assert ledger_check(ledger(broken, **changes), [parse_attack(name) for name in attacks]) is None


def test_what_was_wrong_when_clean_does_not_count():
    found = ledger_check(ledger({"autoattack": {"square on the file": 40}}, right=100), ENSEMBLE)
    assert found.value == 40 / 100


def test_a_ledger_on_disk_says_the_same(tmp_path):
    whole = ledger({"autoattack": {"apgd-ce": 60, "square on the file": 20}, TRANSFER: {"from its float twin": 9}})
    whole.write(tmp_path / "ledger.parquet")
    read = Ledger.read(tmp_path / "ledger.parquet")
    assert torch.equal(read.right, whole.right)
    assert read.by == whole.by
    for attack in whole.fooled:
        assert torch.equal(read.fooled[attack], whole.fooled[attack])
        assert torch.equal(read.finished[attack], whole.finished[attack])
    assert ledger_check(read, ENSEMBLE) == ledger_check(whole, ENSEMBLE)


def test_one_more_check_can_only_raise_suspicion():
    passed = MaskingCheckRecord(name="beyond_gradients", passed=True, value=0.0, threshold=0.06, meaning="fine")
    failed = passed.model_copy(update={"passed": False, "value": 0.3})
    ok, unknown = MaskingRecord(verdict="ok", checks=(passed,)), MaskingRecord()
    assert ok.and_also(None) == ok
    assert ok.and_also(passed) == MaskingRecord(verdict="ok", checks=(passed, passed))
    assert ok.and_also(failed) == MaskingRecord(verdict="suspect", checks=(passed, failed))
    assert ok.and_also(failed).failed == (failed,)
    assert ok.and_also(failed).and_also(passed).verdict == "suspect"
    assert unknown.and_also(passed) == unknown
    assert unknown.and_also(failed) == MaskingRecord(verdict="suspect", checks=(failed,))
