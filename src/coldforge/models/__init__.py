"""Networks: a small zoo, other people's architectures and checkpoints, and normalization as the first layer."""

from coldforge.models.checkpoints import checkpoint_file, load_weights
from coldforge.models.checks import check_classifier
from coldforge.models.layout import channels_last, torch_threads
from coldforge.models.loading import MEMORY, ModelSource, model_source
from coldforge.models.normalize import Normalize, normalized
from coldforge.models.zoo import ZOO, OptionAShortcut, cnn8, resnet18, resnet20

__all__ = [
    "MEMORY",
    "ZOO",
    "ModelSource",
    "Normalize",
    "OptionAShortcut",
    "channels_last",
    "check_classifier",
    "checkpoint_file",
    "cnn8",
    "load_weights",
    "model_source",
    "normalized",
    "resnet18",
    "resnet20",
    "torch_threads",
]
