"""``report.html`` of a sweep: every trial in one self-contained page, to be sorted, filtered and questioned.

Drawn from the sweep's folder alone, finished or not. A robust accuracy that is suspect is flagged wherever it stands,
and is never among the Pareto-optimal ones.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coldforge._version import __version__
from coldforge.report import text
from coldforge.report.html import Card, environment, plotly_source, unbroken, write_page
from coldforge.report.sweep_answers import Answer, answers
from coldforge.report.sweep_panels import panels
from coldforge.report.sweep_rows import (
    KINDS,
    ROBUST,
    VERDICTS,
    attack_measures,
    failed_checks,
    mean_entries,
    measures,
    plot_data,
    single_entries,
    values_of,
)
from coldforge.report.table import LITERAL
from coldforge.sweep.table import Sweep, load_results, threat_models

PAGE = "report.html"


def draw_sweep(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a sweep, whole or not at all; returns its path.

    Raises:
        UsageError: the folder holds no sweep.
        StoreError: it cannot be written.
    """
    return write_page(Path(folder) / PAGE, render_sweep(load_results(folder)))


def render_sweep(sweep: Sweep) -> str:
    """The whole page as text: styles, scripts and images inside. A sweep without finished trials has a page too."""
    singles = single_entries(sweep)
    means = mean_entries(sweep) if len(sweep.seeds) > 1 else []
    plot = plot_data(sweep, singles, means)
    found = answers(sweep)
    axes = {
        axis: [(value, value or "not set") for value in values]
        for axis, values in values_of(sweep).items()
        if len(values) > 1
    }
    present = {entry.kind for entry in singles}
    view: dict[str, Any] = {
        "sweep": sweep,
        "version": __version__,
        "headline": unbroken(_headline(sweep, found)),
        "cards": list(_cards(sweep)),
        "notes": list(_notes(sweep)),
        "answers": found,
        "no_answer": _no_answer(sweep),
        "plot": plot,
        "plotly": plotly_source() if plot else "",
        "axes": axes,
        "kinds": {kind: words for kind, words in KINDS.items() if kind in present},
        "KINDS": KINDS,
        "verdicts": VERDICTS,
        "columns": measures(sweep),
        "ROBUST": ROBUST,
        "tables": {"single": singles, "mean": means},
        "suspects": len({entry.trials for entry in singles if entry.suspect}),
        "failed_checks": failed_checks(sweep.rows),
        "panels": [(panel, base64.b64encode(panel.png).decode()) for panel in panels(sweep, mean_entries(sweep))],
        "waiting": _waiting(sweep),
        "chosen_on": any(row["images"] == "validation images" for row in sweep.rows),
    }
    return environment().get_template("sweep.html").render(view)


# --- in words --------------------------------------------------------------------------------------------------------


def _waiting(sweep: Sweep) -> list[str]:
    """Labels of trials that are neither finished nor lost."""
    gone = {*sweep.finished, *_lost(sweep)}
    return [label for trial, label in sweep.labels.items() if trial not in gone]


def _lost(sweep: Sweep) -> set[str]:
    """Trials that cannot be finished; one that was finished before its stages were lost counts as finished."""
    return {trial for failure in sweep.failures for trial in failure.trials} - set(sweep.finished)


def _all_suspect(sweep: Sweep) -> bool:
    verdicts = [row["masking"] for row in sweep.rows if row["name"] == "artifact" and ROBUST in row]
    return bool(verdicts) and set(verdicts) == {"suspect"}


def _no_answer(sweep: Sweep) -> str:
    """Why no robust accuracy of an artifact can be named, where none can."""
    if len(threat_models(sweep.rows)) > 1:
        return "they are of several threat models"
    return "the masking verdict of each is suspect" if _all_suspect(sweep) else "none was attacked"


