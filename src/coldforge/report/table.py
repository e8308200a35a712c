"""The table of stages, for terminal, Markdown and page, from one list of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text

from coldforge.records import LatencyRecord, Record, StageRecord
from coldforge.report import text

WORST = "worst_case"
LITERAL = (
    "Literal threat model: adversarial images may leave the image box [0, 1]; this is the paper's literal protocol."
)
SUSPECT = "The masking checks call this robust accuracy suspect: do not rely on it."
UNCHECKED = "The masking checks were not run: nothing says whether this robust accuracy holds."


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    key: str
    header: str
    rank: int
    """Columns with the highest rank are left out first where the terminal is narrow."""


@dataclass(frozen=True)
class Cell:
    """What one column shows for one stage."""

    text: str
    detail: str = ""
    """The second line: a 95 % interval, a speed-up, a method."""
    flag: str = ""
    """A warning that must be shown with the text, such as "suspect"."""


@dataclass(frozen=True)
class Speed:
    """A latency of a stage, compared with the baseline at the same batch and threads."""

    latency: LatencyRecord
    speedup_eager: float | None
    """Against the baseline in eager PyTorch; None where that was not measured."""
    speedup_same: float | None
    """Against the baseline in the same runtime; None where that was not measured."""

    @property
    def speedup(self) -> float | None:
        """Against eager PyTorch where it was measured, else against the same runtime."""
        return self.speedup_same if self.speedup_eager is None else self.speedup_eager


@dataclass(frozen=True)
class SummaryRow:
    """One stage, with what each column shows."""

    stage: StageRecord
    suspect: bool
    """The masking verdict is suspect; robust cells then carry the flag."""
    cells: dict[str, Cell] = field(default_factory=dict)


# --- what the record says --------------------------------------------------------------------------------------------


def attacks(record: Record) -> list[str]:
    """Attacks run on any stage, in the recipe's order, without ``worst_case``."""
    found = dict.fromkeys(name for stage in record.stages for name in stage.robust_accuracy if name != WORST)
    evaluate = record.recipe.get("evaluate")
    listed = evaluate.get("attacks", ()) if isinstance(evaluate, dict) else ()
    order = [name for name in listed if name in found]
    return order + [name for name in found if name not in order]


def subject(record: Record) -> StageRecord:
    """The stage the report is about: the artifact, else the last of what was tuned, compressed or trained."""
    for name, word in (("artifact", ""), ("tuned", "adversarial"), ("tuned", ""), ("compressed", "")):
        found = record.stage(name, word)  # type: ignore[arg-type]
        if found is not None:
            return found
    return record.stages[0]


def is_unchecked(stage: StageRecord) -> bool:
    """True for an attacked artifact whose robust accuracy no masking check has looked at."""
    return stage.name == "artifact" and bool(stage.robust_accuracy) and stage.masking.verdict == "not_run"


def is_eager(row: LatencyRecord) -> bool:
    """True for a latency of a network in eager PyTorch."""
    return row.runtime in ("pytorch", "torch")


def speed(record: Record, row: LatencyRecord) -> Speed:
    """Compare one latency with the baseline's at the same batch and threads."""
    baseline = record.stage("baseline")
    peers = [
        peer
        for peer in (baseline.latency_s if baseline else ())
        if (peer.batch, peer.threads) == (row.batch, row.threads)
    ]
    eager = next((peer for peer in peers if is_eager(peer)), None)
    same = next((peer for peer in peers if peer.runtime == row.runtime), None)
    return Speed(
        latency=row,
        speedup_eager=eager.median / row.median if eager and row.median > 0 else None,
        speedup_same=same.median / row.median if same and row.median > 0 else None,
    )


def shown_speed(record: Record, stage: StageRecord, batch: int) -> Speed | None:
    """The latency the table shows: the baseline's in eager PyTorch, any other stage's in ONNX Runtime, if measured."""
    rows = [row for row in stage.latency_s if row.batch == batch]
    if not rows:
        return None
    wanted = "pytorch" if stage.name == "baseline" else "onnxruntime"
    return speed(record, next((row for row in rows if row.runtime == wanted), rows[0]))


