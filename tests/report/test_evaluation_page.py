"""evaluation.html and its table: every number of the record, and none without its flags."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coldforge.evaluate import wilson_interval
from coldforge.records import (
    AgreementRecord,
    AttackedRecord,
    EvaluationRecord,
    MaskingCheckRecord,
    MaskingRecord,
    TargetRecord,
    ThreatModelRecord,
    load_evaluation,
)
from coldforge.report import text
from coldforge.report.evaluation import (
    cautions,
    draw_evaluation,
    evaluation_table,
    flags,
    headline,
    render_evaluation,
    rows,
)
from coldforge.report.folder import draw_any
from coldforge.report.verdict import verdict_lines

N, ATTACKED, RIGHT = 10_000, 1000, 845
CLASSES = ("T-shirt/top", "Trouser", "Bag")
CHECKS = (
    MaskingCheckRecord(name="zero gradients", passed=True, value=0.004, threshold=0.1, meaning="Gradients are there."),
    MaskingCheckRecord(name="square", passed=True, value=0.0, threshold=0.02, meaning="Square breaks no more."),
)
FAILED = MaskingCheckRecord(name="square", passed=False, value=0.18, threshold=0.02, meaning="Square breaks more.")
OK = MaskingRecord(verdict="ok", checks=CHECKS)
SUSPECT = MaskingRecord(verdict="suspect", checks=(CHECKS[0], FAILED))
PARTS = [{"attack": "APGD", "version": 1, "steps": 30}, {"attack": "Square", "version": 1, "steps": 500}]


def sample(**changes: Any) -> EvaluationRecord:
    """A run's folder, attacked by four attacks."""
    standing = {"fgsm": 771, "pgd-20": 733, "autoattack-lite": 712, "transfer": 790, "worst_case": 709}
    fields: dict[str, Any] = {
        "coldforge_version": "0.1.0",
        "provenance": {"command": "coldforge evaluate run", "hardware": {"cpu": "EPYC", "flags": ["avx2"]}, "seed": 0},
        "target": TargetRecord(
            path="results/run", sha256="ab" * 32, kind="folder", architecture="zoo:cnn8", weight_bits=8,
            activation_bits=8, size_bytes=161_300,
        ),
        "data": {"source": "fashion-mnist", "test": N, "classes": list(CLASSES)},
        "threat_model": ThreatModelRecord(norm="linf", eps=0.1, eps_255=25.5, box=True),
        "n": N,
        "clean_accuracy": 0.8448,
        "clean_ci95": wilson_interval(8448, N),
        "attacked": AttackedRecord(n=ATTACKED, clean_accuracy=0.845, clean_ci95=wilson_interval(RIGHT, ATTACKED)),
        "robust_accuracy": {name: count / ATTACKED for name, count in standing.items()},
        "robust_n": dict.fromkeys(standing, ATTACKED),
        "robust_ci95": {name: wilson_interval(count, ATTACKED) for name, count in standing.items()},
        "robust_accuracy_8bit": {"worst_case": 0.7123},
        "broken": {name: RIGHT - count for name, count in standing.items()},
        "broken_by": {
            "fgsm": {"clipped": 4, "pass_through": 70},
            "autoattack-lite": {"apgd-ce-30 pass_through": 132, "square-500 on the file": 1},
            "transfer": {"from its float twin": 55},
        },
        "per_class": {name: {"n": 100.0, "clean": 0.9, "worst_case": 0.6 + 0.1 * i} for i, name in enumerate(CLASSES)},
        "seconds": 611.2,
        "masking": OK,
        "attacks": {
            "fgsm": {"attack": "PGD", "version": 1, "label": "fgsm", "steps": 1},
            "pgd-20": {"attack": "PGD", "version": 1, "label": "pgd-20", "steps": 20},
            "autoattack-lite": {"attack": "Ensemble", "version": 1, "parts": PARTS},
        },
    }  # fmt: skip
    return EvaluationRecord(**fields | changes)


def black_box(surrogate: str = "") -> EvaluationRecord:
    target = sample().target.model_copy(update={"path": "net.onnx", "kind": "onnx", "surrogate": surrogate})
    return sample(target=target, masking=MaskingRecord())


