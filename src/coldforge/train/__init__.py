"""Training: one loop, natural and adversarial, that resumes to the same bits."""

from coldforge.train.loop import TrainResult, train
from coldforge.train.objective import Objective
from coldforge.train.schedule import learning_rate, ramped_eps

__all__ = ["Objective", "TrainResult", "learning_rate", "ramped_eps", "train"]
