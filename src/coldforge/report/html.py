"""``report.html``: one file that opens offline; a content security policy in it forbids any request to a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from coldforge.errors import RecipeError, StoreError
from coldforge.recipe import load_recipe, to_toml
from coldforge.records import LEAST_AGREEMENT, LatencyRecord, Record, StageRecord
from coldforge.report import text
from coldforge.report.charts import Chart, curve_charts, tradeoff_data
from coldforge.report.examples import Examples
from coldforge.report.plots import adversarial_figure, kind
from coldforge.report.table import (
    WORST,
    Speed,
    attacks,
    footnotes,
    is_unchecked,
    shown_speed,
    speed,
    subject,
    summary_columns,
    summary_rows,
)
from coldforge.report.verdict import headline, strongest
from coldforge.sealed import write_atomic


@dataclass(frozen=True)
class Card:
    """A key number."""

    title: str
    value: str
    unit: str
    note: str
    flag: str = ""


@dataclass(frozen=True)
class ClassBar:
    """Accuracies of one class, as fractions."""

    name: str
    n: int
    clean: float | None
    worst: float | None


@dataclass(frozen=True)
class Curves:
    """The charts of one training run."""

    label: str
    kind: str
    suspect: bool
    note: str
    charts: list[Chart]


def render_report(record: Record, examples_png: bytes | None = None) -> str:
    """The whole page as text: styles, scripts and images inside.

    Args:
        record: what was measured; the page shows nothing else.
        examples_png: the figure of adversarial examples (:func:`coldforge.report.plots.adversarial_figure`).
    """
    stage = subject(record)
    view: dict[str, Any] = {
        "record": record,
        "stage": stage,
        "suspect": record.is_suspect(stage),
        "headline": unbroken(headline(record)),
        "title": str(record.recipe.get("name") or "coldforge"),
        "description": str(record.recipe.get("description") or ""),
        "cards": list(_cards(record, stage)),
        "columns": summary_columns(record),
        "rows": summary_rows(record),
        "footnotes": footnotes(record),
        "several_n": len({item.n for item in record.stages}) > 1,
        "kinds": {item.label: kind(item) for item in record.stages},
        "tradeoff": tradeoff_data(record),
        "plotly": plotly_source(),
        "examples_png": base64.b64encode(examples_png).decode() if examples_png else "",
        "bars": _bars(stage),
        "curves": [_curves(record, item) for item in record.stages if item.curve],
        "asked": any(point.beyond_gradients >= 0 for item in record.stages for point in item.curve),
        "averaged": any(point.averaged_robust_accuracy >= 0 for item in record.stages for point in item.curve),
        "least_agreement": LEAST_AGREEMENT,
        "checked": [item for item in record.stages if item.masking.verdict != "not_run"],
        "unchecked": [
            item.label for item in record.stages if item.masking.verdict == "not_run" and item.robust_accuracy
        ],
        "latencies": [(item, speed(record, row)) for item in record.stages for row in item.latency_s],
        "attacks": [text.attack(name) for name in attacks(record)],
        "recipe_text": _recipe_text(record),
        "facts": facts(record.provenance),
        "flags": cpu_flags(record.provenance),
        "versions": mapping(record.provenance, "versions"),
        "stage_keys": mapping(record.provenance, "stage_keys"),
    }
    return environment().get_template("report.html").render(view)


def write_report(record: Record, out: str | Path, examples: Examples | None = None) -> Path:
    """Write ``report.html`` and, where there are examples, ``adversarial.png``; each whole or not at all.

    Args:
        record: what was measured.
        out: the folder; it is made if missing.
        examples: adversarial examples to draw.

    Returns:
        The path of ``report.html``.

    Raises:
        StoreError: where the folder cannot be written.
    """
    folder = Path(out)
    png = adversarial_figure(examples) if examples is not None else None
    page = render_report(record, png)
    if png is not None:
        write_page(folder / "adversarial.png", png)
    return write_page(folder / "report.html", page)


def write_page(target: Path, page: str | bytes) -> Path:
    """Write a page, or a picture of it, whole or not at all, and its folder if need be; returns its path.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, page)
    except OSError as error:
        raise StoreError(f"expected to write {target}, got: {error.strerror or error}") from error
    return target


