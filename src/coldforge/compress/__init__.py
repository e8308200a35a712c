"""Compression: structured channel pruning, quantization, and checkpoints that replay both without pickle."""

from coldforge.compress.checkpoint import Structure, build, load_network, read_structure, save_network
from coldforge.compress.fakequant import ActivationQuantizer, Backward, QuantizedLayer, attacking, fake_quantize
from coldforge.compress.graph import fold_batchnorm, trace
from coldforge.compress.prune import PruningPlan, prune, replay
from coldforge.compress.quantize import calibrate, insert_quantizers, quantize, set_bits, weight_bit_widths

__all__ = [
    "ActivationQuantizer",
    "Backward",
    "PruningPlan",
    "QuantizedLayer",
    "Structure",
    "attacking",
    "build",
    "calibrate",
    "fake_quantize",
    "fold_batchnorm",
    "insert_quantizers",
    "load_network",
    "prune",
    "quantize",
    "read_structure",
    "replay",
    "save_network",
    "set_bits",
    "trace",
    "weight_bit_widths",
]
