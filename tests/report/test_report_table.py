"""The table of stages and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from coldforge.records import LatencyRecord, MaskingRecord, Record, StageRecord
from coldforge.report.table import (
    attacks,
    footnotes,
    shown_speed,
    subject,
    summary_columns,
    summary_markdown,
    summary_rows,
    summary_table,
)
from coldforge.report.verdict import headline

Make = Callable[..., Record]


def shown(table: Table, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def changed(record: Record, name: str, **fields: Any) -> Record:
    """The record with some fields of one stage replaced."""
    stages = [
        StageRecord(**(dict(stage) | fields)) if stage.name == name else stage  # pydantic checks the new values
        for stage in record.stages
    ]
    return record.model_copy(update={"stages": tuple(stages)})


def test_rows_hold_the_records_numbers(make_record: Make) -> None:
    record = make_record()
    rows = {row.stage.name: row for row in summary_rows(record)}
    cells = rows["artifact"].cells
    assert (cells["clean"].text, cells["clean"].detail) == ("84.5", "83.8–85.2")
    assert (cells["pgd-20"].text, cells["pgd-20"].detail) == ("75.0", "74.2–75.9")
    assert cells["worst_case"].text == "75.0"
    assert cells["size"].text == "161 KB"
    assert cells["macs"].text == "2.48 M"
    assert cells["bits"].text == "w8 a8"
    assert (cells["energy"].text, cells["energy"].detail) == ("420 µJ", "estimated")
    assert rows["baseline"].cells["train"].text == "1 min 01 s"
    assert [row.stage.label for row in summary_rows(record)] == [stage.label for stage in record.stages]


def test_speedup_is_against_eager_pytorch_and_the_same_runtime(make_record: Make) -> None:
    record = make_record()
    artifact, baseline = record.stage("artifact"), record.stage("baseline")
    assert artifact is not None
    assert baseline is not None
    found = shown_speed(record, artifact, 64)
    assert found is not None
    assert found.speedup_eager == pytest.approx(19.0 / 1.5)
    assert found.speedup_same == pytest.approx(6.0 / 1.5)
    own = shown_speed(record, baseline, 64)
    assert own is not None
    assert own.latency.runtime == "pytorch"
    rows = {row.stage.name: row.cells for row in summary_rows(record)}
    assert (rows["artifact"]["latency_64"].text, rows["artifact"]["latency_64"].detail) == ("1.50 ms", "12.7×")
    assert rows["baseline"]["latency_64"].detail == "PyTorch"


def test_no_speedup_between_different_thread_counts(make_record: Make) -> None:
    row = LatencyRecord(runtime="onnxruntime", batch=64, threads=8, median=0.001, p10=0.001, p90=0.001)
    record = changed(make_record(), "artifact", latency_s=(row,))
    artifact = record.stage("artifact")
    assert artifact is not None
    found = shown_speed(record, artifact, 64)
    assert found is not None
    assert found.speedup is None
    assert "times faster" not in headline(record)


def test_attacks_follow_the_recipe_and_leave_out_worst_case(make_record: Make) -> None:
    assert attacks(make_record()) == ["fgsm", "pgd-20"]
    recipe = {"name": "x", "evaluate": {"attacks": ["pgd-20", "square", "fgsm"]}}
    assert attacks(make_record(recipe=recipe)) == ["pgd-20", "fgsm"]


def test_columns_without_any_number_are_left_out(make_record: Make, minimal_record: Record) -> None:
    keys = [column.key for column in summary_columns(make_record(latency=False))]
    assert "latency_64" not in keys
    assert "energy" in keys
    assert [column.key for column in summary_columns(minimal_record)] == [
        "label", "clean", "params", "macs", "size", "bits",
    ]  # fmt: skip


def test_a_different_n_is_said_in_the_cell(make_record: Make) -> None:
    record = changed(make_record(), "artifact", robust_n={"fgsm": 10_000, "pgd-20": 1_000, "worst_case": 1_000})
    cells = summary_rows(record)[4].cells
    assert cells["pgd-20"].detail.endswith("(n 1,000)")
    assert "(n" not in cells["fgsm"].detail


def test_suspect_is_never_shown_without_its_flag(make_record: Make, masking_suspect: MaskingRecord) -> None:
    record = make_record(masking=masking_suspect)
    for row in summary_rows(record):
        for key in ("fgsm", "pgd-20", "worst_case"):
            assert (row.cells[key].flag == "suspect") == row.suspect
    assert sum(row.suspect for row in summary_rows(record)) == 2
    for written in (shown(summary_table(record), 250), shown(summary_table(record, width=80), 80)):
        lines = [line for line in written.splitlines() if "artifact (int8 ONNX)" in line and "75.0" in line]
        assert lines
        assert all("75.0 suspect!" in line for line in lines)
    lines = [line for line in summary_markdown(record).splitlines() if "artifact (int8" in line and "|" in line]
    assert lines[0].count("(suspect)") == 3
    assert "do not rely on it" in headline(record)
    assert "suspect" not in headline(make_record())


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 160, 200])
def test_nothing_is_cut_off_in_a_terminal(make_record: Make, width: int) -> None:
    written = shown(summary_table(make_record(), width=width), width)
    if width >= 72:  # below that even the columns of rank 0 do not fit
        assert "…" not in written
        assert "84.5" in written
        assert "75.0" in written
        assert "161 KB" in written
    if width <= 120:
        assert "Left out at this width" in " ".join(written.split())


def test_the_wide_table_leaves_nothing_out(make_record: Make) -> None:
    written = shown(summary_table(make_record(), width=200), 200)
    assert "Left out" not in written
    assert all(word in written for word in ("params", "batch 1", "energy", "training", "12.7×", "32 min 12 s"))


def test_labels_are_text_and_not_markup(make_record: Make) -> None:
    record = changed(make_record(), "control", label="[red]evil[/red] | <b>")
    assert "[red]evil[/red]" in shown(summary_table(record), 250)
    markdown = summary_markdown(record)
    assert "\\| &lt;b>" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_literal_threat_model_is_said(make_record: Make) -> None:
    assert "may leave the image box" in summary_markdown(make_record(box=False))
    assert "may leave the image box" not in summary_markdown(make_record())


def test_headline_of_the_full_record(make_record: Make) -> None:
    assert headline(make_record()) == (
        "The artifact has 84.5 % clean accuracy (baseline 92.0 %: −7.5 points), holds 75.0 % in the worst case of all "
        "attacks (baseline 0.3 %), and is 13.7 times smaller and 12.7 times faster than the dense network in eager "
        "PyTorch (4.0 times faster with both in ONNX Runtime), at batch 64."
    )


def test_headline_without_artifact_or_attack(make_record: Make, minimal_record: Record) -> None:
    text = headline(make_record(artifact=False))
    assert text.startswith("No artifact was exported. The adversarially tuned network has 84.5 %")
    assert headline(minimal_record) == "The baseline network has 50.0 % clean accuracy; no attack was run."
    bare = changed(make_record(), "artifact", robust_accuracy={}, robust_n={}, robust_ci95={})
    assert "was not attacked, so that its robustness is unknown" in headline(bare)


def test_headline_is_honest_where_the_artifact_is_not_better(make_record: Make) -> None:
    slow = (LatencyRecord(runtime="onnxruntime", batch=64, threads=2, median=0.038, p10=0.03, p90=0.04),)
    worse = changed(
        make_record(),
        "artifact",
        clean_accuracy=0.1,
        size_bytes=4_412_000,
        latency_s=slow,
        robust_accuracy={"pgd-20": 0.004, "worst_case": 0.004},
        robust_ci95={"pgd-20": (0.003, 0.0055), "worst_case": (0.003, 0.0055)},
    )
    text = headline(worse)
    assert "falls to 10.0 % clean accuracy (baseline 92.0 %: −82.0 points)" in text
    assert "no measurable gain over the baseline's 0.3 %" in text
    assert "2.0 times larger and 2.0 times slower than the dense network" in text
    assert "6.3 times slower with both in ONNX Runtime" in text
    same = changed(make_record(), "artifact", size_bytes=2_206_000)
    assert "is about as large as and 12.7 times faster than the dense network" in headline(same)
    several = changed(make_record(), "artifact", robust_accuracy={"pgd-20": 0.75, "worst_case": 0.74})
    assert "holds 74.0 % in the worst case of all attacks (baseline 0.3 %)" in headline(several)
    better = changed(make_record(), "artifact", clean_accuracy=0.93)
    assert headline(better).startswith("The artifact reaches 93.0 %")


def test_subject_prefers_the_artifact_then_the_adversarial_arm(make_record: Make, minimal_record: Record) -> None:
    assert subject(make_record()).name == "artifact"
    assert subject(make_record(artifact=False)).label == "adversarially tuned"
    assert subject(minimal_record).name == "baseline"


def test_headline_says_where_robustness_fell(make_record: Make) -> None:
    """As that of a base that was trained adversarially may, when it is compressed."""
    tough = {"robust_accuracy": {"worst_case": 0.85}, "robust_ci95": {"worst_case": (0.84, 0.86)}}
    sentence = headline(changed(make_record(), "baseline", **tough))
    assert "falls to 75.0 % in the worst case of all attacks (baseline 85.0 %)" in sentence
    assert "no measurable gain" not in sentence


def test_an_unchecked_robust_accuracy_says_so(make_record: Make) -> None:
    record = changed(make_record(), "artifact", masking=MaskingRecord())
    assert headline(record).endswith(
        "The masking checks were not run: nothing says whether this robust accuracy holds."
    )
    assert any(line.startswith("Not checked (artifact (int8 ONNX)): The masking") for line in footnotes(record))
    assert "not run" not in headline(make_record())
    assert not any("Not checked" in line for line in footnotes(make_record()))


def test_what_is_left_of_the_images_found_in_8_bits_is_said(make_record: Make) -> None:
    record = changed(make_record(), "artifact", robust_accuracy_8bit={"pgd-20": 0.9, "worst_case": 0.8})
    found = next(line for line in footnotes(record) if "8-bit" in line)
    worst = record.stage("artifact").robust_accuracy["worst_case"]  # type: ignore[union-attr]
    assert found.startswith("The artifact's file: saved as 8-bit images inside the ball, the adversarial images found ")
    assert f"leave 80.0 % in place of {100 * worst:.1f} % (worst case)" in found
    assert not any("8-bit" in line for line in footnotes(make_record())), "older records do not know"


def test_8_bit_images_of_a_suspect_file_are_flagged(make_record: Make, masking_suspect: MaskingRecord) -> None:
    record = changed(make_record(masking=masking_suspect), "artifact", robust_accuracy_8bit={"worst_case": 0.8})
    (found,) = [line for line in footnotes(record) if "8-bit" in line]
    assert "(worst case, suspect)" in found


@pytest.mark.parametrize(("arm", "label"), [("adversarial", "adversarially tuned"), ("natural", "naturally tuned")])
def test_the_network_of_a_suspect_file_is_suspect(
    arm: str, label: str, make_record: Make, masking_suspect: MaskingRecord
) -> None:
    record = make_record(masking=masking_suspect)
    recipe = {**record.recipe, "deploy": {"arm": arm}}
    rows = summary_rows(record.model_copy(update={"recipe": recipe}))
    assert [row.stage.label for row in rows if row.suspect] == [label, "artifact (int8 ONNX)"]
