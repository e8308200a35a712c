"""Are our attacks as strong as the reference implementation's, image by image?

    COLDFORGE_CIFAR10=DIR python benchmarks/attacks_parity.py [--n 1000] [--peers] [--only apgd-t cifar10-resnet20]
    python benchmarks/attacks_parity.py --table

Every attack of the standard ensemble, and the ensemble, ours and the reference's (pyautoattack, or a clone of
fra31/auto-attack with --reference DIR), on the same images of two robust networks, with two seeds; with --peers also
torchattacks, ART and foolbox, and PGD-20, once. Robust accuracy is the share of all images that are right when clean
and not fooled; the 95 % interval is that of the paired difference (``coldforge.evaluate.paired_interval``). Where an
ensemble was not run as such, it is the union of its parts. Each result is written at once and skipped
when it is there already, so the hours it takes need not be hours in a row; seconds are from that run, one after the
other (attacks_speed.py takes turns).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import ATTACKS, NETWORKS, NOTES, OFFERS, Task, compare, load_task, version
from torch import Tensor

from coldforge.attacks import parse_attack
from coldforge.evaluate import paired_interval
from coldforge.provenance import physical_cores, provenance
from coldforge.sealed import write_atomic

WITHIN, WEAKER = 0.3, 0.2
"""Points: largest difference in either direction, and by how much the ensemble may be weaker."""
Result = dict[str, Any]


def to_hex(bits: Tensor) -> str:
    """Bits ``(N,)`` as hexadecimal digits, the first image in the highest bit of the first byte."""
    return np.packbits(bits.numpy()).tobytes().hex()


def from_hex(text: str, n: int) -> np.ndarray:
    """What :func:`to_hex` wrote, as bool ``(n,)``."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


def standing(result: Result, n: int = 0) -> np.ndarray:
    """Which of the first ``n`` images (0: all) are right when clean and not fooled."""
    fooled, right = (from_hex(result[bits], result["n"]) for bits in ("fooled", "right"))
    return (right & ~fooled)[: n or None]


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Difference of two paired fractions and its 95 % interval, in points."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    low, high = paired_interval(only_first, only_second, len(first))
    return 100 * (only_first - only_second) / len(first), 100 * low, 100 * high


def with_ensembles(results: list[Result]) -> list[Result]:
    """``results`` and, where an ensemble was not run as such, the union of its four parts.

    For ours that is what the ensemble gives, image by image: the random numbers of an image depend on seed, attack and
    image alone. The reference runs each part on the images that the parts before left, in other batches, so with other
    random numbers: the union has the same distribution. FAB-T draws nothing, so one seed serves for all.
    """
    parts = ATTACKS[1:-1]
    found = {(r["network"], r["attack"], r["who"], r["seed"], r["n"], r["weights"]): r for r in results}
    union = []
    for network, attack, who, seed, n, weights in found:
        if attack != parts[0] or (network, ATTACKS[-1], who, seed, n, weights) in found:
            continue
        members = [
            next((found[key] for at in (seed, 0) if (key := (network, part, who, at, n, weights)) in found), None)
            if part == "fab-t"
            else found.get((network, part, who, seed, n, weights))
            for part in parts
        ]
        if all(members):
            whole = [member for member in members if member]
            fooled = np.logical_or.reduce([from_hex(member["fooled"], n) for member in whole])
            right = from_hex(whole[0]["right"], n)
            sums = {key: sum(m[key] for m in whole) for key in ("seconds", "forward_images", "gradient_images")}
            union.append(
                {**whole[0], **sums, "attack": ATTACKS[-1], "fooled": to_hex(torch.from_numpy(fooled)), "outside": 0}
                | {"robust_accuracy": int((right & ~fooled).sum()) / n, "note": "union of its four parts"}
            )
    return [*results, *union]


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """(network, attack, who, seed) that are wanted."""
    only = set(arguments.only)
    if unknown := only - {*NETWORKS, *ATTACKS, *OFFERS}:
        known = ", ".join([*NETWORKS, *ATTACKS, *OFFERS])
        raise SystemExit(f"--only: unknown {', '.join(unknown)}; expected any of {known}")

    def wanted(choices: Iterable[str]) -> list[str]:
        return [choice for choice in choices if choice in only or not only & set(choices)]

    for network in wanted(NETWORKS):
        for attack in wanted(ATTACKS):
            for who in wanted(OFFERS):
                peer = who not in ("ours", "reference") or attack == "pgd-20"
                if attack in OFFERS[who] and (arguments.peers or not peer):
                    yield from ((network, attack, who, seed) for seed in arguments.seeds[: 1 if peer else None])


