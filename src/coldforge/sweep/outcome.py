"""One task of a sweep, made, and what became of it."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass

from coldforge.errors import ColdforgeError, StoreError
from coldforge.sweep.graph import Workshop
from coldforge.sweep.spec import Trial

MOST_LOSSES = 3
"""A stage whose worker died so often is given up: it may be what kills them."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    key: str
    seconds: float
    error: str = ""
    """One line for people; empty where it was made."""
    details: str = ""
    """The traceback."""
    hopeless: bool = False
    """Whether nothing else can be made either: the store cannot be written."""


def attempt(workshop: Workshop, trial: Trial, key: str) -> Outcome:
    """Make one stage and catch what goes wrong, so that the rest of a sweep goes on."""
    begin = time.monotonic()
    try:
        workshop.make(trial, key)
    except ColdforgeError as error:
        hopeless = isinstance(error, StoreError)
        return Outcome(key, time.monotonic() - begin, str(error), traceback.format_exc(), hopeless)
    except Exception as error:
        return Outcome(key, time.monotonic() - begin, f"{type(error).__name__}: {error}", traceback.format_exc())
    return Outcome(key, time.monotonic() - begin)
