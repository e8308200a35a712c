"""What an evaluation says: as a terminal table, in a sentence, and as ``evaluation.html``, one self-contained page.

A robust accuracy never stands here without its flags: suspect, bounded by budget, literal threat model, unchecked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from coldforge.records import LEAST_AGREEMENT, AgreementRecord, EvaluationRecord, load_evaluation
from coldforge.report import text
from coldforge.report.html import Card, ClassBar, cpu_flags, environment, facts, mapping, unbroken, write_page
from coldforge.report.table import LITERAL, WORST

PAGE = "evaluation.html"
_GRADIENTS = {"pass_through": "with gradients through clipping", "clipped": "with plain gradients"}


@dataclass(frozen=True)
class Row:
    """One attack, the clean images, or the worst case."""

    key: str
    """"clean", "worst_case", or the attack's name."""
    name: str
    accuracy: float
    ci95: tuple[float, float]
    n: int
    broken: int | None
    """Images that were right when clean and are wrong under it; None for the clean ones."""
    broken_by: tuple[tuple[str, int], ...] = ()
    """What broke them, the most frequent first; empty where there was but one way."""
    flags: tuple[str, ...] = ()
    """Short warnings that must be shown with the accuracy."""


def rows(record: EvaluationRecord) -> list[Row]:
    """The clean images, every attack in the order in which they were run, and the worst case."""
    found = [Row("clean", "clean", record.clean_accuracy, record.clean_ci95, record.n, None)]
    part = record.attacked
    if part.n != record.n:
        found.append(Row("attacked", "clean, those attacked", part.clean_accuracy, part.clean_ci95, part.n, None))
    names = [name for name in record.robust_accuracy if name != WORST]
    found += [
        Row(
            name,
            text.attack(name),
            record.robust_accuracy[name],
            record.robust_ci95[name],
            record.robust_n[name],
            record.broken.get(name),
            _broken_by(record, name),
            tuple(flags(record, name)),
        )
        for name in [*names, WORST]
        if name in record.robust_accuracy
    ]
    return found


def _broken_by(record: EvaluationRecord, attack: str) -> tuple[tuple[str, int], ...]:
    found = sorted(record.broken_by.get(attack, {}).items(), key=lambda item: -item[1])
    return tuple((_by(name), count) for name, count in found) if [name for name, _ in found] != [attack] else ()


def _by(what: str) -> str:
    """What broke an image as people write it: the name of an attack, and the way, such as a kind of gradients."""
    first, _, rest = what.partition(" ")
    return " ".join(filter(None, (_GRADIENTS.get(first, text.attack(first)), _GRADIENTS.get(rest, rest))))


def flags(record: EvaluationRecord, attack: str = WORST) -> Iterator[str]:
    """What must be said wherever the robust accuracy under ``attack`` is shown, in a few words each."""
    if record.masking.verdict == "suspect":
        yield "suspect"
    if unfinished := _unfinished(record, attack):
        count, total = max(unfinished.values()), record.robust_n[attack]
        yield f"bounded by budget: {count:,} of {total:,} images not finished"
    if not record.threat_model.box:
        yield "literal threat model"
    if record.masking.verdict == "not_run":
        yield "not checked"


def _unfinished(record: EvaluationRecord, attack: str) -> dict[str, int]:
    """Attack to how many images it did not finish, of those that count for ``attack``."""
    return {name: count for name, count in record.unfinished.items() if count and attack in (WORST, name)}


def _short_flags(record: EvaluationRecord) -> str:
    return ", ".join(flag.partition(":")[0] for flag in flags(record))


def headline(record: EvaluationRecord) -> str:
    """The result in two sentences, from the record only; the flags stand in it."""
    threat = record.threat_model
    names = [text.attack(name) for name in record.robust_accuracy if name != WORST]
    under = "under " + (names[0] if len(names) == 1 else f"each of {text.join(names)}")
    raised = _short_flags(record)
    part = record.attacked
    of_these = f" (of the {part.n:,} attacked {text.percent(part.clean_accuracy)} %)" if part.n != record.n else ""
    return (
        f"{target_name(record)} is right on {text.percent(record.clean_accuracy)} % of {record.n:,} clean test "
        f"images{of_these}. It stays right on {text.percent(record.robust_accuracy[WORST])} %"
        f"{f' ({raised})' if raised else ''} of {part.n:,} {under}, for {text.norm(threat.norm)} perturbations up to "
        f"eps {text.eps(threat.eps)} ({text.eps_255(threat.eps_255)}); 95 % interval "
        f"{text.interval(record.robust_ci95[WORST])} %."
    )


