"""How fast are our attacks beside the peers', on the same images in one run?

    COLDFORGE_CIFAR10=DIR python benchmarks/attacks_speed.py [--n 1000] [--repeats 5] [--only autoattack]
    python benchmarks/attacks_speed.py --table

PGD-20 beside torchattacks, ART and foolbox, and the standard ensemble beside the reference; every peer twice: as its
users run it (fp32, default layout, its default batch size), and helped (channels-last network and images, bf16
autocast around the model, the batch size at which this network gives most gradients a second). Everybody attacks the
same images, all of them right when clean, in turns, and what they found is verified in fp32 outside the clock. Ours
judges every iterate, and images that are fooled leave; the PGD of the others returns its last iterate, which is all
that is judged: nothing is added to their time for the verdicts of the others, nor for that one. Ours is run as
coldforge runs it (fp32, channels-last), and helped: a bf16 search whose successes are confirmed in fp32 on the clock.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from peers import NETWORKS, NOTES, Helped, Outcome, Task, compare, default_batch, load_task, version
from turns import Record, arguments_of, chosen, in_turns, median_ratio

from coldforge.models import channels_last
from coldforge.provenance import cpu_model

RIVALS = {"pgd-20": ("torchattacks", "art", "foolbox"), "autoattack": ("reference",)}
"""Attack: peers that do the same work."""
GOALS = {("pgd-20", "torchattacks"): 2.5, ("pgd-20", "art"): 2.5, ("autoattack", "reference"): 3.0}
"""How many times faster than the peer, as its users run it, ours is to be."""
OURS = ("fp32, channels-last; tiles of 64", "bf16 search, successes confirmed in fp32")
BATCHES = (32, 64, 128, 256, 512, 1024)


def best_batch(task: Task) -> int:
    """The batch size at which the helped network gives most gradients a second; median of three."""
    network = Helped(channels_last(load_task(task.name, 1).network))
    found = {}
    for batch in [size for size in BATCHES if size <= len(task.images)] or [len(task.images)]:
        seconds = []
        for _ in range(4):
            images = task.images[:batch].clone().requires_grad_()
            started = time.perf_counter()
            torch.autograd.grad(network(images).sum(), images)
            seconds.append(time.perf_counter() - started)
        found[batch] = batch / statistics.median(seconds[1:])
    return max(found, key=lambda batch: found[batch])


def race(task: Task, attack: str, whos: Iterable[str], repeats: int, reference: str) -> list[dict[str, Any]]:
    """Rows of one attack: everybody in turns, ``repeats`` times."""
    batch = best_batch(task)
    contenders = [(who, helped) for who in ("ours", *whos) for helped in (False, True)]

    def turn(contender: tuple[str, bool], number: int) -> Outcome:
        who, helped = contender
        size = batch if helped and who != "ours" else default_batch(who, attack)
        found = compare(who, attack, task, seed=number, batch=size, helped=helped, reference=reference)
        print(f"{task.name:18} {attack:10} {who:12} {say(helped):7} {found.seconds:9.2f} s", flush=True)
        return found

    outcomes = in_turns(contenders, repeats, turn)
    seconds = {contender: [run.seconds for run in runs] for contender, runs in outcomes.items()}
    rows = []
    for who, helped in contenders:
        runs = outcomes[who, helped]
        row: dict[str, Any] = {
            "who": who,
            "version": version(who, reference),
            "how": say(helped),
            "batch": runs[0].batch,
            "seconds": seconds[who, helped],
            "median_s": statistics.median(seconds[who, helped]),
            "robust": statistics.mean(float((~run.fooled).float().mean()) for run in runs),
            "forward_images": runs[0].forward,
            "gradient_images": runs[0].backward,
            "note": OURS[helped] if who == "ours" else NOTES.get((who, attack), "").partition(";")[0],
        }
        for name, bf16 in (("slower_than_ours", False), ("slower_than_ours_bf16", True)):
            row[name] = median_ratio(seconds[who, helped], seconds["ours", bf16])
        rows.append(row)
    return rows


def say(helped: bool) -> str:
    """Name of a row's kind."""
    return "helped" if helped else "as run"


def verdicts(record: dict[str, Any]) -> list[str]:
    """One line for each goal."""
    lines = []
    for run in record["runs"]:
        for row in run["rows"]:
            goal = GOALS.get((run["attack"], row["who"]))
            if goal and row["how"] == "as run":
                ours = {"fp32": row["slower_than_ours"], "bf16 search": row["slower_than_ours_bf16"]}
                found = (f"{how} {times:.2f}: {'met' if times >= goal else 'NOT MET'}" for how, times in ours.items())
                who = f"{row['version']} as its users run it"
                what = f"{run['cpu']}: {run['network']} {run['attack']}"
                lines.append(f"{what}, {goal:g} times faster than {who}: {', '.join(found)}")
    return lines


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "| processor | network | attack | who | how | batch | seconds | times ours | times ours, bf16 | stand % "
        "| passes an image | gradients an image | note |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in record["runs"]:
        for row in run["rows"]:
            n = run["n"]
            lines.append(
                f"| {run['cpu']} | {run['network']} | {run['attack']} | {row['version']} | {row['how']} "
                f"| {row['batch']} | {row['median_s']:.2f} "
                f"| {row['slower_than_ours']:.2f} | {row['slower_than_ours_bf16']:.2f} | {100 * row['robust']:.1f} "
                f"| {row['forward_images'] / n:.0f} | {row['gradient_images'] / n:.0f} "
                f"| {row['note']} |"
            )
    runs = {(run["n"], run["threads"], run["provenance"]["hardware"]["cpu"]) for run in record["runs"]}
    where = "; ".join(f"{n} images, {threads} threads, {cpu}" for n, threads, cpu in sorted(runs))
    return "\n".join([*lines, "", f"Right when clean: all. {where}.", "", *(f"- {line}" for line in verdicts(record))])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="images, the first that are right when clean")
    parser.add_argument("--repeats", type=int, default=5, help="of PGD-20, after one turn to warm up")
    parser.add_argument("--ensemble-repeats", type=int, default=1)
    parser.add_argument("--reference", default="", help="folder with a clone of fra31/auto-attack")
    arguments = arguments_of(parser, "results/attacks_speed.json", table)
    networks, attacks, rivals = chosen(arguments.only, NETWORKS, RIVALS, sum(RIVALS.values(), ()))
    record, cpu = Record(arguments.out, "cpu", "network", "attack"), cpu_model()
    for network in networks:
        task = load_task(network, 2 * arguments.n + 100).only_right(arguments.n)
        for attack in attacks:
            if arguments.missing and record.has(cpu, network, attack):
                continue
            whos = [who for who in RIVALS[attack] if who in rivals]
            if attack == "pgd-20":
                race(task, attack, whos, 1, arguments.reference)
            repeats = arguments.repeats if attack == "pgd-20" else arguments.ensemble_repeats
            rows = race(task, attack, whos, repeats, arguments.reference)
            record.keep({"cpu": cpu, "network": network, "attack": attack, "n": len(task.labels), "rows": rows})
    print(table(record.content))


if __name__ == "__main__":
    main()