def _headline(sweep: Sweep, found: list[Answer]) -> str:
    if not sweep.rows:
        return f"No trial of {sweep.trials} is finished yet."
    finished = len(sweep.finished)
    start = f"{finished} of {sweep.trials} trials {'is' if finished == 1 else 'are'} finished."
    if not found:
        return f"{start} No robust accuracy of an artifact can be named: {_no_answer(sweep)}."
    best, rest = found[0], found[1:]
    kept = f"{best.robust.partition(' (')[0]} (worst case{f', {best.flag}' if best.flag else ''})"
    words = [f"{start} The most robust artifact keeps {kept}: {best.label}."]
    smallest = next((answer for answer in rest if answer.question.startswith("Smallest")), None)
    if smallest is not None and smallest.trial != best.trial:
        flag = f" ({smallest.flag})" if smallest.flag else ""
        words.append(
            f"The smallest file close to it keeps {smallest.robust.partition(' (')[0]}{flag} in {smallest.facts[1]}: "
            f"{smallest.label}."
        )
    return " ".join(words)


def _cards(sweep: Sweep) -> Iterator[Card]:
    finished, lost = len(sweep.finished), len(_lost(sweep))
    waiting = len(_waiting(sweep))
    parts = [f"{lost} failed" if lost else "none failed", f"{waiting} to do" if waiting else ""]
    flag = "see failures" if lost or sweep.failures else ""
    yield Card("Trials finished", str(finished), f"of {sweep.trials}", ", ".join(filter(None, parts)), flag)
    shown = ", ".join(map(str, sweep.seeds[:5])) + (" …" if len(sweep.seeds) > 5 else "")
    yield Card("Seeds", str(len(sweep.seeds)), "", f"seed{'s' if len(sweep.seeds) > 1 else ''} {shown}")
    yield from _threat_cards(sweep)
    if sweep.rows:
        counts = [int(row["n_attacked"]) for row in sweep.rows if row["n_attacked"]]
        names = [m.key.removeprefix("robust:") for m in attack_measures(sweep) if m.key != ROBUST]
        note = f"under {text.join([text.attack(name) for name in names])}" if names else "no attack was run"
        clean = text.span([row["n"] for row in sweep.rows])
        yield Card("Images attacked", text.span(counts) if counts else text.NONE, "", f"{note}; clean: {clean}")
    if sweep.stages.get("macs_alone"):
        saved = 1 - sweep.stages["macs"] / sweep.stages["macs_alone"]
        note = f"multiply-adds; {sweep.stages['distinct']:g} stages in place of {sweep.stages['alone']:g}"
        yield Card("Saved by sharing", f"{100 * saved:.0f}", "%", note)


def _threat_cards(sweep: Sweep) -> Iterator[Card]:
    threats = threat_models(sweep.rows)
    if not threats:
        return
    flag = "" if all(box for *_, box in threats) else "literal threat model"
    if len(threats) == 1:
        norm, eps, eps_255, _ = threats[0]
        yield Card("Threat model", text.eps_255(eps_255), text.norm(norm), f"eps {text.eps(eps)}", flag)
        return
    shown = ", ".join(f"{text.norm(norm)} {text.eps(eps)}{'' if box else ' no box'}" for norm, eps, _, box in threats)
    yield Card("Threat models", str(len(threats)), "", f"eps {shown}; compare within one only", flag or "not the same")


def _notes(sweep: Sweep) -> Iterator[str]:
    """What must be read together with the numbers."""
    yield (
        "Accuracies of single trials stand with 95 % Wilson intervals: the luck of the test images. Means stand with "
        "the standard deviation over seeds: the luck of the training."
    )
    if any(row["masking"] == "suspect" for row in sweep.rows):
        yield (
            "Suspect: the masking checks failed; do not rely on these robust accuracies. The network that a suspect "
            "file was exported from is called suspect like the file."
        )
    if any(row["masking"] == "not_run" and ROBUST in row for row in sweep.rows):
        yield "Not checked: the masking checks were not run on this network; its robust accuracy is an upper bound."
    if any(not row["threat_model:box"] for row in sweep.rows):
        yield LITERAL
    names = {m.key.removeprefix("robust:") for m in attack_measures(sweep)}
    yield from (note for name, note in text.ATTACK_NOTES.items() if name in names)