def cautions(record: EvaluationRecord) -> Iterator[tuple[str, str]]:
    """What a reader of the robust accuracy must know: a word or two, and a sentence or two."""
    if record.masking.verdict == "suspect":
        yield "Suspect", "The masking checks found that this robust accuracy may not hold; do not rely on it."
    if found := _unfinished(record, WORST):
        total = f"{record.robust_n[WORST]:,}"
        parts = [
            f"{count:,} of {total} images were not finished by {text.attack(name)}" for name, count in found.items()
        ]
        yield (
            "Bounded by budget",
            f"In {_budget(record)}, {text.join(parts)}; these count as robust. With more time the robust accuracy can "
            "only fall: the same command with a larger --budget goes on from there.",
        )
    if not record.threat_model.box:
        yield "Literal threat model", LITERAL.partition(": ")[2].capitalize()
    if record.masking.verdict == "not_run":
        yield "Not checked", "The masking checks were not run: nothing says whether this robust accuracy holds."
    if record.target.kind == "onnx" and record.target.surrogate:
        yield (
            "Black box",
            "Gradients came from another network, the surrogate. An attack that knows this one can be stronger.",
        )
    elif record.target.kind == "onnx":
        yield (
            "Black box",
            "The attacks saw only this file's answers. An attack that knows the network can be much stronger, so this "
            "is a loose upper bound.",
        )


def _budget(record: EvaluationRecord) -> str:
    return text.duration(record.budget_s).removesuffix(" 00 s").removesuffix(" 00 min")


def footnotes(record: EvaluationRecord) -> list[str]:
    """What explains the table."""
    attacked = "all" if record.attacked.n == record.n else f"the first {record.attacked.n:,}"
    lines = [f"{record.n:,} test images, {attacked} of them attacked; 95 % Wilson intervals."]
    if disputed := max(record.disputed.values(), default=0):
        judge = "network in float32" if record.target.kind == "checkpoint" else "file"
        lines.append(
            f"{disputed:,} image{'' if disputed == 1 else 's'} fooled the network on which the attacks searched and "
            f"not the {judge}, which has the last word: not broken."
        )
    if record.agreement is not None:
        lines.append(_agreement(record.agreement))
    if WORST in record.robust_accuracy_8bit:
        worst, rounded = (part[WORST] for part in (record.robust_accuracy, record.robust_accuracy_8bit))
        found = text.in_8_bits(worst, rounded, _short_flags(record))
        lines.append(f"{found[0].upper()}{found[1:]}")
    if "autoattack-lite" in record.attacks:
        lines.append(text.LITE)
    return lines


def _agreement(found: AgreementRecord) -> str:
    said = (
        f"The file gives the label of the network beside it on {100 * found.clean:.2f} % of the clean images and "
        f"{100 * found.adversarial:.2f} % of PGD-20's last iterates"
    )
    if min(found.clean, found.adversarial) >= LEAST_AGREEMENT:
        return f"{said}."
    return f"{said}; at least {100 * LEAST_AGREEMENT:g} % of each was expected: gradients of this network may mislead."


def target_name(record: EvaluationRecord) -> str:
    """The last part of the path that was evaluated."""
    return Path(record.target.path).name or record.target.path


# --- terminal --------------------------------------------------------------------------------------------------------


