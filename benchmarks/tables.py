"""The records of the benchmarks of speed as Markdown, for them and for scripts/update_readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Contents = dict[str, Any]
NOT_YET = "Not measured yet."
_NONE: Contents = {"runs": []}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words and the others numbers."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (header, *rows)]
    lines.insert(1, "|" + "---|" * words + "---:|" * (len(header) - words))
    return "\n".join(lines)


def goal(row: Contents, sign: str = "≥") -> str:
    """The goal of a row and whether it is met, as one cell."""
    if row["goal"] is None:
        return ""
    return f"{sign} {row['goal']:g}: {'met' if row['met'] else '**not met**'}"


def where(record: Contents) -> str:
    """The machines of a record, in one line."""
    found = []
    for run in record["runs"]:
        hardware, versions = run["provenance"]["hardware"], run["provenance"]["versions"]
        flags = ", ".join(flag for flag in hardware["flags"] if flag.startswith(("avx512_", "amx", "avx_vnni")))
        found.append(f"{run['threads']} threads of {hardware['cpu']} ({flags}), torch {versions['torch']}")
    return "; ".join(dict.fromkeys(found))


def sensitivity(scans: Mapping[str, Sequence[Contents]]) -> str:
    """What each layer costs in points of robust accuracy, with 95 % intervals: rows of `coldforge sensitivity --json`
    by the importance that chose the channels. What is rounded loses no channels and is shown once.
    """
    cells: dict[str, dict[tuple[bool, str], str]] = {}
    for importance, rows in scans.items():
        for row in rows[1:]:
            rounds = not row["how"].startswith("prune")
            low, high = (100 * end for end in row["robust_loss_ci95"])
            found = cells.setdefault(row["layer"].removeprefix("network."), {})
            column = rounds, row["how"] if rounds else f"{row['how']}, {importance}"
            found[column] = f"{100 * row['robust_loss']:.1f} [{low:.1f}, {high:.1f}]"
    columns = sorted({column for found in cells.values() for column in found})
    rows = [[layer, *(found.get(column, "") for column in columns)] for layer, found in cells.items()]
    return markdown(["layer", *(name for _, name in columns)], rows)


def training_speed(record: Contents) -> str:
    """Images a second of adversarial fine-tuning."""
    rows = []
    for run in record["runs"]:
        for row in run["rows"]:
            watched = row["ours_times_faster_with_watching"]
            after = row["after"]
            rows.append(
                [
                    run["network"],
                    run["attack"],
                    row["version"] or row["who"],
                    f"{row['median_images_per_s']:.0f}",
                    f"{row['ours_times_faster']:.2f}",
                    f"{watched:.2f}" if watched else "",
                    goal(row) if row.get("same_work", True) else "not the same work",
                    f"{row['forward_passes_an_image']:.1f}",
                    f"{after['clean_loss']:.2f}, {after['fgsm_loss']:.2f}",
                    f"{100 * after['clean_accuracy']:.0f}, {100 * after['fgsm_accuracy']:.0f}",
                ]
            )
        for precision, before in run["before"].items():
            losses = f"{before['clean_loss']:.2f}, {before['fgsm_loss']:.2f}"
            shown = f"{100 * before['clean_accuracy']:.0f}, {100 * before['fgsm_accuracy']:.0f}"
            rows.append([run["network"], run["attack"], f"before, {precision}", *[""] * 5, losses, shown])
    header = ["network", "attack", "who", "images/s", "ours is faster, times", "with watching", "goal"]
    header += ["forward passes an image", "loss after: clean, FGSM", "accuracy % after: clean, FGSM"]
    return f"{markdown(header, rows, 3)}\n\n{where(record)}."


def quantization_overhead(record: Contents) -> str:
    """Time of a fake-quantized training step relative to the float one."""
    rows = []
    for run in record["runs"]:
        for row in run["rows"]:
            times = f"{1e3 * row['median_s']:.1f}", f"{row['times_float']:.2f}"
            rows.append([run["network"], run["precision"], row["version"] or row["who"], *times, goal(row, "≤")])
        rows += [[run["network"], run["precision"], who, "cannot", "", ""] for who in run["skipped"]]
    header = ["network", "precision", "who", "ms a step", "times float", "goal"]
    return f"{markdown(header, rows, 3)}\n\n{where(record)}."


def latency(record: Contents) -> str:
    """Medians of files and networks, and how many times faster than eager PyTorch they are."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in (row for run in record["runs"] for row in run["rows"]):
        shown = f"{1e3 * row['median_s']:.3g} ms ({row['times_faster_than_eager']:.1f}×)"
        cells.setdefault((row["network"], row["what"]), []).append(shown)
    rows = [[*what, *shown] for what, shown in cells.items()]
    return markdown(["network", "what", "batch 1", "batch 64"], rows, 2)