def is_same(result: Result, network: str, attack: str, who: str, seed: int, n: int, weights: str = "") -> bool:
    """Whether a stored result is of this job, and of these weights."""
    same = (result["network"], result["attack"], result["who"], result["seed"], result["n"])
    return same == (network, attack, who, seed, n) and weights in ("", result["weights"])


def is_of_today(result: Result) -> bool:
    """Whether a result of ours is of the attack as it is now: versions go up where an attack may find other points."""
    return result["who"] != "ours" or result.get("settings") == settings(result["attack"])


def settings(attack: str) -> dict[str, Any]:
    """All that defines an attack of ours, as plain values."""
    found: dict[str, Any] = json.loads(json.dumps(parse_attack(attack).describe()))
    return found


def run(task: Task, attack: str, who: str, seed: int, reference: str, *, mixed: bool = False) -> Result:
    """One result as it is stored."""
    ours = who == "ours"  # as it is run by coldforge; the others get the same function, quicker
    mixed = mixed and attack != "square"  # which compares losses everywhere, so bf16 would weaken it
    found = compare(who, attack, task, seed=seed, helped=ours, folded=not ours, mixed=mixed, reference=reference)
    n = len(task.labels)
    origin = provenance(seed)
    return {
        "network": task.name,
        "weights": task.digest,
        "eps": task.threat_model.eps,
        "attack": attack,
        "who": who,
        "version": version(who, reference),
        **({"settings": settings(attack)} if ours else {}),
        "seed": seed,
        "n": n,
        "robust_accuracy": int((task.right & ~found.fooled).sum()) / n,
        "clean_accuracy": int(task.right.sum()) / n,
        "outside": found.outside,
        "seconds": found.seconds,
        "threads": torch.get_num_threads(),
        "forward_images": found.forward,
        "gradient_images": found.backward,
        "batch": found.batch,
        "precision": "mixed" if ours or mixed else "fp32",
        "note": NOTES.get((who, attack), ""),
        "fooled": to_hex(found.fooled),
        "right": to_hex(task.right),
        "git_commit": origin["git_commit"],
        "git_dirty": origin["git_dirty"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def verdicts(results: list[Result]) -> Iterator[dict[str, Any]]:
    """Ours against the reference wherever both were run on the same images with the same seed; then over all seeds.

    The yardstick beside it is how far the reference is from itself with another seed.
    """
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for ours in sorted(results, key=place):
        for theirs in results:
            job = (ours["network"], ours["attack"], "reference", ours["seed"], ours["n"], ours["weights"])
            if ours["who"] == "ours" and is_same(theirs, *job):
                pairs.setdefault((ours["network"], ours["attack"]), []).append((ours, theirs))
    for found in pairs.values():
        for pair in found:
            yield verdict([pair], [theirs for _, theirs in found])
        if len(found) > 1:
            yield verdict(found, [])


def verdict(pairs: list[tuple[Result, Result]], references: list[Result]) -> dict[str, Any]:
    """Ours and the reference with the same seed, or the mean over several seeds: paired image by image."""
    first, n = pairs[0][0], pairs[0][0]["n"]
    each = np.mean([100.0 * standing(ours) - 100.0 * standing(theirs) for ours, theirs in pairs], axis=0)
    points, half = float(each.mean()), 1.96 * float(each.std()) / n**0.5
    low, high = difference(*map(standing, pairs[0]))[1:] if len(pairs) == 1 else (points - half, points + half)
    others = [other for other in references if other["seed"] != first["seed"]]
    passed = abs(points) <= WITHIN + 1e-9 and not (first["attack"] == ATTACKS[-1] and points > WEAKER + 1e-9)
    return {
        **{key: first[key] for key in ("network", "attack", "n")},
        "seed": first["seed"] if len(pairs) == 1 else "mean",
        "ours": float(np.mean([ours["robust_accuracy"] for ours, _ in pairs])),
        "reference": float(np.mean([theirs["robust_accuracy"] for _, theirs in pairs])),
        "difference_points": points,
        "ci95_points": (low, high),
        "reference_between_seeds_points": [difference(standing(pairs[0][1]), standing(o))[0] for o in others],
        "passed": passed,
    }


def merged(record: dict[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """The record with the results of other files, which processes that ran at the same time have written."""
    results = list(record["results"])
    for file in files:
        other = json.loads(file.read_text(encoding="utf-8"))
        record = {**record, "provenance": other["provenance"]}
        for new in other["results"]:
            job = (new["network"], new["attack"], new["who"], new["seed"], new["n"])
            results = [old for old in results if not is_same(old, *job)] + [new]
    return {**record, "results": results, "verdicts": list(verdicts(with_ensembles(results)))}


def place(result: Result) -> tuple[int, ...]:
    """Where a result stands in the table."""
    network, attack, who = [*NETWORKS].index(result["network"]), ATTACKS.index(result["attack"]), result["who"]
    return network, attack, [*OFFERS].index(who), result["seed"], result["n"]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: ours against the reference, then everybody side by side."""
    lines = [
        f"Right when clean and under the attack, % of all images. Within: at most {WITHIN} points apart, and the "
        f"ensemble not more than {WEAKER} weaker.",
        "",
        "| network | attack | seed | n | ours % | reference % | ours - reference, points [95 %] "
        "| reference - itself, other seed | within |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in verdicts(with_ensembles(record["results"])):
        low, high = row["ci95_points"]
        lines.append(
            f"| {row['network']} | {row['attack']} | {row['seed']} | {row['n']} | {100 * row['ours']:.2f} "
            f"| {100 * row['reference']:.2f} | {row['difference_points']:+.2f} [{low:+.2f}, {high:+.2f}] "
            f"| {', '.join(f'{points:+.2f}' for points in row['reference_between_seeds_points'])} "
            f"| {'yes' if row['passed'] else '**no**'} |"
        )
    lines += [
        "",
        "| network | attack | who | seed | n | robust % | ours on the same images % | seconds "
        "| forward passes an image | gradients an image | note |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    results = with_ensembles(record["results"])
    for result in sorted(results, key=place):
        same = [
            ours
            for ours in results
            if ours["who"] == "ours"
            and all(ours[key] == result[key] for key in ("network", "attack", "seed", "weights"))
            and ours["n"] >= result["n"]
        ]
        beside = f"{100 * standing(same[0], result['n']).mean():.1f}" if same and result["who"] != "ours" else ""
        note = result["note"] + (f" {result['outside']} outside the ball" if result["outside"] else "")
        lines.append(
            f"| {result['network']} | {result['attack']} | {result['version']} | {result['seed']} | {result['n']} "
            f"| {100 * result['robust_accuracy']:.1f} | {beside} | {result['seconds']:.1f} "
            f"| {result['forward_images'] / result['n']:.0f} | {result['gradient_images'] / result['n']:.0f} | {note} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="test images, from the first on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--peers", action="store_true", help="torchattacks, ART, foolbox and PGD-20 too, first seed")
    parser.add_argument("--only", nargs="+", default=[], help="networks, attacks and names that are to be run")
    parser.add_argument("--again", action="store_true", help="run and replace what is there already")
    parser.add_argument("--reference", default="", help="folder with a clone of fra31/auto-attack")
    parser.add_argument("--mixed", action="store_true", help="the others' networks in bf16 far from their boundary")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--table", action="store_true", help="print the record as Markdown and run nothing")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="add the results of these files and stop")
    parser.add_argument("--out", type=Path, default=Path("results/attacks_parity.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"results": []}
    if arguments.table:
        print(table(record))
        return
    if arguments.merge:
        write_atomic(arguments.out, json.dumps(merged(record, arguments.merge), indent=1) + "\n")
        return
    tasks: dict[str, Task] = {}
    for network, attack, who, seed in jobs(arguments):
        if network not in tasks:
            tasks[network] = load_task(network, arguments.n)
        task = tasks[network]
        job = network, attack, who, seed, arguments.n
        present = [old for old in record["results"] if is_same(old, *job, task.digest) and is_of_today(old)]
        name = f"{network:18} {attack:10} {who:12} seed {seed}"
        if present and not arguments.again:
            print(f"{name}  {100 * present[0]['robust_accuracy']:5.1f} %  (there already)", flush=True)
            continue
        result = run(task, attack, who, seed, arguments.reference, mixed=arguments.mixed)
        kept = [old for old in record["results"] if not is_same(old, *job)]
        record = {"results": sorted([*kept, result], key=place), "provenance": provenance(seed, ["python", *sys.argv])}
        record["verdicts"] = list(verdicts(with_ensembles(record["results"])))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")
        passes, gradients = (result[f"{what}_images"] / result["n"] for what in ("forward", "gradient"))
        cost = f"{result['seconds']:7.1f} s  {passes:.0f} passes, {gradients:.0f} gradients an image"
        print(f"{name}  {100 * result['robust_accuracy']:5.1f} %  {cost}", flush=True)
    for row in record.get("verdicts", []):
        low, high = row["ci95_points"]
        apart = f"{row['difference_points']:+.2f} points [{low:+.2f}, {high:+.2f}]"
        name = f"{row['network']:18} {row['attack']:10} seed {row['seed']} n {row['n']}"
        bounds = f"{WITHIN} points" + (f", not more than {WEAKER} weaker" if row["attack"] == "autoattack" else "")
        print(f"{name}: ours - reference {apart}: {'within' if row['passed'] else 'NOT WITHIN'} {bounds}")


if __name__ == "__main__":
    main()
