"""report.html: its content, and how it behaves in a browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import find_chromium
from coldforge.errors import StoreError
from coldforge.records import AgreementRecord, MaskingRecord, Record
from coldforge.report.examples import Examples
from coldforge.report.html import render_report, write_report
from coldforge.report.plots import adversarial_figure
from coldforge.report.table import summary_columns, summary_rows
from coldforge.report.verdict import headline

Make = Callable[..., Record]

PLOTLY = re.compile(r"<script>/\*\*.*?</script>", re.DOTALL)


class Page(HTMLParser):
    """Elements, the text outside scripts and styles, and the cells of the table of stages."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.cells: dict[str, list[tuple[str, str]]] = {}
        self._open: list[str] = []
        self._row = self._column = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag not in ("span", "b", "strong", "code", "a"):
            self.words.append(" ")
        if tag not in ("meta", "img", "br", "link", "input"):
            self._open.append(tag)
        if tag == "tr":
            self._row = f"{len(self.cells)}" if "data-stage" in found else ""
            if self._row:
                self.cells[self._row] = []
        if tag == "td":
            self._column = found.get("data-column", "")
            if self._row and self._column:
                self.cells[self._row].append((self._column, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag == "td":
            self._column = ""

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.words.append(data)
            if self._row and self._column:
                name, before = self.cells[self._row][-1]
                self.cells[self._row][-1] = (name, " ".join(f"{before} {data}".split()))

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def plain(page: str) -> str:
    """The page without the source of plotly."""
    return PLOTLY.sub("", page)


def table_numbers(page: Page) -> list[dict[str, str]]:
    return [dict(row) for row in page.cells.values()]


def expected_numbers(record: Record) -> list[dict[str, str]]:
    columns = [column.key for column in summary_columns(record) if column.key != "label"]
    return [
        {key: " ".join(f"{c.text} {c.flag} {c.detail}".split()) for key in columns for c in [row.cells[key]]}
        for row in summary_rows(record)
    ]


def test_the_page_holds_every_part(make_record: Make, make_examples: Callable[..., Examples]) -> None:
    record = make_record()
    page = Page(plain(render_report(record, adversarial_figure(make_examples(count=2)))))
    assert headline(record) in page.text
    assert table_numbers(page) == expected_numbers(record)
    titles = [
        "Key numbers", "Stages", "Trade-off", "Adversarial examples", "By class", "Training curves", "Does it hold?",
        "Efficiency", "Notes", "What the words mean", "Provenance",
    ]  # fmt: skip
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    for words in ("99.97 %", "99.91 %", "Ankle boot", "Training collapsed at lr 0.05", "AMD EPYC", "avx512_vnni",
                  "86.4 µs to 101 µs", "estimated (10 W per busy core x", "[finetune]", "25.5/255"):  # fmt: skip
        assert words in page.text, words
    assert [e for e in page.elements if e[0] == "svg"], "training curves"
    assert {"compressed", "naturally tuned", "dense adversarially trained"} <= set(
        re.findall(r"aria-hidden=\"true\"></span>([^<]+)</th>", render_report(record))
    )


def test_it_asks_nobody_for_anything(make_record: Make, make_examples: Callable[..., Examples]) -> None:
    page = Page(render_report(make_record(), adversarial_figure(make_examples(count=2))))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "action", "srcset", "poster", "data", "xlink:href"):
            assert re.match(r"^(#|data:|$)", attributes.get(name, "")), (tag, name)
        assert "url(" not in attributes.get("style", "")
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none';")
    assert "http" not in policy[0]


def test_it_is_accessible(make_record: Make, make_examples: Callable[..., Examples]) -> None:
    page = Page(plain(render_report(make_record(), adversarial_figure(make_examples(count=2)))))
    assert ("html", {"lang": "en"}) in page.elements
    assert [tag for tag, _ in page.elements if tag == "h1"] == ["h1"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    named = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert set(named) <= set(identities)


def test_suspect_is_flagged_everywhere(make_record: Make, masking_suspect: MaskingRecord) -> None:
    record = make_record(masking=masking_suspect)
    page = Page(plain(render_report(record)))
    assert table_numbers(page) == expected_numbers(record)
    assert table_numbers(page)[4]["worst_case"] == "75.0 suspect 74.1–75.8"
    assert "artifact (int8 ONNX): suspect." in page.text
    assert "square attack not stronger ✗ failed 0.182 0.0200" in page.text
    assert "robust (worst case) suspect" in page.text
    assert "artifact (int8 ONNX) (suspect)" in plain(render_report(record))  # in the plot
    flags = Page(plain(render_report(make_record()))).elements
    assert not [a for _, a in flags if "flag" in a.get("class", "").split()]


def test_not_run_is_said_plainly(make_record: Make) -> None:
    page = Page(plain(render_report(make_record(masking=MaskingRecord()))))
    assert "The checks were not run for: baseline, compressed, naturally tuned" in page.text
    assert "treat robust accuracies as upper bounds" in page.text
    assert ": ok." not in page.text


def test_low_agreement_is_flagged(make_record: Make) -> None:
    record = make_record()
    stages = [
        stage.model_copy(update={"agreement": AgreementRecord(clean=0.999, adversarial=0.98)})
        if stage.name == "artifact" else stage for stage in record.stages
    ]  # fmt: skip
    page = Page(plain(render_report(record.model_copy(update={"stages": tuple(stages)}))))
    assert "98.00 % below 99.5 %" in page.text
    assert "this file falls short" in page.text


def test_literal_threat_model_is_flagged(make_record: Make) -> None:
    page = Page(plain(render_report(make_record(box=False))))
    assert "Adversarial images may leave the image box [0, 1]; this is the paper's literal protocol." in page.text
    assert "literal threat model" in page.text
    assert "Literal threat model" not in Page(plain(render_report(make_record()))).text


def test_a_minimal_record_has_a_page(minimal_record: Record, make_record: Make) -> None:
    source = render_report(minimal_record)
    page = Page(source)
    for words in ("no attack was run", "This run kept no examples.", "Latency was not measured", "no provenance"):
        assert words in page.text, words
    assert '"written_by": "a later version"' in page.text  # not a recipe of this version: as JSON
    assert len(source) < 100_000  # no plot, no plotly
    assert "No artifact was exported" in Page(plain(render_report(make_record(artifact=False, latency=False)))).text


def test_hostile_names_are_escaped(make_record: Make) -> None:
    evil = "</script><script>window.pwned=1</script><img src=x onerror=pwned()>"
    record = make_record(classes=(evil, "two"), name=evil)
    stages = list(record.stages)
    stages[0] = stages[0].model_copy(update={"label": evil, "notes": (evil,)})
    source = render_report(record.model_copy(update={"stages": tuple(stages)}))
    assert "<script>window.pwned" not in source
    assert "<img src=x" not in source
    assert evil in Page(plain(source)).text


def test_write_report(make_record: Make, make_examples: Callable[..., Examples], tmp_path: Path) -> None:
    target = write_report(make_record(), tmp_path / "new" / "out", make_examples(count=2))
    assert target == tmp_path / "new" / "out" / "report.html"
    assert sorted(p.name for p in target.parent.iterdir()) == ["adversarial.png", "report.html"]
    assert (target.parent / "adversarial.png").read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size < 8_000_000
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"expected to write .*file.report\.html"):
        write_report(make_record(), tmp_path / "file")


# --- in a browser ----------------------------------------------------------------------------------------------------


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const e = document.documentElement;
  parent.postMessage([e.scrollWidth, innerWidth, document.querySelectorAll("#tradeoff .main-svg").length,
                      document.querySelectorAll("#tradeoff .points path").length, window.pwned || 0].join(), "*");
}, 400));</script></body>"""


def framed(folder: Path, source: str, width: int) -> Path:
    """A page that shows another one at some width and writes down what the probe in it reports."""
    (folder / f"inner{width}.html").write_text(source.replace("</body>", PROBE), encoding="utf-8")
    outer = folder / f"outer{width}.html"
    outer.write_text(
        f'<iframe src="inner{width}.html" width="{width}" height="800" style="border:0"></iframe><p id="probe"></p>'
        "<script>addEventListener('message', (e) => document.getElementById('probe').append(e.data));</script>"
    )
    return outer


def test_in_chromium_the_plot_renders_and_the_table_is_the_records(
    make_record: Make, make_examples: Callable[..., Examples], tmp_path: Path, dump: Callable[[Path], str]
) -> None:
    record = make_record()
    document = dump(write_report(record, tmp_path, make_examples(count=3)))
    plot = re.search(r'<div id="tradeoff".*?</section>', document, re.DOTALL)
    assert plot is not None
    assert plot[0].count('class="main-svg"') >= 2
    assert len(re.findall(r'<path class="point"', plot[0])) == len(record.stages)
    for stage in record.stages:
        assert stage.label in plot[0]
    assert table_numbers(Page(plain(document))) == expected_numbers(record)


@pytest.mark.parametrize("width", [360, 1024])
def test_in_chromium_the_body_never_scrolls_sideways(
    make_record: Make,
    make_examples: Callable[..., Examples],
    masking_suspect: MaskingRecord,
    tmp_path: Path,
    dump: Callable[[Path], str],
    width: int,
) -> None:
    long = "<script>window.pwned=1</script>" + "averyveryverylongclassname" * 3
    record = make_record(
        masking=masking_suspect, box=False, classes=(long, *(f"class {i}" for i in range(30))), name=long
    )
    source = render_report(record, adversarial_figure(make_examples(count=8)))
    found = re.search(r'<p id="probe">([\d,]+)</p>', dump(framed(tmp_path, source, width)))
    assert found is not None, "the page did not report: its scripts did not run"
    scroll_width, inner_width, drawings, points, pwned = map(int, found[1].split(","))
    assert inner_width == width
    assert scroll_width <= inner_width
    assert drawings >= 2
    assert points == len(record.stages)
    assert pwned == 0


def test_missing_chromium_is_a_skip_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFORGE_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    assert find_chromium() is None
    monkeypatch.setenv("COLDFORGE_CHROMIUM", "/opt/browser")
    assert find_chromium() == "/opt/browser"