def evaluation_table(record: EvaluationRecord) -> Table:
    """One line an attack, for the terminal."""
    table = Table(title=Text(target_name(record)), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for header in ("attack", "accuracy %", "95 % interval", "images", "broken", ""):
        table.add_column(header, justify="left" if header in ("attack", "") else "right", no_wrap=header != "")
    for row in rows(record):
        table.add_row(
            Text(row.name, overflow="fold"),
            text.percent(row.accuracy),
            text.interval(row.ci95),
            f"{row.n:,}",
            text.NONE if row.broken is None else f"{row.broken:,}",
            Text("\n".join(row.flags), style="bold red"),
            style="bold" if row.key == WORST else "",
        )
    return table


# --- the page --------------------------------------------------------------------------------------------------------


def render_evaluation(record: EvaluationRecord) -> str:
    """The whole page as text; it asks no network for anything and runs no script."""
    view: dict[str, Any] = {
        "record": record,
        "title": target_name(record),
        "headline": unbroken(headline(record)),
        "cautions": list(cautions(record)),
        "cards": list(_cards(record)),
        "rows": rows(record),
        "flags": list(flags(record)),
        "footnotes": footnotes(record),
        "short_flags": _short_flags(record),
        "bars": [
            ClassBar(name, round(found.get("n", 0)), found.get("clean"), found.get(WORST))
            for name, found in record.per_class.items()
        ],
        "meanings": list(_meanings(record)),
        "settings": [(text.attack(name), _settings(found)) for name, found in record.attacks.items()],
        "facts": list(_origin(record)) + facts(record.provenance),
        "cpu_flags": cpu_flags(record.provenance),
        "versions": mapping(record.provenance, "versions"),
    }
    return environment().get_template("evaluation.html").render(view)


def draw_evaluation(folder: str | Path) -> Path:
    """Write ``evaluation.html`` beside ``evaluation.json``, whole or not at all; returns its path.

    Raises:
        UsageError: the folder holds no evaluation.
        StoreError: it cannot be written.
    """
    return write_page(Path(folder) / PAGE, render_evaluation(load_evaluation(folder)))


def _cards(record: EvaluationRecord) -> Iterator[Card]:
    threat, target = record.threat_model, record.target
    yield Card(
        "Clean accuracy",
        text.percent(record.clean_accuracy),
        "%",
        _interval(record.clean_ci95) + f"; {record.n:,} images",
    )
    yield Card(
        "Robust accuracy",
        text.percent(record.robust_accuracy[WORST]),
        "%",
        _interval(record.robust_ci95[WORST]) + f"; worst case of {record.robust_n[WORST]:,} images",
        _short_flags(record),
    )
    yield Card("Perturbation", text.eps_255(threat.eps_255), text.norm(threat.norm), f"eps {text.eps(threat.eps)}")
    passed = record.masking.tally + ("; a black box" if record.masking.of_black_box else "")
    verdict = {"ok": "ok", "suspect": "suspect", "not_run": "not run"}[record.masking.verdict]
    yield Card("Masking checks", verdict, "", passed, "does it hold?" if verdict == "suspect" else "")
    kinds = {"folder": "file and its twin", "checkpoint": "network", "onnx": "black box"}
    bits = text.bits(target.weight_bits, target.activation_bits)
    yield Card("Target", bits, "", f"{kinds[target.kind]}; {text.size(target.size_bytes)}")
    budget = f"budget of the attacks: {_budget(record)}" if record.budget_s else ""
    yield Card("Time", text.duration(record.seconds), "", budget)


def _interval(ci95: tuple[float, float]) -> Markup:
    return Markup('<span class="nowrap">95 %: {} %</span>').format(text.interval(ci95))


_MEANINGS = {
    "fgsm": "One step along the sign of the gradient.",
    "pgd": "Many small steps along the gradient; after each, back into the ball of radius eps.",
    "apgd-ce": "PGD that chooses its step sizes itself.",
    "apgd-t": "The same, towards one wrong class after another, with a loss that scaling the answers cannot fool.",
    "fab": "Looks for the nearest image across the border of each wrong class.",
    "square": "Random squares; asks only for answers, and needs no gradients.",
    "autoattack": "The standard ensemble of Croce and Hein 2020: APGD-CE, APGD-T, FAB-T and Square.",
    "autoattack-lite": "APGD-CE, APGD-T and Square with fewer steps, targets and queries than AutoAttack, and weaker.",
    "transfer": "Images found on other networks, such as the float twin, tried on this one.",
}


def _meanings(record: EvaluationRecord) -> Iterator[tuple[str, str]]:
    """What the attacks of the record do, in a sentence each."""
    for name in record.robust_accuracy:
        family = max((key for key in _MEANINGS if f"{name}-".startswith(f"{key}-")), key=len, default=None)
        if family is not None:
            yield text.attack(name), _MEANINGS[family]


def _settings(described: dict[str, Any]) -> str:
    """The settings of an attack in a line: "PGD, version 1: steps 20, restarts 1"."""
    parts = described.get("parts")
    head = f"{described.get('attack', '')}, version {described.get('version', '?')}"
    if isinstance(parts, list):
        return f"{head}: " + "; then ".join(_settings(part) for part in parts)
    plain = [f"{key} {value}" for key, value in described.items() if key not in ("attack", "version", "label")]
    return f"{head}: {', '.join(plain)}" if plain else head


def _origin(record: EvaluationRecord) -> Iterator[tuple[str, str]]:
    for name, value in {**record.target.model_dump(), **{f"data {key}": v for key, v in record.data.items()}}.items():
        if value not in ("", None):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield name.replace("_", " "), shown
