"""Compression: structured channel pruning, quantization, and checkpoints that replay both without pickle."""

from coldforge.compress.checkpoint import Structure, build, load_network, read_structure, save_network
from coldforge.compress.fakequant import (
    ActivationQuantizer,
    Backward,
    QuantizedLayer,
    attacking,
    fake_quantize,
    is_quantized,
)
from coldforge.compress.fold import fold_quantized
from coldforge.compress.graph import batchnorm_behind, fold_batchnorm, network_digest, scale_and_shift, trace
from coldforge.compress.importance import taylor
from coldforge.compress.kernels import fused
from coldforge.compress.prune import PruningPlan, joined, prune, replay
from coldforge.compress.quantize import (
    calibrate,
    insert_quantizers,
    quantize,
    refit,
    set_bits,
    weight_bit_widths,
)
from coldforge.compress.rectify import rectified

__all__ = [
    "ActivationQuantizer",
    "Backward",
    "PruningPlan",
    "QuantizedLayer",
    "Structure",
    "attacking",
    "batchnorm_behind",
    "build",
    "calibrate",
    "fake_quantize",
    "fold_batchnorm",
    "fold_quantized",
    "fused",
    "insert_quantizers",
    "is_quantized",
    "joined",
    "load_network",
    "network_digest",
    "prune",
    "quantize",
    "read_structure",
    "rectified",
    "refit",
    "replay",
    "save_network",
    "scale_and_shift",
    "set_bits",
    "taylor",
    "trace",
    "weight_bit_widths",
]