@cache
def environment() -> Environment:
    """The templates of the pages, with the filters of :mod:`coldforge.report.text`."""
    made = Environment(
        loader=PackageLoader("coldforge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": text.percent,
        "interval": text.interval,
        "seconds": text.seconds,
        "duration": text.duration,
        "size": text.size,
        "millions": text.millions,
        "big": text.big,
        "times": text.times,
        "bits": text.bits,
        "attack": text.attack,
        "runtime": text.runtime,
        "energy": text.energy,
        "energy_mark": text.energy_mark,
        "digits3": text.digits3,
        "join_words": text.join,
        "throughput": _throughput,
    }
    made.globals |= {"text": text, "NONE": text.NONE}
    return made


def plotly_source() -> Markup:
    """The source of plotly.js; safe inside a script element."""
    from plotly.offline import get_plotlyjs

    return Markup(str(get_plotlyjs()).replace("</script", r"<\/script"))


def unbroken(sentence: str) -> Markup:
    """Escaped, with "84.5 %" and "PGD-20" kept on one line."""
    return Markup(re.sub(r"\d[\d.,]* %|\b[A-Z]+-\w+", r'<span class="nowrap">\g<0></span>', str(escape(sentence))))


def _throughput(row: LatencyRecord) -> str:
    return f"{row.batch / row.median:,.0f}" if row.median > 0 else text.NONE


# --- key numbers -----------------------------------------------------------------------------------------------------


def _cards(record: Record, stage: StageRecord) -> Iterator[Card]:
    base = record.stage("baseline")
    base = None if base is stage else base
    yield Card(
        "Clean accuracy",
        text.percent(stage.clean_accuracy),
        "%",
        f"baseline {text.percent(base.clean_accuracy)} %" if base else f"{stage.n:,} {record.images}",
    )
    key = WORST if WORST in stage.robust_accuracy else strongest(stage, record)
    if key is None:
        yield Card("Robust accuracy", text.NONE, "", "no attack was run", "not evaluated")
    else:
        note = f"{text.attack(key)}, {text.norm(record.threat_model.norm)} eps {text.eps(record.threat_model.eps)}"
        if base and key in base.robust_accuracy:
            note += f"; baseline {text.percent(base.robust_accuracy[key])} %"
        flags = {"suspect": record.is_suspect(stage), "literal threat model": not record.threat_model.box}
        flags["not checked"] = is_unchecked(stage)
        flags["validation images"] = record.images == "validation images"
        flag = ", ".join(name for name, raised in flags.items() if raised)
        yield Card("Robust accuracy", text.percent(stage.robust_accuracy[key]), "%", note, flag)
    yield _split_card("File", text.size(stage.size_bytes), _ratio(base, "size_bytes", stage, "smaller", "larger"))
    found = shown_speed(record, stage, 64) or shown_speed(record, stage, 1)
    if found is not None:
        row = found.latency
        title = "Latency, one image" if row.batch == 1 else f"Latency, batch {row.batch}"
        yield _split_card(title, text.seconds(row.median), _speed_note(found))
    yield _split_card("Multiply-adds", text.millions(stage.macs), _ratio(base, "macs", stage, "fewer", "more"))
    if stage.agreement is not None:
        least = min(stage.agreement.clean, stage.agreement.adversarial)
        flag = f"below {100 * LEAST_AGREEMENT:g} %" if least < LEAST_AGREEMENT else ""
        yield Card("Agreement with twin", f"{100 * least:.2f}", "%", "lower of clean and adversarial labels", flag)


def _split_card(title: str, shown: str, note: str) -> Card:
    value, _, unit = shown.partition(" ")
    return Card(title, value, unit, note)


def _ratio(base: StageRecord | None, name: str, stage: StageRecord, better: str, worse: str) -> str:
    mine = getattr(stage, name)
    theirs = getattr(base, name) if base else 0
    if not mine or not theirs:
        return ""
    shown = getattr(text, "size" if name == "size_bytes" else "millions")(theirs)
    if mine == theirs:
        return f"as the baseline ({shown})"
    ratio = theirs / mine
    return f"{text.times(ratio if ratio > 1 else 1 / ratio)} {better if ratio > 1 else worse}; baseline {shown}"


def _speed_note(found: Speed) -> str:
    name = text.runtime(found.latency.runtime)
    parts = []
    if found.speedup_eager is not None and found.speedup_eager != 1:
        parts.append(f"{text.times(found.speedup_eager)} vs dense in eager PyTorch")
    if found.speedup_same is not None and found.speedup_same != 1:
        parts.append(f"{text.times(found.speedup_same)} vs dense in {name}")
    return "; ".join(parts) or name


# --- parts of the page -----------------------------------------------------------------------------------------------


def _bars(stage: StageRecord) -> list[ClassBar]:
    return [
        ClassBar(name=name, n=round(found.get("n", 0)), clean=found.get("clean"), worst=found.get(WORST))
        for name, found in stage.per_class.items()
    ]


def _curves(record: Record, stage: StageRecord) -> Curves:
    count = len(stage.curve)
    note = f"{count} epoch{'s' if count > 1 else ''}"
    if stage.train_seconds > 0:
        note += f", {text.duration(stage.train_seconds)}"
    if stage.train_macs > 0:
        note += f", {text.big(stage.train_macs)} multiply-adds"
    return Curves(stage.label, kind(stage), record.is_suspect(stage), note, curve_charts(stage.curve, stage.label))


def _recipe_text(record: Record) -> str:
    """The recipe as TOML where this version of coldforge understands it, else as JSON."""
    try:
        return to_toml(load_recipe(record.recipe))
    except (RecipeError, TypeError, ValueError):
        return json.dumps(record.recipe, indent=2)


def mapping(provenance: dict[str, Any], key: str) -> dict[str, str]:
    """One table of the provenance, such as versions; empty where it has none."""
    found = provenance.get(key)
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def cpu_flags(provenance: dict[str, Any]) -> list[str]:
    """CPU flags in the provenance."""
    hardware = provenance.get("hardware")
    flags = hardware.get("flags", ()) if isinstance(hardware, dict) else ()
    return [str(flag) for flag in flags] if isinstance(flags, list | tuple) else []


def facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything plain in the provenance, as pairs for a list; what has a place of its own is left out."""
    own = {"versions", "stage_keys", "classes"}
    pairs: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if key in own:
            continue
        if isinstance(value, dict):
            pairs += [
                (f"{key}, {name}".replace("_", " "), str(part)) for name, part in value.items() if name != "flags"
            ]
        else:
            pairs.append((key.replace("_", " "), str(value)))
    return [(key, value) for key, value in pairs if value not in ("", "None")]