# --- rows ------------------------------------------------------------------------------------------------------------


def summary_columns(record: Record) -> list[Column]:
    """The columns that at least one stage fills."""
    names = [*attacks(record), WORST]
    columns = [Column("label", "Stage", 0), Column("clean", "clean %", 0)]
    columns += [Column(name, f"{text.attack(name)} %", 0 if name == WORST else 3) for name in names]
    columns += [
        Column("params", "params", 5),
        Column("macs", "MACs", 2),
        Column("size", "size", 0),
        Column("bits", "bits", 1),
        Column("latency_1", "batch 1", 4),
        Column("latency_64", "batch 64", 1),
        Column("energy", "energy", 6),
        Column("train", "training", 2),
    ]
    rows = summary_rows(record)
    return [column for column in columns if any(row.cells[column.key].text != text.NONE for row in rows)]


def summary_rows(record: Record) -> list[SummaryRow]:
    """One row a stage, in the record's order. Accuracies are printed in per cent with one decimal."""
    names = [*attacks(record), WORST]
    rows = []
    for stage in record.stages:
        cells = {
            "label": Cell(stage.label),
            "clean": Cell(text.percent(stage.clean_accuracy), text.interval(stage.clean_ci95)),
            **{name: _robust_cell(record, stage, name) for name in names},
            "params": Cell(text.millions(stage.params)),
            "macs": Cell(text.millions(stage.macs)),
            "size": Cell(text.size(stage.size_bytes)),
            "bits": Cell(text.bits(stage.weight_bits, stage.activation_bits)),
            "latency_1": _latency_cell(stage, shown_speed(record, stage, 1)),
            "latency_64": _latency_cell(stage, shown_speed(record, stage, 64)),
            "energy": _energy_cell(stage),
            "train": Cell(text.duration(stage.train_seconds)),
        }
        rows.append(SummaryRow(stage=stage, suspect=record.is_suspect(stage), cells=cells))
    return rows


def _robust_cell(record: Record, stage: StageRecord, name: str) -> Cell:
    value = stage.robust_accuracy.get(name)
    if value is None:
        return Cell(text.NONE)
    detail = text.interval(stage.robust_ci95.get(name))
    count = stage.robust_n.get(name, stage.n)
    if count != stage.n:
        detail = f"{detail} (n {count:,})".strip()
    return Cell(text.percent(value), detail, "suspect" if record.is_suspect(stage) else "")


def _latency_cell(stage: StageRecord, found: Speed | None) -> Cell:
    if found is None:
        return Cell(text.NONE)
    name = "" if found.latency.runtime == "onnxruntime" else text.runtime(found.latency.runtime)
    factor = "" if stage.name == "baseline" else text.times(found.speedup)
    return Cell(text.seconds(found.latency.median), f"{factor} {name}".strip())


def _energy_cell(stage: StageRecord) -> Cell:
    if stage.energy_j_per_image is None:
        return Cell(text.NONE)
    return Cell(text.energy(stage.energy_j_per_image), text.energy_mark(stage.energy_method))