BOUNDED: dict[str, Any] = {"unfinished": {"autoattack-lite": 212}, "budget_s": 1200.0}
LITERAL: dict[str, Any] = {"threat_model": ThreatModelRecord(norm="linf", eps=0.1, eps_255=25.5, box=False)}


class Page(HTMLParser):
    """Elements, the text, and the cells of the table of attacks."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.rows: dict[str, dict[str, str]] = {}
        self._style = False
        self._row = self._column = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        self._style = tag in ("style", "script")
        if tag not in ("span", "b", "strong", "code", "a"):
            self.words.append(" ")
        if tag == "tr":
            self._row = found.get("data-attack", "")
            self.rows.setdefault(self._row, {})
        if tag in ("td", "th"):
            self._column = found.get("data-column", "name")

    def handle_endtag(self, tag: str) -> None:
        self._style = self._style and tag not in ("style", "script")
        self._row = "" if tag == "tr" else self._row

    def handle_data(self, data: str) -> None:
        if self._style:
            return
        self.words.append(data)
        if self._row:
            before = self.rows[self._row].get(self._column, "")
            self.rows[self._row][self._column] = " ".join(f"{before} {data}".split())

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def printed(record: EvaluationRecord, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evaluation_table(record))
    return console.export_text()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_part() -> None:
    record = sample(notes=("the network is unusual",))
    page = Page(render_evaluation(record))
    assert headline(record) in page.text
    titles = [
        "Key numbers", "Attacks", "Does it hold?", "By class", "Notes", "What the words mean", "Provenance",
    ]  # fmt: skip
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    for words in ("84.5 %", "25.5/255", "w8 a8", "10 min 11 s", "2 of 2 passed", "Gradients are there.", "Bag",
                  "the network is unusual", "EPYC", "ab" * 32, "zoo:cnn8", "avx2", "Weakest: T-shirt/top, 60.0 %",
                  "Ensemble, version 1: APGD, version 1: steps 30; then Square, version 1: steps 500"):  # fmt: skip
        assert words in page.text, words


def test_the_table_is_the_record() -> None:
    record = sample()
    page = Page(render_evaluation(record))
    shown = {key: cells for key, cells in page.rows.items() if key}
    assert list(shown) == ["clean", "attacked", *record.robust_accuracy]
    assert shown["clean"]["n"] == "10,000"
    assert shown["attacked"]["accuracy"] == "84.5"
    for name, value in record.robust_accuracy.items():
        cells = shown[name]
        assert cells["accuracy"] == text.percent(value)
        assert cells["interval"] == text.interval(record.robust_ci95[name])
        assert cells["n"] == "1,000"
        assert cells["broken"].split()[0] == str(record.broken[name])
    assert shown["fgsm"]["broken"] == "74 70 with gradients through clipping 4 with plain gradients"
    assert shown["autoattack-lite"]["broken"].endswith("1 Square-500 on the file")
    terminal = printed(record)
    for row in rows(record):
        assert re.search(rf"{re.escape(row.name)} +{text.percent(row.accuracy)} +{text.interval(row.ci95)}", terminal)


def test_where_all_images_were_attacked_clean_stands_once() -> None:
    part = AttackedRecord(n=N, clean_accuracy=0.8448, clean_ci95=wilson_interval(8448, N))
    assert [row.key for row in rows(sample(attacked=part))][:2] == ["clean", "fgsm"]
    assert "of the" not in headline(sample(attacked=part)).partition(".")[2].partition(" It ")[0]


def test_the_record_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    record = sample(masking=SUSPECT, **BOUNDED)
    (tmp_path / "evaluation.json").write_text(record.to_json())
    assert load_evaluation(tmp_path) == record
    target = draw_evaluation(tmp_path)
    assert draw_any(tmp_path) == target
    assert target == tmp_path / "evaluation.html"
    assert target.read_text() == render_evaluation(record)


# --- flags -----------------------------------------------------------------------------------------------------------

FLAGGED = [
    ({"masking": SUSPECT}, "suspect", "Suspect."),
    ({"masking": MaskingRecord()}, "not checked", "Not checked."),
    (LITERAL, "literal threat model", "Literal threat model."),
]


@pytest.mark.parametrize(("changes", "flag", "title"), FLAGGED, ids=[flag for _, flag, _ in FLAGGED])
def test_no_robust_accuracy_stands_without_its_flag(changes: dict[str, Any], flag: str, title: str) -> None:
    record = sample(**changes)
    page = Page(render_evaluation(record))
    for name in record.robust_accuracy:
        assert flag in page.rows[name]["name"], name
    assert flag not in page.rows["clean"]["name"]
    assert f"70.9 % ({flag}) of 1,000" in headline(record)
    assert f"Robust accuracy 70.9 % {flag}" in page.text
    assert f"robust (worst case) {flag}" in page.text
    assert title in page.text
    for line in printed(record).splitlines():
        if any(text.percent(value) in line for value in record.robust_accuracy.values()):
            assert flag in line
    assert flag not in Page(render_evaluation(sample())).text.replace("Not run", "")


def test_a_budget_that_ran_out_flags_the_attack_and_the_worst_case_only() -> None:
    record = sample(**BOUNDED)
    page = Page(render_evaluation(record))
    words = "bounded by budget: 212 of 1,000 images not finished"
    assert {key for key, cells in page.rows.items() if words in cells.get("name", "")} == {
        "autoattack-lite",
        "worst_case",
    }
    assert "70.9 % (bounded by budget) of 1,000" in headline(record)
    whole = "In 20 min, 212 of 1,000 images were not finished by AA-lite; these count as robust"
    assert whole in page.text
    assert whole in dict(cautions(record))["Bounded by budget"]
    assert list(flags(record, "fgsm")) == []
    assert "budget" not in Page(render_evaluation(sample())).text


def test_several_attacks_that_ran_out_of_budget_are_all_named() -> None:
    record = sample(unfinished={"pgd-20": 5, "autoattack-lite": 212}, budget_s=90.0)
    (sentence,) = [words for title, words in cautions(record) if title == "Bounded by budget"]
    assert "5 of 1,000 images were not finished by PGD-20 and 212 of 1,000 images" in sentence
    assert sentence.startswith("In 1 min 30 s, ")


def test_suspect_names_the_failed_checks_first() -> None:
    source = render_evaluation(sample(masking=SUSPECT))
    words = Page(source).text
    assert words.index("square ✗ failed 0.180 0.0200 Square breaks more.") < words.index("zero gradients ✓ passed")
    assert 'href="#masking"' in source
    lines = verdict_lines(SUSPECT)
    assert lines[0] == "Masking checks: suspect; 1 of 2 passed."
    assert lines[1:] == ["  failed: square: 0.180 against 0.0200. Square breaks more."]
    assert verdict_lines(OK) == ["Masking checks: ok; 2 of 2 passed."]
    assert verdict_lines(MaskingRecord()) == ["Masking checks: not run."]


def test_a_black_box_is_not_called_ok_without_a_word() -> None:
    closed = MaskingCheckRecord(name="differentiable", passed=True, value=0.0, threshold=1.0, meaning="A black box.")
    masking = MaskingRecord(verdict="ok", checks=(*CHECKS, closed))
    assert verdict_lines(masking) == ["Masking checks: ok, as far as a black box can be asked; 3 of 3 passed."]
    assert (
        "Ok, as far as a black box can be asked. There are no gradients"
        in Page(render_evaluation(sample(masking=masking))).text
    )
    assert "black box" not in Page(render_evaluation(sample())).text


def test_accuracies_by_class_of_other_images_are_told_apart() -> None:
    said = "Clean: of all 10,000 test images; robust: of the 1,000 that were attacked"
    assert said in Page(render_evaluation(sample())).text
    everything = sample(n=ATTACKED, robust_n=dict.fromkeys(sample().robust_accuracy, ATTACKED))
    assert "Clean: of all" not in Page(render_evaluation(everything)).text


def test_the_lite_cascade_is_never_called_autoattack() -> None:
    record = sample()
    words = Page(render_evaluation(record)).text
    assert "AA-lite" in words
    for sentence in re.findall(r"[^.:]*\bAutoAttack\b[^.]*\.", words):
        assert re.search(r"weaker|not be compared", sentence), sentence
    whole = {name: value for name, value in record.robust_accuracy.items() if "lite" not in name}
    standard = sample(
        robust_accuracy=whole | {"autoattack": 0.7}, attacks={"autoattack": {"attack": "Ensemble"}},
        robust_n=dict.fromkeys([*whole, "autoattack"], ATTACKED),
        robust_ci95=dict.fromkeys([*whole, "autoattack"], (0, 1)),
    )  # fmt: skip
    words = Page(render_evaluation(standard)).text
    assert "AutoAttack" in words
    assert "cascade" not in words


def test_a_black_box_is_called_one() -> None:
    assert "saw only this file's answers" in Page(render_evaluation(black_box())).text
    assert "Gradients came from another network" in Page(render_evaluation(black_box("other"))).text
    assert "Black box" not in Page(render_evaluation(sample())).text


def test_images_that_fooled_only_the_search_are_told() -> None:
    assert "3 images fooled the network on which the attacks searched and not the file" in Page(
        render_evaluation(sample(disputed={"pgd-20": 3}))
    ).text  # fmt: skip


def test_how_often_file_and_twin_agree_is_told() -> None:
    good = Page(render_evaluation(sample(agreement=AgreementRecord(clean=0.9999, adversarial=0.996)))).text
    assert "beside it on 99.99 % of the clean images and 99.60 % of PGD-20's last iterates." in good
    poor = Page(render_evaluation(sample(agreement=AgreementRecord(clean=0.9999, adversarial=0.99)))).text
    assert "99.00 % of PGD-20's last iterates; at least 99.5 % of each was expected: gradients of this network" in poor
    assert "beside it" not in Page(render_evaluation(sample())).text


def test_what_is_left_of_the_images_found_in_8_bits_is_told() -> None:
    said = "Saved as 8-bit images inside the ball, the adversarial images found leave 71.2 % in place of 70.9 %"
    assert said in Page(render_evaluation(sample())).text
    assert "8-bit images" not in Page(render_evaluation(sample(robust_accuracy_8bit={}))).text
    assert "in place of 70.9 % (worst case, suspect)" in Page(render_evaluation(sample(masking=SUSPECT))).text


# --- the page in a browser -------------------------------------------------------------------------------------------


def test_it_asks_nobody_for_anything_and_runs_nothing() -> None:
    page = Page(render_evaluation(sample()))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "script", "img"), tag
        assert re.match(r"^(#|$)", attributes.get("href", ""))
        assert "url(" not in attributes.get("style", "")
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_it_is_accessible() -> None:
    source = render_evaluation(sample(masking=SUSPECT, **BOUNDED))
    page = Page(source)
    assert source.lstrip().startswith("<!doctype html>")
    assert ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(identities)


def test_hostile_names_are_escaped() -> None:
    evil = "<script>window.pwned=1</script><img src=x onerror=pwned()>"
    target = sample().target.model_copy(update={"path": evil.replace("/", "∕")})
    checks = (FAILED.model_copy(update={"name": evil, "meaning": evil}),)
    source = render_evaluation(
        sample(
            target=target, notes=(evil,), per_class={evil: {"n": 1, "clean": 1, "worst_case": 1}},
            masking=MaskingRecord(verdict="suspect", checks=checks), provenance={"command": evil},
        )
    )  # fmt: skip
    assert "<script>" not in source
    assert "<img" not in source
    assert evil in Page(source).text


PROBE = """<script>addEventListener("load", () => parent.postMessage(
  [document.documentElement.scrollWidth, innerWidth].join(), "*"));</script></body>"""


@pytest.mark.parametrize("width", [360, 1024])
def test_in_chromium_the_body_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    binary = os.environ.get("COLDFORGE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        pytest.skip("no Chromium found: install the package chromium, or name the binary in COLDFORGE_CHROMIUM")
    target = sample().target.model_copy(update={"path": "a-very-long-name-of-a-folder-" * 5})
    source = render_evaluation(sample(target=target, masking=SUSPECT, **BOUNDED, **LITERAL))
    (tmp_path / "inner.html").write_text(source.replace("</body>", PROBE))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe src="inner.html" width="{width}" height="800" style="border:0"></iframe><p id="probe"></p>'
        "<script>addEventListener('message', (e) => document.getElementById('probe').append(e.data));</script>"
    )
    command = [
        binary, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
        "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()
    found = re.search(r'<p id="probe">([\d,]+)</p>', shown)
    assert found is not None, "the page did not report"
    scroll_width, inner_width = map(int, found[1].split(","))
    assert inner_width == width
    assert scroll_width <= inner_width
