#!/usr/bin/env python
"""Write the tables of README.md and docs/ from the records they name: `python scripts/update_readme.py [--check]`.

A table stands between `<!-- KIND: PATH -->` and `<!-- end -->`. PATH is a file, from the root of the repository. KIND
is `table` (a record.json), `clipping`, `attack_parity`, `attack_peers`, `attack_speed`, `int4`, `rounding_cost` (by
the benchmarks of that name), `sweep` (the table.csv of a sweep), `sweep_seconds`, `sweep_sizes`, `sweep_trials` or
`sweep_workers` (by sweep_scale), `paper_figure`, `paper_claims` or `paper_readings` (by paper_figure), one of the
tables of benchmarks/tables.py, or, with the folder of the records as PATH, `recipe_results`, `recipe_cifar10`,
`recipe_paper`, `recipe_lite`, `sensitivity` or `goals`. Where there is no record yet, it says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coldforge.records import load_record
from coldforge.report.table import summary_markdown
from coldforge.report.verdict import headline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipe_results  # noqa: E402
import rounding_cost  # noqa: E402
import tables  # noqa: E402

DOCS = ("architecture", "evidence", "int4", "paper", "performance", "recipes", "results", "scale")
PAGES = ("README.md", "results/README.md", "benchmarks/README.md", *(f"docs/{name}.md" for name in DOCS))
TABLE = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table made anew from its file."""
    kinds = {"table": stages, "clipping": clipping, "int4": int4, "goals": goals, "sensitivity": sensitivity}
    kinds |= {"attack_parity": attack_parity, "attack_peers": attack_peers, "attack_speed": attack_speed}
    kinds |= {"sweep": sweep, "recipe_results": recipe_results.table, "recipe_paper": recipe_results.paper_table}
    kinds |= {"recipe_lite": recipe_results.lite_table, "recipe_cifar10": partial(recipe_results.table, data="cifar10")}
    kinds |= {"rounding_cost": rounding_cost.table, "sweep_seconds": sweep_seconds, "sweep_sizes": sweep_sizes}
    kinds |= {"sweep_trials": sweep_trials, "sweep_workers": sweep_workers}
    kinds |= {kind: partial(benchmark, table) for kind, table in tables.TABLES.items()}
    kinds |= {"paper_figure": paper_figure, "paper_claims": paper_claims, "paper_readings": paper_readings}
    return TABLE.sub(lambda match: f"{match[1]}{kinds[match[2]](ROOT / match[3])}\n{match[4]}", text)


def stages(path: Path) -> str:
    """The stages of a run, and its headline."""
    record = load_record(path)
    return f"{summary_markdown(record)}\n{headline(record)}"


def benchmark(table: Callable[[dict[str, Any]], str], path: Path) -> str:
    """A table of benchmarks/tables.py."""
    return table(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else tables.NOT_YET


def goals(folder: Path) -> str:
    """What the benchmarks of speed found, beside the goals."""
    paths = [path for name in tables.TABLES if (path := folder / f"{name}.json").exists()]
    return tables.goals({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths})


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


def attack_parity(path: Path) -> str:
    """Ours against the reference, image by image."""
    lines = [
        "| network | attack | seed | n | ours % | reference % | difference, points |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in json.loads(path.read_text(encoding="utf-8"))["verdicts"]:
        low, high = row["ci95_points"]
        lines.append(
            f"| {row['network']} | {row['attack']} | {row['seed']} | {row['n']} | {100 * row['ours']:.2f} "
            f"| {100 * row['reference']:.2f} | {row['difference_points']:+.2f} [{low:+.1f}, {high:+.1f}] |"
        )
    return "\n".join(lines)


def attack_peers(path: Path) -> str:
    """Everybody's attacks on the same images: accuracy, seconds, passes and gradients."""
    lines = ["| network | attack | who | stand % | seconds | passes an image | gradients an image | note |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---|"]
    for row in sorted(json.loads(path.read_text(encoding="utf-8"))["results"], key=lambda row: row["network"]):
        passes, gradients = (row[f"{what}_images"] / row["n"] for what in ("forward", "gradient"))
        lines.append(
            f"| {row['network']} | {row['attack']} | {row['version']} | {100 * row['robust_accuracy']:.0f} "
            f"| {row['seconds']:.0f} | {passes:,.0f} | {gradients:,.0f} | {row['note']} |"
        )
    return "\n".join(lines)


def sweep(path: Path) -> str:
    """Trials of a sweep of fine-tunings, best first."""
    if not path.is_file():
        return NOT_COMPUTED
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["robust:worst_case"]))
    apart = ("transfer", "worst_case", "low", "high")
    columns = [key.removeprefix("robust:") for key in rows[0] if key.startswith("robust:")]
    attacks = [name for name in columns if name not in apart]
    said = ", ".join(name.replace("pgd", "PGD").replace("autoattack", "AutoAttack") for name in attacks)
    lines = [f"| variant | clean % | {said}, worst case % | 95 % | training, 10¹² MACs |", "|---|---:|---:|---|---:|"]
    seeds = {row["seed"] for row in rows}
    for row in rows:
        low, high = (100 * float(row[f"robust:{end}"]) for end in ("low", "high"))
        name = (row["name"] == "artifact" and row.get("variant")) or row["label"]
        name += f" (seed {row['seed']})" if len(seeds) > 1 else ""
        flag = " (suspect)" if row["masking"] == "suspect" else ""
        lines.append(
            f"| {name} | {100 * float(row['clean_accuracy']):.1f} "
            f"| {100 * float(row['robust:worst_case']):.1f}{flag} | {low:.1f} – {high:.1f} "
            f"| {float(row['train_macs']) / 1e12:.1f} |"
        )
    return "\n".join(lines)


