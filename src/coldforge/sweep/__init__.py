"""Sweeps: many trials of one recipe, their common stages made once, on one machine or a cluster.

What makes the stages of a recipe, :mod:`coldforge.sweep.workshop`, brings torch with it; the rest does without.
"""

from coldforge.sweep.executors import Executor, make_executor
from coldforge.sweep.folder import Failure, alone_in
from coldforge.sweep.graph import Graph, Task, Workshop
from coldforge.sweep.outcome import Outcome
from coldforge.sweep.run import Listener, State, conduct, survey, time_left
from coldforge.sweep.spec import SweepSpec, Trial, expand, load_sweep

__all__ = [
    "Executor",
    "Failure",
    "Graph",
    "Listener",
    "Outcome",
    "State",
    "SweepSpec",
    "Task",
    "Trial",
    "Workshop",
    "alone_in",
    "conduct",
    "expand",
    "load_sweep",
    "make_executor",
    "survey",
    "time_left",
]
