#!/usr/bin/env python
"""Write the tables of README.md and docs/ from the records they name: `python scripts/update_readme.py [--check]`.

A table stands between `<!-- KIND: PATH -->` and `<!-- end -->`. PATH is a JSON file, from the root of the repository.
KIND is `table` (a record.json), `latency` or `clipping` (by the benchmarks of that name).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from coldforge.records import load_record
from coldforge.report.table import headline, summary_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "results/README.md", "docs/architecture.md")
TABLE = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table made anew from its file."""
    kinds = {"table": stages, "latency": latency, "clipping": clipping}
    return TABLE.sub(lambda match: f"{match[1]}{kinds[match[2]](ROOT / match[3])}\n{match[4]}", text)


def stages(path: Path) -> str:
    """The stages of a run, and its headline."""
    record = load_record(path)
    return f"{summary_markdown(record)}\n{headline(record)}"


def latency(path: Path) -> str:
    """Medians of dense and int8 networks, and how many times faster than eager PyTorch they are."""
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| network | what | batch 1 | batch 64 |", "|---|---|---:|---:|"]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        if row["what"] != "sizes":
            shown = f"{1e3 * row['median_s']:.3g} ms ({row['times_faster_than_eager']:.1f}×)"
            cells.setdefault((row["network"], row["what"]), []).append(shown)
    lines += [f"| {network} | {what} | {' | '.join(shown)} |" for (network, what), shown in cells.items()]
    return "\n".join(lines)


def clipping(path: Path) -> str:
    """Accuracy under each kind of gradients, for each kind of inner attack."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = ["clean", "pgd-20 pass_through", "pgd-20 clipped", "pgd-20 both"]
    lines = [
        "| fine-tuned network | " + " | ".join(f"{name} %" for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    lines += [
        f"| {what} | " + " | ".join(f"{100 * row[name]:.1f}" for name in names) + " |" for what, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Write the pages, or with --check only compare; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled(text), encoding="utf-8")
    if stale and check:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run scripts/update_readme.py\n")
    return int(bool(stale and check))


if __name__ == "__main__":
    sys.exit(main())
