"""The page of a sweep: what it says, what it never says, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import html
import io
import itertools
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
from pages import write_sweep_folder

from coldforge.cli import main
from coldforge.errors import StoreError
from coldforge.records import Record, load_record
from coldforge.report import text
from coldforge.report.folder import draw_any
from coldforge.report.sweep import render_sweep
from coldforge.report.sweep_answers import answers
from coldforge.report.sweep_panels import MOST_COLUMNS, _spots, _ticks, panels
from coldforge.report.sweep_rows import latency_column, mean_entries, measures, positions, single_entries, values_of
from coldforge.sweep import Listener
from coldforge.sweep.table import Sweep, load_results, over_seeds, pick
from coldforge.sweep.workshop import RecipeWorkshop

PLOTLY = re.compile(r"<script>/\*\*.*?</script>", re.DOTALL)
DATA = re.compile(r'<script type="application/json" id="sweep-data">(.*?)</script>', re.DOTALL)
RATIOS, STAGES = 4, 5
TRIALS = RATIOS * 2 * 2 * 2
FINISHED = TRIALS - 8
EVIL = "</script><script>window.pwned=1</script><img src=x onerror=pwned()>$x$"


class Page(HTMLParser):
    """Elements, words outside scripts, and the rows of the two tables, a list of cells each."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.rows: dict[str, list[list[str]]] = {"single": [], "mean": []}
        self.hidden: dict[str, list[bool]] = {"single": [], "mean": []}
        self.front: dict[str, list[bool]] = {"single": [], "mean": []}
        self._raw = False
        self._mode = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        self._raw = tag in ("style", "script")
        if tag not in ("span", "b", "strong", "code", "a", "wbr"):
            self.words.append(" ")
        if tag == "tbody":
            self._mode = found.get("data-mode", "")
        if tag == "tr" and self._mode:
            self.rows[self._mode].append([])
            self.hidden[self._mode].append("hidden" in found)
            self.front[self._mode].append("front" in found.get("class", "").split())
        if tag in ("td", "th") and self._mode:
            self.rows[self._mode][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = self._raw and tag not in ("style", "script")
        if tag == "tbody":
            self._mode = ""

    def handle_data(self, data: str) -> None:
        if self._raw:
            return
        self.words.append(data)
        if self._mode and self.rows[self._mode] and self.rows[self._mode][-1]:
            cells = self.rows[self._mode][-1]
            cells[-1] = " ".join(f"{cells[-1]} {data}".split())

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def record() -> Record:
    return load_record(Path(__file__).parents[2] / "results" / "fashion-mnist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, record) -> Path:
    """16 points with two seeds; nothing pruned by 0.1 can be made."""
    return write_sweep_folder(tmp_path_factory.mktemp("page"), record, trouble={"middle 0.1": "error"})


@pytest.fixture(scope="module")
def sweep(folder) -> Sweep:
    return load_results(folder)


@pytest.fixture(scope="module")
def source(sweep) -> str:
    return render_sweep(sweep)


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(PLOTLY.sub("", source))


def headers(source: str) -> list[str]:
    head = re.search(r"<thead>(.*?)</thead>", source, re.DOTALL)
    assert head is not None
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<th.*?</th>", head[1])]


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_header_counts(page):
    for words in (
        "small nets", "Widths and bits.", f"{FINISHED} of {TRIALS} trials are finished.", f"{FINISHED} of {TRIALS}",
        "8 failed", "seeds 0, 1", "25.5/255 L∞", "eps 0.1", "under FGSM and PGD-20; clean: 10,000",
        "42 stages in place of 128", "Saved by sharing",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_table_has_a_row_a_stage_with_the_records_numbers(sweep, page, source):
    names = headers(PLOTLY.sub("", source))
    assert names[:5] == ["stage", "prune.ratio", "bits", "quantize.calibration", "seed"]
    assert len(page.rows["single"]) == len(sweep.rows) == FINISHED * STAGES
    for row, cells in zip(sweep.rows, page.rows["single"], strict=True):
        shown = dict(zip(names, cells, strict=True))
        assert [shown[axis] for axis in sweep.axes] == [row[axis] for axis in sweep.axes]
        assert shown["stage"] == row["label"]
        assert shown["seed"] == str(row["seed"])
        assert shown["trial"] == row["trial"]
        interval = text.interval((row["clean:low"], row["clean:high"]))
        assert shown["clean %"] == f"{text.percent(row['clean_accuracy'])} {interval}"
        verdict = row["masking"]
        flag = " suspect" if verdict == "suspect" else ""
        interval = text.interval((row["robust:low"], row["robust:high"]))
        assert shown["robust % (worst case)"] == f"{text.percent(row['robust:worst_case'])}{flag} {interval}"
        assert shown["masking verdict"] == {"not_run": "not checked"}.get(verdict, verdict)
        assert shown["file"] == text.size(row["size_bytes"])
        timed = row.get("latency:onnxruntime:1")
        assert shown["latency (ONNX Runtime, batch 1)"] == (text.seconds(timed) if timed else text.NONE)
        energy = row["energy_j_per_image"]
        assert shown["energy / image"] == (f"{text.energy(energy)} estimated" if energy else text.NONE)
        assert shown["training"] == text.duration(row["train_seconds"])
    assert "–" in {cells[names.index("latency (ONNX Runtime, batch 1)")] for cells in page.rows["single"]}


def test_means_over_seeds_stand_with_their_spread(sweep, page, source):
    names = headers(PLOTLY.sub("", source))
    means = over_seeds(sweep)
    assert len(page.rows["mean"]) == len(means) == FINISHED // 2 * STAGES
    assert any(mean.spread["clean_accuracy"] for mean in means)
    for mean, cells in zip(means, page.rows["mean"], strict=True):
        shown = dict(zip(names, cells, strict=True))
        value, spread = mean.mean["clean_accuracy"], mean.spread["clean_accuracy"]
        apart = f" ± {text.percent(spread)}" if spread else ""  # of equal seeds nothing is said
        assert shown["clean %"] == f"{text.percent(value)}{apart}"
        assert shown["seed"] == "0, 1"
        assert shown["trial"] == "2 trials"


def test_one_seed_has_no_means_and_no_switch(sweep):
    rows = tuple(row for row in sweep.rows if row["seed"] == 0)
    source = PLOTLY.sub("", render_sweep(dataclasses.replace(sweep, rows=rows, seeds=(0,))))
    assert 'id="means"' not in source
    assert Page(source).rows["mean"] == []


def test_a_mean_is_suspect_where_one_seed_is(sweep):
    first = next(row for row in sweep.rows if row["name"] == "artifact" and row["masking"] == "ok")
    rows = tuple({**row, "masking": "suspect"} if row is first else row for row in sweep.rows)
    found = [entry for entry in mean_entries(dataclasses.replace(sweep, rows=rows)) if first["trial"] in entry.trials]
    assert [entry.verdict for entry in found if entry.kind == "artifact"] == ["suspect"]


def test_suspect_is_flagged_everywhere(sweep, page, source):
    suspects = {label: {r["trial"] for r in sweep.rows if (r["label"], r["masking"]) == (label, "suspect")} for label in
                ("artifact (model.onnx)", "adversarially tuned")}  # fmt: skip
    assert len(suspects["artifact (model.onnx)"]) == 4
    assert suspects["adversarially tuned"] == suspects["artifact (model.onnx)"], "what was exported is suspect like it"
    assert "say of 4 trials that the robust accuracy may not hold" in page.text
    flagged = [cells for cells in page.rows["single"] if any("suspect" in cell for cell in cells)]
    assert len(flagged) == 2 * 4  # the files, and the networks that these were exported from
    data = json.loads(DATA.search(source)[1])
    assert [entry["verdict"] for entry in data["entries"]["single"]] == [
        row["masking"] for row in sweep.rows
    ]  # fmt: skip
    trials = suspects["artifact (model.onnx)"]
    assert not trials & {answer.trial for answer in answers(sweep)}


def test_numbers_of_validation_images_are_called_so(sweep, page):
    assert "On the validation part." not in page.text
    rows = tuple({**row, "images": "validation images"} for row in sweep.rows)
    words = Page(PLOTLY.sub("", render_sweep(dataclasses.replace(sweep, rows=rows)))).text
    assert "On the validation part. These images also watched the training" in words


def test_where_every_artifact_is_suspect_none_is_named(sweep):
    rows = tuple({**row, "masking": "suspect"} for row in sweep.rows)
    words = Page(PLOTLY.sub("", render_sweep(dataclasses.replace(sweep, rows=rows)))).text
    assert "the masking verdict of each is suspect" in words
    assert (
        words.count("No robust accuracy of an artifact can be named") == 2
    )  # in the headline and beside the questions
    assert "coldforge pick" not in words


# --- questions -------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_pick(sweep, page):
    found = answers(sweep)
    questions = [answer.question for answer in found]
    assert questions[0] == "Most robust"
    assert [re.split(r" (?:with|of) at ", question)[0] for question in questions] == [
        "Most robust", "Smallest file", "Fastest", "Least energy", "Most robust", "Most robust file"
    ]  # fmt: skip
    best = pick(sweep, maximize="robust")
    floor = math.floor(95 * best["robust:worst_case"])
    assert questions[1] == f"Smallest file with at least {floor} % robust accuracy"
    assert found[1].trial == pick(sweep, least=[f"robust={floor / 100}"], minimize="bytes")["trial"]
    assert found[2].trial == pick(sweep, least=[f"robust={floor / 100}"], minimize="latency")["trial"]
    assert found[1].command == f"coldforge pick {sweep.folder} --min robust={floor / 100:g} --minimize bytes"
    assert all(answer.command in page.text and answer.question in page.text for answer in found)
    assert found[0].robust in page.text


def test_commands_of_the_page_are_commands(sweep, record, monkeypatch, capsys):
    monkeypatch.setattr(RecipeWorkshop, "refuse_missing", lambda *_: None)
    monkeypatch.setattr(RecipeWorkshop, "write_folder", lambda *_: record)
    monkeypatch.setattr("coldforge.report.folder.draw", lambda _: None)
    for answer in answers(sweep):
        assert main([*shlex.split(answer.command)[1:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["trial"] == answer.trial


def test_an_answer_that_nobody_checked_says_so(sweep):
    verdicts = {row["trial"]: row["masking"] for row in sweep.rows if row["name"] == "artifact"}
    for answer in answers(sweep):
        assert answer.flag == {"ok": "", "not_run": "not checked"}[verdicts[answer.trial]]


@pytest.mark.parametrize(
    ("lost", "gone"),
    [("latency:", "Fastest"), ("energy_j_per_image", "Least energy")],
)
def test_what_was_not_measured_is_not_asked(sweep, lost, gone):
    rows = tuple({name: value for name, value in row.items() if not name.startswith(lost)} for row in sweep.rows)
    poorer = dataclasses.replace(sweep, rows=rows)
    assert not [answer for answer in answers(poorer) if answer.question.startswith(gone)]
    assert lost not in {measure.key for measure in measures(poorer)}
    assert "No robust" not in Page(PLOTLY.sub("", render_sweep(poorer))).text


def test_without_attacks_there_is_no_plot_and_no_answer(sweep):
    rows = tuple({name: value for name, value in row.items() if not name.startswith("robust:")} for row in sweep.rows)
    source = render_sweep(dataclasses.replace(sweep, rows=rows))
    words = Page(source).text
    assert "none was attacked" in words
    assert "No attack was run, so there is no trade-off to draw." in words
    assert len(source) < 1_000_000
    assert len(panels(sweep, mean_entries(dataclasses.replace(sweep, rows=rows)))) == 2


def test_robustness_of_zero_asks_no_thresholds(sweep):
    rows = tuple({**row, "robust:worst_case": 0.0, "robust:low": 0.0, "robust:high": 0.0} for row in sweep.rows)
    questions = [answer.question for answer in answers(dataclasses.replace(sweep, rows=rows))]
    assert not [question for question in questions if "at least 0 %" in question]
    assert questions[0] == "Most robust"


# --- failures and unfinished sweeps ----------------------------------------------------------------------------------


def test_failures_stand_with_what_they_cost(sweep, page):
    assert [failure.error for failure in sweep.failures] == ["ValueError: this cannot be made"] * 2
    for failure in sweep.failures:
        assert len(failure.trials) == 4
        for trial in failure.trials:
            assert sweep.labels[trial] in page.text
    assert "middle 0.1 could not be made: ValueError: this cannot be made" in page.text
    assert "Traceback (most recent call last)" in page.text
    assert "--retry-failed" in page.text


def test_a_sweep_that_was_stopped_has_a_page(tmp_path, record):
    class Impatient(Listener):
        def changed(self, state):
            if len(state.finished) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sweep_folder(tmp_path, record, listener=Impatient())
    assert main(["report", str(tmp_path / "out")]) == 0
    words = Page(PLOTLY.sub("", (tmp_path / "out" / "report.html").read_text(encoding="utf-8"))).text
    assert f"4 of {TRIALS} trials are finished." in words
    assert f"{TRIALS - 4} trials are still to do" in words
    assert "Failures" not in words


def test_a_sweep_without_finished_trials_has_a_page(tmp_path, record):
    out = write_sweep_folder(tmp_path, record, trouble={"base 0": "error", "base 1": "error"})
    source = draw_any(out).read_text(encoding="utf-8")
    words = Page(source).text
    assert f"No trial of {TRIALS} is finished yet." in words
    assert "base 0 could not be made: ValueError: this cannot be made" in words
    assert f"{TRIALS} failed" in words
    assert len(source) < 100_000  # no plot, no plotly
    assert "<script" not in source


def test_folders_of_earlier_versions_have_a_page(folder, tmp_path):
    """Without what sharing saves, and without the trials that a failure costs."""
    for name in ("sweep.json", "failures.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content.pop("stages", None)
        content = {
            key: {k: v for k, v in value.items() if k != "trials"} if name == "failures.json" else value
            for key, value in content.items()
        }
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "records").symlink_to(folder / "records")
    words = Page(PLOTLY.sub("", render_sweep(load_results(tmp_path)))).text
    assert "Saved by sharing" not in words
    assert "middle 0.1 could not be made" in words
    assert "8 trials are still to do" in words


# --- axes and panels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0.5", "0.1", "1e-05"], [0.5, 0.1, 1e-5]),
        (["int8", "int4"], [8, 4]),
        (["w8 a8", "w4 a8"], [8, 4]),
        (["-1", "2"], [-1, 2]),
        (["natural", "adversarial"], []),
        (["zoo:cnn8", "zoo:resnet20"], []),
        (["8", "int4"], []),
        (["a8 1", "a8 2"], []),
    ],
)
def test_which_values_have_an_order(values, expected):
    assert list(positions(values).values()) == expected


def test_values_are_ascending_where_they_have_an_order(sweep):
    assert values_of(sweep) == {
        "prune.ratio": ["0.3", "0.5", "0.7"],
        "bits": ["4", "8"],
        "quantize.calibration": ["mse", "minmax"],
    }


def test_panels_of_axes_with_an_order(sweep):
    found = panels(sweep, mean_entries(sweep))
    assert [panel.axis for panel in found] == ["prune.ratio", "bits"]
    # 2 x 2 columns; 3 x 2 would be too many, and 3 are more than 2
    artifacts = [mean for mean in over_seeds(sweep) if mean.stage.startswith("artifact")]
    best = max(artifacts, key=lambda mean: mean.mean["robust:worst_case"])
    fixed = best.point[sweep.axes.index("quantize.calibration")]
    assert found[0].caption == ""
    assert found[1].caption == f"at quantize.calibration={fixed}, as in the most robust artifact"
    assert [panel.suspect for panel in found] == [True, True]
    for panel in found:
        image = matplotlib.image.imread(io.BytesIO(panel.png), format="png")[..., :3]
        red = (abs(image - [0xC0 / 255, 0x27 / 255, 0x2D / 255]).max(axis=-1) < 0.02).sum()
        assert (red > 50) == panel.suspect
    assert found == panels(sweep, mean_entries(sweep))
    assert MOST_COLUMNS == 4


def test_panels_of_many_values_and_of_several_grids(tmp_path, record):
    ratios = {"from": 0.1, "to": 0.9, "step": 0.1}
    grids = [
        {"axes": {"prune.ratio": ratios, "quantize.weight_bits": [16, 8, 6, 4, 2]}},
        {"axes": {"prune.importance": ["l1", "taylor"], "finetune.lr": [0.1, 0.01, 0.001]}},
    ]
    sweep = load_results(write_sweep_folder(tmp_path, record, axes={}, grid=grids, seeds=[0], name="many"))
    found = {panel.axis: panel.caption for panel in panels(sweep, mean_entries(sweep))}
    assert found == {
        "prune.ratio": "4 of 5 values of quantize.weight_bits",
        "quantize.weight_bits": "4 of 9 values of prune.ratio",
        "finetune.lr": "",  # a column for each importance
    }
    source = PLOTLY.sub("", render_sweep(sweep))
    assert re.findall(r'<input type="checkbox" value="([^"]*)" checked>', source) == ["artifact"]
    assert 'value="">not set' in source


def test_ticks_have_room_and_places_are_readable():
    assert _spots({"0.1": 0.1, "0.5": 0.5}) == {"0.1": 0.1, "0.5": 0.5}
    assert _spots({"w16 a16": 16, "w2 a2": 2, "w4 a4": 4}) == {"w2 a2": 0, "w4 a4": 1, "w16 a16": 2}
    assert _spots({"0.001": 0.001, "0.1": 0.1}) == {"0.001": 0, "0.1": 1}
    assert _spots({"0": 0.0, "1": 1.0}) == {"0": 0, "1": 1}
    crowded = {f"{i / 100:g}": i / 100 for i in range(10, 90)}
    kept = _ticks(crowded, 2.5)
    assert 3 <= len(kept) <= 10
    assert kept[0] == "0.1"
    assert _ticks({"0.1": 0.1, "0.9": 0.9}, 2.5) == ["0.1", "0.9"]


def test_a_sweep_without_axes_has_a_page(tmp_path, record):
    out = write_sweep_folder(tmp_path, record, axes={}, seeds=[0], name="point")
    words = Page(PLOTLY.sub("", draw_any(out).read_text(encoding="utf-8"))).text
    assert "1 of 1 trial" in words
    assert "No axis with an order has two values yet" in words


def test_the_latency_is_that_of_pick(sweep):
    assert latency_column(sweep) == "latency:onnxruntime:1"  # the baseline was timed in eager PyTorch first


def test_trials_under_several_threat_models_are_not_called_comparable(sweep):
    rows = [
        {**row, "threat_model:eps": 0.05, "threat_model:eps_255": 12.75, "threat_model:box": False}
        if row["seed"] else row for row in sweep.rows
    ]  # fmt: skip
    words = Page(PLOTLY.sub("", render_sweep(dataclasses.replace(sweep, rows=tuple(rows))))).text
    assert "eps L∞ 0.05 no box, L∞ 0.1; compare within one only" in words
    assert "Literal threat model" in words
    assert words.count("No robust accuracy of an artifact can be named: they are of several threat models.") == 2
    assert "coldforge pick" not in words


# --- one file, safe --------------------------------------------------------------------------------------------------


def test_report_finds_out_what_the_folder_holds(folder, capsys, source):
    assert main(["report", str(folder)]) == 0
    target = folder / "report.html"
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_text(encoding="utf-8") == source
    assert target.stat().st_size < 8_000_000


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coldforge.report.html.write_atomic", full)
    with pytest.raises(StoreError, match=r"expected to write .*report.html, got: No space left on device"):
        draw_any(folder)


def test_it_asks_nobody_for_anything(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "action", "srcset", "poster", "data", "xlink:href"):
            assert re.match(r"^(#|data:|$)", attributes.get(name, "")), (tag, name)
        assert "url(" not in attributes.get("style", "")
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_no_address_stands_in_the_page(source):
    assert not re.search(r"\w+://|src=\"//|url\(", PLOTLY.sub("", source))


def test_it_is_accessible(page):
    assert ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(identities)


def hostile(sweep: Sweep) -> Sweep:
    """Every name is an attack: axes, values, labels, the sweep, failures, the folder."""
    axes = (EVIL + ".a", *sweep.axes[1:])
    rows = tuple({**row, axes[0]: EVIL + row["prune.ratio"], "label": EVIL + row["label"]} for row in sweep.rows)
    failures = tuple(dataclasses.replace(failure, label=EVIL, error=EVIL, details=EVIL) for failure in sweep.failures)
    labels = dict.fromkeys(sweep.labels, EVIL)
    return dataclasses.replace(
        sweep, folder=Path(EVIL.replace("/", "∕")), name=EVIL, description=EVIL, axes=axes, rows=rows,
        failures=failures, labels=labels,
    )  # fmt: skip


def test_hostile_names_are_escaped(sweep):
    source = PLOTLY.sub("", render_sweep(hostile(sweep)))
    assert "<script>window.pwned" not in source
    assert "<img src=x" not in source
    assert EVIL in Page(source).text


# --- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const click = (query) => document.querySelector(query).click();
  const header = (words) => [...document.querySelectorAll("th button")].find((b) => b.textContent.startsWith(words));
  const report = {pwned: window.pwned || 0, width: document.documentElement.scrollWidth, window: innerWidth};
  const look = (name) => { report[name] = {
    status: document.getElementById("status").textContent,
    legend: document.getElementById("legend")?.textContent,
    points: document.querySelectorAll("#pareto .points path.point").length,
    shown: [...document.querySelectorAll("tbody:not([hidden]) tr:not([hidden])")].map((row) => row.dataset.row),
    front: [...document.querySelectorAll("tbody:not([hidden]) tr.front")].map((row) => row.dataset.row),
    sorted: [...document.querySelectorAll("[aria-sort]")].map((th) => th.textContent),
  }; };
  look("start");
  STEPS
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(report);
  document.body.append(out);
}, 400));</script></body>"""


def probed(dump, folder: Path, source: str, steps: str = "") -> dict:
    (folder / "page.html").write_text(source.replace("</body>", PROBE.replace("STEPS", steps)), encoding="utf-8")
    found = re.search(r'<pre id="probe">(.*?)</pre>', dump(folder / "page.html"), re.DOTALL)
    assert found is not None, "the page did not report: its scripts did not run"
    return json.loads(html.unescape(found[1]))


def test_in_chromium_points_tell_what_they_are(sweep, source, tmp_path, dump):
    """The hover labels of an artifact that is suspect, and of a mean."""
    hover = """
      const node = document.getElementById("pareto");
      const pointNumber = node.points.findIndex((p) => p.entry.verdict === "suspect");
      Plotly.Fx.hover(node, [{curveNumber: 1, pointNumber}]);
      report.hover = [...node.querySelectorAll(".hoverlayer .nums")].map((t) => t.textContent).join(" ");
    """
    found = probed(dump, tmp_path, source, hover)["hover"]
    row = next(row for row in sweep.rows if row["name"] == "artifact" and row["masking"] == "suspect")
    interval = text.interval((row["robust:low"], row["robust:high"]))
    for words in (
        row["label"], "prune.ratio 0.7", "bits 4", "seed 0", "masking verdict: suspect", row["trial"],
        f"{text.percent(row['robust:worst_case'])} ({interval}) % SUSPECT",
        f"clean {text.percent(row['clean_accuracy'])}", "latency of one image (ONNX Runtime) 63.4 µs",
    ):  # fmt: skip
        assert words in found, words
    found = probed(dump, tmp_path, source, 'click("#means");' + hover)["hover"]
    assert "seed 0, 1" in found
    assert re.search(r"robust \(worst case\) [\d.]+ ± [\d.]+ % SUSPECT", found)


def front_of(sweep: Sweep, wanted: list[int], cost: str, entries) -> set[str]:
    """The slow twin of ``paretoFront``: every point against every other."""
    points = [
        (i, entries[i].cells[cost].value, entries[i].cells["robust:worst_case"].value)
        for i in wanted
        if not entries[i].suspect and cost in entries[i].cells and entries[i].cells[cost].value is not None
    ]
    return {
        str(i)
        for i, x, y in points
        if not any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in points)
    }  # fmt: skip


STEPS = """
  click('[data-filter="kind"] .all'); look("all");
  click('[data-filter="kind"] input[value="artifact"]');
  click('[data-filter="bits"] input[value="4"]'); look("four");
  click('[data-filter="prune.ratio"] input[value="0.3"]');
  click('[data-filter="prune.ratio"] input[value="0.7"]'); look("two");
  click('[data-filter="bits"] .all'); click('[data-filter="prune.ratio"] .all');
  header("robust").click(); look("best");
  header("robust").click(); look("worst");
  header("latency").click(); look("fast");
  header("prune").click(); look("ratio");
  const across = (words) => {
    const x = document.getElementById("x");
    x.value = [...x.options].findIndex((option) => option.textContent.startsWith(words));
    x.dispatchEvent(new Event("change", {bubbles: true}));
  };
  across("packed"); look("packed");
  across("clean"); look("clean");
  click("#means"); look("means");
"""


def test_in_chromium_no_point_is_the_best_of_several_threat_models(sweep, tmp_path, dump):
    """The mildest attack would win."""
    rows = tuple({**row, "threat_model:eps": 0.05} if row["prune.ratio"] == "0.3" else row for row in sweep.rows)
    source = render_sweep(dataclasses.replace(sweep, rows=rows))
    steps = 'look("all"); click(\'[data-filter="prune.ratio"] input[value="0.7"]\'); look("one");'
    found = probed(dump, tmp_path, source, steps)
    assert found["all"]["front"] == []
    assert "2 threat models: filter for one" in found["all"]["status"]
    assert found["one"]["front"]
    assert "points Pareto-optimal" in found["one"]["status"]


def test_in_chromium_filters_sorting_front_and_means_work(sweep, source, tmp_path, dump):
    singles, means = single_entries(sweep), mean_entries(sweep)
    found = probed(dump, tmp_path, source, STEPS)

    def indices(entries, **wanted) -> list[int]:
        return [
            i for i, entry in enumerate(entries)
            if entry.kind == "artifact"
            and all(entry.point[sweep.axes.index(axis.replace("_", "."))] in values for axis, values in wanted.items())
        ]  # fmt: skip

    artifacts = indices(singles)
    latency, robust = "latency:onnxruntime:1", "robust:worst_case"
    timed = [i for i in artifacts if singles[i].cells[latency].value is not None]
    start = found["start"]
    assert set(map(int, start["shown"])) == set(artifacts)
    assert start["points"] == len(timed) == FINISHED - 4
    assert set(start["front"]) == front_of(sweep, artifacts, latency, singles)
    assert start["status"].startswith(f"{FINISHED} of {FINISHED * STAGES} rows shown; ")
    assert "4 without these numbers stand in the table only" in start["status"]
    for words in ("prune.ratio", "0.3", "Pareto-optimal", "masking not checked", "suspect"):
        assert words in start["legend"]
    assert len(found["all"]["shown"]) == FINISHED * STAGES
    four = indices(singles, bits=["4"])
    assert set(map(int, found["four"]["shown"])) == set(four)
    assert set(found["four"]["front"]) == front_of(sweep, four, latency, singles)
    two = indices(singles, bits=["4"], prune_ratio=["0.3", "0.7"])
    assert set(map(int, found["two"]["shown"])) == set(two)
    assert 0 < len(two) < len(four)

    def values(name: str, key: str) -> list[float | None]:
        return [singles[int(i)].cells[key].value for i in found[name]["shown"]]

    assert values("best", robust) == sorted(values("best", robust), reverse=True)
    assert values("worst", robust) == sorted(values("worst", robust))
    assert found["best"]["sorted"] == ["robust % (worst case)"]
    fast = values("fast", latency)
    assert fast[: len(timed)] == sorted(value for value in fast if value is not None)
    assert fast[len(timed) :] == [None] * 4  # what is missing stays last
    ratios = [singles[int(i)].point[0] for i in found["ratio"]["shown"]]
    assert ratios == sorted(ratios)
    assert set(found["packed"]["front"]) == front_of(sweep, artifacts, "packed_bytes", singles)
    assert found["packed"]["points"] == FINISHED
    assert "clean accuracy" in found["clean"]["status"]
    assert len(found["means"]["shown"]) == FINISHED // 2
    assert set(map(int, found["means"]["shown"])) == set(indices(means))
    assert found["pwned"] == 0
    assert found["width"] <= found["window"]


def test_in_chromium_hostile_names_do_nothing(sweep, tmp_path, dump):
    found = probed(dump, tmp_path, render_sweep(hostile(sweep)))
    assert found["pwned"] == 0
    assert found["start"]["points"] > 0
    assert EVIL in found["start"]["legend"]
    assert found["width"] <= found["window"]


def test_in_chromium_a_page_without_attacks_sorts_too(sweep, tmp_path, dump):
    rows = tuple({name: value for name, value in row.items() if not name.startswith("robust:")} for row in sweep.rows)
    source = render_sweep(dataclasses.replace(sweep, rows=rows))
    found = probed(dump, tmp_path, source, 'header("clean").click(); look("sorted");')["sorted"]
    shown = [sweep.rows[int(i)]["clean_accuracy"] for i in found["shown"]]
    assert found["sorted"] == ["clean %"]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == FINISHED
