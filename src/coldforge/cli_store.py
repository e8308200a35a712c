"""The commands ``coldforge store ...``."""

from __future__ import annotations

import sys

from cyclopts import App

store_app = App(
    name="store",
    help="List, check and prune the finished stages that runs have left behind.",
    help_epilogue="Example:\n\ncoldforge store list",
)


@store_app.command(name="list", help_epilogue="Example:\n\ncoldforge store list")
def store_list(*, json: bool = False) -> None:
    """List the finished stages, their sizes, and whether a record needs them.

    Args:
        json: print as JSON.
    """
    from coldforge.console import print_entries
    from coldforge.store import Store

    store = Store()
    print_entries(store.entries(), json)
    if not json:
        from coldforge.report.text import size

        sys.stdout.write(f"{store.root}: {size(store.size_bytes())}\n")


@store_app.command(name="verify", help_epilogue="Example:\n\ncoldforge store verify")
def store_verify(*, json: bool = False) -> int:
    """Check the size and checksum of every file. Damaged stages are rebuilt when a run next needs them.

    Args:
        json: print as JSON.
    """
    from coldforge.console import print_entries
    from coldforge.store import Store

    entries = Store().verify()
    damaged = [entry for entry in entries if entry.problem]
    print_entries(entries if json else damaged, json)
    if not json:
        sys.stdout.write(f"{len(entries)} stages checked, {len(damaged)} damaged\n")
    return 1 if damaged else 0


@store_app.command(name="prune", help_epilogue="Example:\n\ncoldforge store prune --dry-run")
def store_prune(*, dry_run: bool = False, json: bool = False) -> None:
    """Delete the stages that no existing record.json needs, and no run or sweep that was interrupted.

    To give up a run or a sweep, delete its folder first.

    Args:
        dry_run: only say what would be deleted.
        json: print as JSON.
    """
    from coldforge.console import print_entries
    from coldforge.report.text import size
    from coldforge.store import Store

    pruned = Store().prune(dry_run=dry_run)
    print_entries(pruned.entries, json)
    if not json:
        verb = "would be deleted" if dry_run else "deleted"
        sys.stdout.write(f"{len(pruned.entries)} {verb}, {size(pruned.size_bytes)}\n")