def footnotes(record: Record) -> list[str]:
    """What must be read together with the table: threat model, n, warnings."""
    threat = record.threat_model
    counts = {stage.n for stage in record.stages}
    attacked = {n for stage in record.stages for n in stage.robust_n.values()}
    part = f", {text.span(attacked)} of them attacked" if attacked and attacked != counts else ""
    lines = [f"{text.span(counts)} {record.images}{part}; 95 % Wilson intervals."]
    if attacks(record):
        lines[0] = (
            f"Robust: {text.norm(threat.norm)} perturbations up to eps {text.eps(threat.eps)} of the pixel range "
            f"({text.eps_255(threat.eps_255)}). {lines[0]}"
        )
        if not threat.box or "paper" in str(record.recipe.get("name", "")):
            lines.append(text.paper_eps(threat.eps))
        lines += [note for name, note in text.ATTACK_NOTES.items() if name in attacks(record)]
    artifact = record.stage("artifact")
    if artifact is not None and WORST in artifact.robust_accuracy_8bit:
        flag = "suspect" if record.is_suspect(artifact) else ""
        found = text.in_8_bits(artifact.robust_accuracy[WORST], artifact.robust_accuracy_8bit[WORST], flag)
        lines.append(f"The artifact's file: {found}")
    if any(stage.latency_s for stage in record.stages):
        eager = (base := record.stage("baseline")) is not None and any(is_eager(row) for row in base.latency_s)
        against = "the baseline in eager PyTorch" if eager else "the baseline in the same runtime"
        lines.append(
            "Latency: median of a whole batch, in ONNX Runtime unless named; "
            f"× is the speed-up against {against}, same threads."
        )
    if not threat.box:
        lines.append(LITERAL)
    labels = [stage.label for stage in record.stages if record.is_suspect(stage)]
    if labels:
        lines.append(f"Suspect ({text.join(labels)}): the masking checks failed; do not rely on these robust numbers.")
    lines += [f"Not checked ({stage.label}): {UNCHECKED}" for stage in record.stages if is_unchecked(stage)]
    return lines


# --- terminal --------------------------------------------------------------------------------------------------------


def summary_table(record: Record, *, width: int | None = None) -> Table:
    """The table of stages for the terminal.

    Args:
        record: what was measured.
        width: columns of the terminal; the least important columns that do not fit are left out, and named in the
            caption. None shows all.
    """
    rows = summary_rows(record)
    columns, dropped = _fit(summary_columns(record), rows, width)
    notes = footnotes(record)
    if dropped:
        notes.append(f"Left out at this width: {', '.join(dropped)}; report.html and record.json have them.")
    table = Table(
        title=Text(str(record.recipe.get("name", "coldforge"))),
        caption=Text("\n".join(notes)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    for column in columns:
        table.add_column(Text(column.header), justify="left" if column.key == "label" else "right", no_wrap=True)
    for row in rows:
        style = "bold" if row.stage.name == "artifact" else ""
        table.add_row(*(_rich_cell(row.cells[column.key]) for column in columns), style=style)
    return table


def _rich_cell(cell: Cell) -> Text:
    shown = Text(cell.text)
    if cell.flag:
        shown.append(f" {cell.flag}!", style="bold red")
    if cell.detail:
        shown.append(f"\n{cell.detail}", style="dim")
    return shown


def _fit(columns: list[Column], rows: list[SummaryRow], width: int | None) -> tuple[list[Column], list[str]]:
    """Leave out columns of the highest rank until the rest fits; those of rank 0 stay."""

    def needed(column: Column) -> int:
        lines = [column.header]
        for row in rows:
            lines += _rich_cell(row.cells[column.key]).plain.splitlines()
        return max(map(len, lines)) + 3  # two of padding, one of the rule

    kept, dropped = list(columns), list[str]()
    while width is not None and sum(map(needed, kept)) > width and any(column.rank for column in kept):
        last = max(reversed(kept), key=lambda column: column.rank)
        kept.remove(last)
        dropped.insert(0, last.header)
    return kept, dropped


# --- Markdown --------------------------------------------------------------------------------------------------------


def summary_markdown(record: Record) -> str:
    """A compact table in Markdown, for README and docs; ends with a newline."""
    rows = summary_rows(record)
    keys = ("params", "latency_1", "energy", "train")
    columns = [column for column in summary_columns(record) if column.key not in keys]
    lines = [
        "| " + " | ".join(column.header for column in columns) + " |",
        "|" + "|".join("---" if column.key == "label" else "---:" for column in columns) + "|",
    ]
    for row in rows:
        cells = []
        for column in columns:
            cell = row.cells[column.key]
            shown = _markdown(cell.text)
            if cell.flag:
                shown += f" ({cell.flag})"
            if column.key.startswith("latency") and cell.detail:
                shown += f" ({cell.detail})"
            cells.append(f"**{shown}**" if row.stage.name == "artifact" and column.key == "label" else shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *footnotes(record)]) + "\n"


def _markdown(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
