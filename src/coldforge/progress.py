"""How long work tells what it is doing: a silent base class that the command line replaces by a live display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One planned stage."""

    label: str
    estimate_s: float
    """Estimated seconds; 0 where the stage is already in the store."""
    cached: bool = False


class Progress:
    """Receives what happens; does nothing. Subclass it to show a bar, to log, or to stop a run (raise)."""

    def plan(self, steps: Sequence[Step]) -> None:
        """Called once, before any work, with every stage in order."""

    def begin(self, label: str) -> None:
        """A stage starts (or is found in the store)."""

    def advance(self, fraction: float, detail: str = "") -> None:
        """The current stage is done up to ``fraction`` (0 to 1)."""

    def note(self, text: str) -> None:
        """Something a person should read: a collapse and its retry, a damaged entry rebuilt."""

    def end(self, label: str, *, cached: bool = False) -> None:
        """A stage is complete."""
