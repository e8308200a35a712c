"""Data: named sources, images in memory as ``uint8``, batches that are a pure function of (seed, epoch)."""

from coldforge.data.arrays import from_arrays
from coldforge.data.batches import crop_flip, epoch_batches, steps_per_epoch
from coldforge.data.images import Augment, DataSplits, ImageSet
from coldforge.data.sources import SOURCES, load_data

__all__ = [
    "SOURCES",
    "Augment",
    "DataSplits",
    "ImageSet",
    "crop_flip",
    "epoch_batches",
    "from_arrays",
    "load_data",
    "steps_per_epoch",
]
