"""How long until coldforge answers?

    python benchmarks/startup.py [--turns 15]
    python benchmarks/startup.py --table

Whole processes in turns: `coldforge --help`, `import coldforge`, and a Python that does nothing; wall time of each,
after one of each that is not counted. The whole takes 15 seconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tables
from turns import Record, arguments_of, in_turns, judged

SCRIPT = Path(sys.executable).with_name("coldforge")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "coldforge"]
PROCESSES: dict[str, tuple[list[str], float | None]] = {
    "coldforge --help": ([*COMMAND, "--help"], 0.3),
    "import coldforge": ([sys.executable, "-c", "import coldforge"], 0.5),
    "an empty program": ([sys.executable, "-c", "pass"], None),
}
"""Name: command, and the goal in seconds."""


def seconds_of(what: str) -> float:
    """Wall time of one process."""
    command, _ = PROCESSES[what]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    arguments = arguments_of(parser, "results/startup.json", tables.startup, parts=False)
    in_turns(PROCESSES, 1, lambda what, _: seconds_of(what))
    found = in_turns(PROCESSES, arguments.turns, lambda what, _: seconds_of(what))
    rows = []
    for what, seconds in found.items():
        median = statistics.median(seconds)
        rows.append({"what": what, "seconds": seconds, "median_s": median})
        rows[-1] |= judged(median, PROCESSES[what][1], at_most=True)
    record = Record(arguments.out, "what")
    record.keep({"what": "startup", "rows": rows})
    print(tables.startup(record.content))


if __name__ == "__main__":
    main()