def sensitivity(folder: Path) -> str:
    """Scans of one network, each by another importance."""
    scans = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return tables.sensitivity(scans) if scans else NOT_COMPUTED


def attack_speed(path: Path) -> str:
    """Seconds of everybody on the same images, and how many times longer than ours."""
    lines = ["| processor | network | attack | who | how | seconds | times ours, helped | stand % |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|"]
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        for row in run["rows"]:
            lines.append(
                f"| {run['cpu']} | {run['network']} ({run['n']} images) | {run['attack']} "
                f"| {row['version']} | {row['how']} | {row['median_s']:.1f} "
                f"| {row['slower_than_ours_bf16']:.2f} | {100 * row['robust']:.1f} |"
            )
    return "\n".join(lines)


def int4(path: Path) -> str:
    """What attacks and the masking panel say of a 4-bit network, through two kinds of rounding."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = list(dict.fromkeys(name for row in rows.values() for name in row["accuracy"]))
    lines = ["| % | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for name in names:
        shown = (f"{100 * row['accuracy'][name]:.1f}" if name in row["accuracy"] else "–" for row in rows.values())
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["| **verdict** | " + " | ".join(f"**{row['verdict']}**" for row in rows.values()) + " |", ""]
    for label, row in rows.items():
        failed = [check for check in row["checks"] if not check["passed"]]
        lines += [f"Failed checks, {label}: {len(failed)} of {len(row['checks'])}.", ""] if failed else []
        lines += [f"- `{check['name']}`: {check['meaning']}" for check in failed]
        lines += [""] if failed else []
    return "\n".join(lines).rstrip()


def sweep_seconds(path: Path) -> str:
    """Seconds of each step of synthetic sweeps."""
    lines = [
        "| trials | executor | distinct stages | expand, survey | run | resume, all done | a trial | new records "
        "| a trial | read records | write tables |",
        "|---:|---|---:|" + "---:|" * 8,
    ]
    for row in json.loads(path.read_text(encoding="utf-8"))["scale"]:
        lines.append(
            f"| {row['trials']:,} | {row['executor']}, {row['workers']} | {row['stages']:,} | {row['survey_s']:.1f} s "
            f"| {row['run_s']:.0f} s | {row['resume_s']:.1f} s | {row['resume_ms_a_trial']:.1f} ms "
            f"| {row['rerecord_s']:.1f} s | {row['rerecord_ms_a_trial']:.1f} ms | {row['read_records_s']:.1f} s "
            f"| {row['write_tables_s']:.1f} s |"
        )
    return "\n".join(lines)


def sweep_sizes(path: Path) -> str:
    """Memory and files of synthetic sweeps."""
    lines = [
        "| trials | executor | peak memory: run | resume | tables | files: store | sweep | largest folder |",
        "|---:|---|" + "---:|" * 6,
    ]
    for row in json.loads(path.read_text(encoding="utf-8"))["scale"]:
        peaks = " | ".join(f"{row['peak_bytes'][what] / 1e6:.0f} MB" for what in ("run", "resume", "tables"))
        lines.append(
            f"| {row['trials']:,} | {row['executor']}, {row['workers']} | {peaks} | {row['files_of_the_store']:,} "
            f"| {row['files_of_the_sweep']:,} | {row['largest_folder']:,} |"
        )
    return "\n".join(lines)


def sweep_trials(path: Path) -> str:
    """Overhead of real trials, and two workers beside one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    overhead, found = record["overhead"], record["throughput"]
    resume, anew = (statistics.median(overhead[f"{what}_ms_a_trial"]) for what in ("resume", "new_records"))
    lines = [
        f"- Real trials of {overhead['stages_a_trial']} stages that are all in the store: **{resume:.1f} ms each**, "
        f"and {anew:.1f} ms where the record is written anew (medians of five)."
    ]
    names = {
        "computing": f"{found['trials']} trials of matrix products at one thread: two workers to one",
        "bare": "The same products in bare processes, in the same turns: two to one",
        "sleeping": f"{found['trials']} trials that sleep for {found['pause_s']:g} s: two workers to one",
    }
    for what, name in names.items():
        both = zip(found["seconds"][what]["1"], found["seconds"][what]["2"], strict=True)
        shown = ", ".join(f"{two:.0f} s / {one:.0f} s" for one, two in both)
        lines.append(f"- {name}: **{found['median_ratio'][what]:.2f} of the time** (median of {shown}).")
    return "\n".join(lines)


