"""Training: one loop, natural and adversarial, that resumes to the same bits."""

from coldforge.train.loop import TrainResult, train
from coldforge.train.objective import Objective, check_inner
from coldforge.train.schedule import learning_rate, ramped_eps
from coldforge.train.team import Team, gathered, help_out, launched, placed

__all__ = [
    "Objective",
    "Team",
    "TrainResult",
    "check_inner",
    "gathered",
    "help_out",
    "launched",
    "learning_rate",
    "placed",
    "ramped_eps",
    "train",
]
