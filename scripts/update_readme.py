#!/usr/bin/env python
"""Write the tables of README.md and docs/ from the records they name: `python scripts/update_readme.py [--check]`.

A table stands between `<!-- table: PATH -->` and `<!-- end -->`; PATH is a record.json, from the repository's root.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from coldforge.records import load_record
from coldforge.report.table import headline, summary_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "results/README.md")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table made anew from its record."""

    def table(match: re.Match[str]) -> str:
        record = load_record(ROOT / match[2])
        return f"{match[1]}{summary_markdown(record)}\n{headline(record)}\n{match[3]}"

    return TABLE.sub(table, text)


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