def latency_details(record: Contents) -> str:
    """Our file's goals, its share of the machine, and what ONNX Runtime executes for it."""
    rows, operators = [], []
    for run in (run for run in record["runs"] if "operators" in run["sizes"]):  # older records lack them
        for row in (row for row in run["rows"] if "own_quantizer" in row):
            own = row["own_quantizer"]
            rows.append(
                [
                    row["network"],
                    row["batch"],
                    f"{row['times_faster_than_eager']:.1f}",
                    goal(row),
                    f"{own['times_faster']:.2f}",
                    goal(own),
                    f"{row['share_of_peak'] * row['peak_ops_per_s'] / 1e9:.0f}",
                    f"{row['peak_ops_per_s'] / 1e9:.0f}",
                    f"{row['share_of_peak']:.0%}",
                    goal(row["share"]),
                ]
            )
        for what, names in (("ours", "operators"), ("its own quantizer", "operators_of_own_quantizer")):
            found = ", ".join(f"{count} {name}" for name, count in sorted(run["sizes"][names].items()))
            operators.append([run["network"], what, found])
    if not rows:
        return NOT_YET
    header = ["network", "batch", "times eager PyTorch", "goal", "times ONNX Runtime's own quantizer", "goal"]
    header += ["int8 Gop/s", "peak", "share", "goal"]
    executed = markdown(["network", "file", "operators that ONNX Runtime executes"], operators, 3)
    return f"{markdown(header, rows)}\n\n{executed}\n\n{where(record)}."


def latency_whole(record: Contents) -> str:
    """Both tables of the benchmark of latency."""
    return f"{latency(record)}\n\n{latency_details(record)}"


def startup(record: Contents) -> str:
    """Seconds until a process ends."""
    rows = [
        [f"`{row['what']}`", f"{row['median_s']:.3f}", len(row["seconds"]), goal(row, "≤")]
        for run in record["runs"]
        for row in run["rows"]
    ]
    return f"{markdown(['process', 'seconds', 'processes', 'goal'], rows)}\n\n{where(record)}."


def memory(record: Contents) -> str:
    """The highest stages of each recipe."""
    rows = []
    for run in record["runs"]:
        stages = sorted(run["rows"], key=lambda row: -row["peak_bytes"])[:3]
        shown = ", ".join(f"{row['stage']} {row['peak_bytes'] / 1e9:.2f}" for row in stages)
        how = "whole" if run["full"] else "short"
        goal_gb = {"goal": run["goal"] / 1e9, "met": run["met"]}
        rows.append([run["recipe"], how, f"{run['peak_bytes'] / 1e9:.2f}", goal(goal_gb, "≤"), shown])
    table = markdown(["recipe", "how", "peak GB", "goal", "the highest stages, GB"], rows, 2)
    return f"{table}\n\n{where(record)}."