def sweep_workers(path: Path) -> str:
    """What the conductor spends on a stage, by the number of workers."""
    rows = json.loads(path.read_text(encoding="utf-8"))["workers"]
    crowds = sorted({row["workers"] for row in rows})
    spent = {(row["trials"], row["workers"]): f"{row['conduct_us_a_stage']:.0f} µs" for row in rows}
    lines = [
        "| trials | " + " | ".join(f"{crowd:,} worker{'s' * (crowd > 1)}" for crowd in crowds) + " |",
        "|---:|" + "---:|" * len(crowds),
    ]
    for size in sorted({row["trials"] for row in rows}):
        lines.append(f"| {size:,} | " + " | ".join(spent[size, crowd] for crowd in crowds) + " |")
    return "\n".join(lines)


NOT_COMPUTED = "*Not computed yet.*"


def paper_figure(path: Path) -> str:
    """The figure beside the record, and the sweeps that it is made of."""
    if not path.is_file():
        return NOT_COMPUTED
    lines = [f"![The paper's figure, computed here](../results/paper/{path.stem}.svg)", ""]
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, sweep in record["sweeps"].items():
        recipe, share = sweep["recipe"], sweep["macs"] / sweep["macs_alone"]
        lines.append(
            f"- `recipes/{recipe}.toml`{name.removeprefix(recipe)}: {sweep['finished']} of {sweep['trials']} trials, "
            f"{sweep['distinct']:,} stages in place of {sweep['alone']:,}, {100 * share:.0f} % of the multiply-adds of "
            "independent trials."
        )
        lines += [f"  - Not there: {failure}." for failure in sweep["failures"]]
        lines += [f"  - Tried again: {repeated}." for repeated in sweep["repeated"]]
    for recipe, seeds in record["not_computed"].items():
        lines.append(
            f"- `recipes/{recipe}.toml`, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: not computed yet."
        )
    return "\n".join(lines)


def paper_claims(path: Path) -> str:
    """A table of verdicts, and for each claim the sentences with the numbers."""
    if not path.is_file():
        return NOT_COMPUTED
    rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
    cases = list(dict.fromkeys(_case(finding) for row in rows for finding in row["findings"]))
    lines = ["| claim | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    for row in rows:
        verdicts = {_case(found): f"{found['verdict']} ({_seeds(found)})" for found in row["findings"]}
        lines.append(f"| {row['claim']} | " + " | ".join(verdicts.get(case, "–") for case in cases) + " |")
    for number, row in enumerate(rows, 1):
        lines += ["", f"{number}. **{row['claim']}**"]
        lines += [
            f"   - {_case(found)}, {_seeds(found)}: **{found['verdict']}.** {found['sentence']}"
            for found in row["findings"]
        ]
        lines += [] if row["findings"] else [f"   - {NOT_COMPUTED}"]
    return "\n".join(lines)


def _case(finding: dict[str, object]) -> str:
    attack = {"autoattack-lite": "AutoAttack-lite"}.get(str(finding["attack"]), "PGD-20")
    return f"{finding['protocol']}, {attack}"


def _seeds(finding: dict[str, object]) -> str:
    return f"{finding['seeds']} seed" + "s" * (finding["seeds"] != 1)


def paper_readings(path: Path) -> str:
    """How far our networks are from each line of the paper's legend; the nearest of each in bold."""
    if not path.is_file():
        return NOT_COMPUTED
    rows = json.loads(path.read_text(encoding="utf-8"))["readings"]
    names = [f"{setting} {measure}" for setting in ("standard", "adversarial") for measure in ("clean", "robust")]
    lines = [
        "| protocol | compression | base | fine-tuning | levels | " + " | ".join(f"“{n}”" for n in names) + " |",
        "|---|---|---|---|---:|" + "---:|" * len(names),
    ]
    for row in rows:
        rivals = [r for r in rows if (r["protocol"], r["compression"]) == (row["protocol"], row["compression"])]
        cells = []
        for name in names:
            shown = f"{100 * row[name]:.1f}" if name in row else "–"
            best = name in row and row[name] == min(rival[name] for rival in rivals if name in rival)
            cells.append(f"**{shown}**" if best else shown)
        what = [row["protocol"], row["compression"], row["base"], row["arm"], str(row["levels"])]
        lines.append("| " + " | ".join([*what, *cells]) + " |")
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
