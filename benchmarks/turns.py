"""What the benchmarks of speed share: turns, ratios, and records that grow run by run.

A *run* is what was measured together, such as everybody who trains one network under one attack; its *rows* are the
contenders. It is written as soon as it is there, in the place of an older one of the same name, so a benchmark can be
stopped and go on (``--missing``), or be asked for a part (``--only``; a run of some contenders replaces that of all).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from coldforge.provenance import has_bf16, physical_cores, provenance
from coldforge.sealed import write_atomic

T = TypeVar("T")
Who = TypeVar("Who")
Run = dict[str, Any]


def in_turns(contenders: Iterable[Who], turns: int, run: Callable[[Who, int], T]) -> dict[Who, list[T]]:
    """A B C A B C ...: what ``run(contender, turn)`` returned, so that a slow moment of the machine slows all."""
    found: dict[Who, list[T]] = {contender: [] for contender in contenders}
    for turn in range(turns):
        for contender, results in found.items():
            results.append(run(contender, turn))
    return found


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of first / second, each pair of the same turn."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def judged(value: float, goal: float | None, *, at_most: bool = False) -> dict[str, Any]:
    """``goal`` and ``met`` of a row; both None where there is no goal."""
    met = None if goal is None else (value <= goal if at_most else value >= goal)
    return {"goal": goal, "met": met}


def chosen(only: Sequence[str], *kinds: Iterable[str]) -> list[list[str]]:
    """Of each kind of names those that ``only`` has; all of a kind where it has none of them.

    Raises:
        SystemExit: for a name that is of no kind.
    """
    known = [list(kind) for kind in kinds]
    names = [name for kind in known for name in kind]
    if unknown := [name for name in only if name not in names]:
        raise SystemExit(f"--only: expected any of {', '.join(names)}, got {', '.join(unknown)}")
    return [[name for name in kind if name in only] or kind for kind in known]


def version(package: str) -> str:
    """Name and version of an installed package."""
    return f"{package} {metadata.version(package)}"


def installed(modules: Mapping[str, str]) -> list[str]:
    """Those contenders whose module (contender to module) is there; says which are not."""
    missing = [who for who, module in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        hint = "pip install --no-deps -r benchmarks/requirements-peers.txt"
        print(f"left out, because not installed: {', '.join(missing)} ({hint})", flush=True)
    return [who for who in modules if who not in missing]


class Record:
    """A file of runs.

    Args:
        path: JSON; read if it is there.
        keys: entries of a run by which it is known.
    """

    def __init__(self, path: Path, *keys: str) -> None:
        self._path, self._keys = path, keys
        self.content: dict[str, Any] = {"runs": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))

    def has(self, *values: object) -> bool:
        """Whether there is a run whose keys have these values."""
        return any(tuple(run[key] for key in self._keys) == values for run in self.content["runs"])

    def keep_each(self, keys: Iterable[tuple[Any, ...]], measure: Callable[..., Run], *, missing: bool) -> None:
        """Measure and keep the run of each of ``keys``; with ``missing`` only those that are not there."""
        for values in keys:
            if not (missing and self.has(*values)):
                self.keep(measure(*values))

    def keep(self, run: Run, seed: int = 0) -> None:
        """Write a run, with threads and provenance, in the place of the one with the same keys."""
        run = {**run, "threads": torch.get_num_threads(), "bf16": has_bf16()}
        run["provenance"] = provenance(seed, ["python", *sys.argv])
        kept = [old for old in self.content["runs"] if any(old[key] != run[key] for key in self._keys)]
        self.content = {"runs": [*kept, run]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(self.content, indent=1) + "\n")


def arguments_of(
    parser: argparse.ArgumentParser, out: str, table: Callable[[dict[str, Any]], str], *, parts: bool = True
) -> argparse.Namespace:
    """The command line, with what every benchmark takes; with ``--table`` the record is printed and that is all.

    Args:
        parser: with the benchmark's own options.
        out: the record.
        table: the record as Markdown.
        parts: whether it can run in part.
    """
    if parts:
        parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="networks, attacks, ... to be run")
        parser.add_argument("--missing", action="store_true", help="leave out what the record holds already")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--table", action="store_true", help="print the record as Markdown and run nothing")
    parser.add_argument("--out", type=Path, default=Path(out))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))
        raise SystemExit(0)
    return arguments