def main_job(record: Contents) -> str:
    """Seconds of the whole job, and what came out of it."""
    rows = []
    for run in record["runs"]:
        for row in run["rows"]:
            artifact = row["accuracies"]["artifact"]
            rows.append(
                [
                    f"{run['fraction']:.0%}",
                    row["who"],
                    f"{row['median_s']:.0f}",
                    f"{row['ours_times_faster']:.2f}",
                    goal(row),
                    *(f"{100 * artifact[what]:.1f}" for what in ("clean", "fgsm", "pgd-20")),
                    ", ".join(f"{step} {seconds:.0f}" for step, seconds in row["seconds_of_steps"].items()),
                ]
            )
    header = ["images", "who", "seconds", "ours is faster, times", "goal"]
    header += ["artifact: clean %", "FGSM %", "PGD-20 %", "of these seconds"]
    return f"{markdown(header, rows, 2)}\n\n{where(record)}."


def training_cost(record: Contents) -> str:
    """Multiply-adds and time of a training, beside the reference's."""
    rows = []
    for run in record["runs"]:
        steps = [f"{row['steps']:,} of {1e3 * statistics.median(row['seconds_a_step']):.1f} ms" for row in run["rows"]]
        parts = [f"{found} {row['part']}" for found, row in zip(steps, run["rows"], strict=True)]
        minutes = f"{run['seconds'] / 60:.1f}", f"{run['reference_seconds'] / 60:.0f}"
        shares = f"{run['share_of_seconds']:.1%}", f"{run['share_of_macs']:.1%}"
        rows.append([run["row"], "; ".join(parts), *minutes, *shares])
    header = ["network", "steps", "minutes", "minutes of the reference", "time, beside it", "multiply-adds, beside it"]
    return f"{markdown(header, rows, 2)}\n\n{where(record)}."


def goals(records: Mapping[str, Contents]) -> str:
    """Every goal beside what was found; ``records`` are those that are there, by name."""
    found: list[tuple[str, str, Contents]] = []
    for run in records.get("training_speed", _NONE)["runs"]:
        peers = [row for row in run["rows"] if row["goal"] is not None]
        if not peers:
            continue  # nobody did the same work
        hardest = min(peers, key=lambda row: row["ours_times_faster"])
        what = f"adversarial training, {run['network']}, {run['attack']}: times the fastest of the others"
        found.append((what, f"{hardest['ours_times_faster']:.2f} ({hardest['who']})", {**hardest, "sign": "≥"}))
    for run in records.get("quantization_overhead", _NONE)["runs"]:
        ours = next(row for row in run["rows"] if row["who"] == "ours")
        what = f"fake-quantized training step, {run['network']}, {run['precision']}: times float"
        found.append((what, f"{ours['times_float']:.2f}", {**ours, "sign": "≤"}))
    for row in (row for run in records.get("latency", _NONE)["runs"] for row in run["rows"] if "own_quantizer" in row):
        where_ = f"{row['network']}, batch {row['batch']}"
        own = row["own_quantizer"]
        found += [
            (f"latency, {where_}: times eager PyTorch", f"{row['times_faster_than_eager']:.1f}", {**row, "sign": "≥"}),
            (
                f"latency, {where_}: times ONNX Runtime's own quantizer",
                f"{own['times_faster']:.2f}",
                {**own, "sign": "≥"},
            ),
            (f"share of the int8 peak, {where_}", f"{row['share_of_peak']:.0%}", {**row["share"], "sign": "≥"}),
        ]
        for other in _same_file_in_openvino(records["latency"], row):
            times = other["times_faster_than_eager"]
            judged = {"goal": row["goal"], "met": row["goal"] is not None and times >= row["goal"], "sign": "≥"}
            found.append((f"latency, {where_}: times eager PyTorch, the file in OpenVINO", f"{times:.1f}", judged))
    for run in records.get("main_job", _NONE)["runs"]:
        row = next(row for row in run["rows"] if row["who"] == "by hand")
        what = f"whole main job, {run['fraction']:.0%} of the images: times by hand"
        found.append((what, f"{row['ours_times_faster']:.2f}", {**row, "sign": "≥"}))
    for row in (row for run in records.get("startup", _NONE)["runs"] for row in run["rows"]):
        found.append((f"`{row['what']}`, s", f"{row['median_s']:.3f}", {**row, "sign": "≤"}))
    for run in records.get("memory", _NONE)["runs"]:
        gigabytes = {"goal": run["goal"] / 1e9, "met": run["met"], "sign": "≤"}
        found.append((f"peak memory of `{run['recipe']}`, GB", f"{run['peak_bytes'] / 1e9:.2f}", gigabytes))
    rows = [[what, value, goal(row, row["sign"])] for what, value, row in found if row["goal"] is not None]
    return markdown(["what", "found", "goal"], rows) if rows else NOT_YET


