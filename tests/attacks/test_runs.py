"""Runs that begin ahead of time change nothing that is reported: held against one after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from coldforge.attacks.runs import Runs

LENGTH = 4
"""Passes of a run without success."""
TABLES = st.integers(1, 4).flatmap(
    lambda runs: st.lists(st.lists(st.integers(1, LENGTH + 2), min_size=runs, max_size=runs), min_size=1, max_size=6)
)
"""For each image and run, the pass that succeeds; more than :data:`LENGTH`: none does."""


def one_after_the_other(table: list[list[int]], all_of_them: bool) -> list[tuple[int, int, float, bool]]:
    """Of each image the run that succeeded first, queries, smallest margin, and whether anything was disputed."""
    told = []
    for image, row in enumerate(table):
        winner, queries, margins, disputes = len(row), 0, [float("inf")], [False]
        for run, success in enumerate(row):
            if winner < len(row) and not all_of_them:
                break
            queries += LENGTH if all_of_them else min(success, LENGTH)
            margins.append(margin_of(image, run))
            disputes.append(disputed(image, run))
            winner = min(winner, run) if success <= LENGTH else winner
        told.append((winner, queries, min(margins), any(disputes)))
    return told


def margin_of(image: int, run: int) -> float:
    return float((7 * image + 5 * run) % 11)


def disputed(image: int, run: int) -> bool:
    return (image + 3 * run) % 4 == 1


def in_slots(table: list[list[int]], slots: int, all_of_them: bool) -> tuple[list[tuple[int, int, float, bool]], int]:
    """The same by a queue with so many slots; and the passes that it took."""
    runs = Runs(len(table), len(table[0]), all_of_them=all_of_them)
    busy: dict[int, list[int]] = {}
    finished: list[int] = []
    passes = 0
    while True:
        for slot in range(slots):
            if slot not in busy and (following := runs.next()) is not None:
                busy[slot] = [*following, 0]
        assert len({(image, run) for image, run, _ in busy.values()}) == len(busy)
        if not busy:
            break
        passes += 1
        for state in busy.values():
            image, run, _ = state
            state[2] += 1
            runs.queries[image, run] += 1
            runs.margin[image, run] = margin_of(image, run)
            runs.disputed[image, run] = disputed(image, run)
            succeeded = state[2] == table[image][run]
            if succeeded and bool(runs.open(torch.tensor([image]), torch.tensor([run]))[0]):
                assert runs.succeed(image, run)
            if state[2] == LENGTH or (succeeded and not all_of_them):
                runs.ended[image, run] = True
        over = [
            slot
            for slot, (image, run, _) in busy.items()
            if bool(runs.over(torch.tensor([image]), torch.tensor([run]))[0])
        ]
        finished += runs.leave([busy.pop(slot)[0] for slot in over]).tolist()
    assert sorted(finished) == list(range(len(table))), "every image is done once"
    queries, margin, disputes = runs.settled(torch.arange(len(table)))
    return list(zip(runs.winner.tolist(), queries.tolist(), margin.tolist(), disputes.tolist(), strict=True)), passes


@given(TABLES, st.integers(1, 9), st.booleans())
def test_what_is_reported_is_that_of_one_after_the_other(table: list[list[int]], slots: int, all_of_them: bool) -> None:
    assert in_slots(table, slots, all_of_them)[0] == one_after_the_other(table, all_of_them)


def test_later_runs_begin_where_slots_are_free() -> None:
    never = LENGTH + 1
    assert in_slots([[never] * 3] * 2, 6, False)[1] == LENGTH
    assert in_slots([[never] * 3] * 2, 2, False)[1] == 3 * LENGTH
    assert in_slots([[never] * 3], 6, True)[1] == 3 * LENGTH, "all of them: one after the other"
    assert in_slots([[never, 1, never]], 3, False)[1] == LENGTH, "an earlier one may still succeed"
    assert in_slots([[1, never, never]], 3, False)[1] == 1