def _same_file_in_openvino(record: Contents, row: Contents) -> list[Contents]:
    same = row["network"], row["batch"], "int8, openvino"
    return [r for run in record["runs"] for r in run["rows"] if (r["network"], r["batch"], r["what"]) == same]


def profiles(record: Contents) -> str:
    """What part each kind of operation has of a step."""
    kinds = list(dict.fromkeys(kind for run in record["runs"] for row in run["rows"] for kind in row["shares"]))
    rows = []
    for run in record["runs"]:
        for row in run["rows"]:
            parts = [row["shares"][kind] for kind in kinds]
            shown = [f"{part:.0%}" for part in (*parts, 1 - sum(parts))]
            rows.append([run["network"], run["step"], row["way"], f"{1e3 * row['median_s']:.1f}", *shown])
    return f"{markdown(['network', 'step', 'who', 'ms', *kinds, 'the rest'], rows, 3)}\n\n{where(record)}."


def limits(record: Contents) -> str:
    """How many times faster than a plain loop anybody could be."""
    rows = []
    for run in record["runs"]:
        (row,) = run["rows"]
        times = (f"{1e3 * row[name]:.1f}" for name in ("plain_s", "necessary_s"))
        most = f"{row['most']:.2f}", f"{row['share_of_peak']:.0%}", f"{row['most_at_peak']:.2f}"
        rows.append([run["network"], f"{run['step']}, {run['images']} images", *times, *most])
    header = [
        "network",
        "step",
        "plain loop, ms",
        "products alone, ms",
        "plain loop / products",
        "share of the bf16 peak",
    ]
    return f"{markdown([*header, 'plain loop / at the peak'], rows, 2)}\n\n{where(record)}."


def training_watch(record: Contents) -> str:
    """What the guard of a training sees of a finished network."""
    pgd, asked = record["attack"], record["asked"]
    beyond = f"{pgd} leaves and {asked} breaks, % of the first {record['asked_n']}"
    header = ["network", "masking panel", "clean %", f"under {pgd} %", beyond, "said"]
    rows = []
    for row in record["rows"]:
        accuracies = (f"{100 * row[name]:.1f}" for name in ("clean_accuracy", "robust_accuracy", "beyond_gradients"))
        rows.append([row["network"], row["panel"], *accuracies, "yes" if row["misleads"] else "no"])
    times = [row["times_pgd_alone"] for row in record["rows"]]
    said = (
        f"A look takes {statistics.median(times):.2f} times as long as {pgd} alone "
        f"(median of the networks, {min(times):.2f} to {max(times):.2f})."
    )
    return f"{markdown(header, rows, 2)}\n\n{said}"


TABLES: dict[str, Callable[[Contents], str]] = {
    "training_speed": training_speed,
    "training_cost": training_cost,
    "training_watch": training_watch,
    "quantization_overhead": quantization_overhead,
    "latency": latency,
    "latency_details": latency_details,
    "main_job": main_job,
    "startup": startup,
    "memory": memory,
    "profiles": profiles,
    "limits": limits,
}
"""Kind of a table, which for most is the name of a record: the table as Markdown."""
