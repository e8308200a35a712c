"""The stages of the arrow: plain functions from the shop and upstream stages to a declared :class:`Stage`."""

from coldforge.stages.evidence import ONNX_FILE, agree, evaluate, export, gallery, masking, measure
from coldforge.stages.networks import baseline, control, finetune, finetune_in_float, harden, prune, quantize, reference
from coldforge.stages.shop import Arrow, Shop, Stage, read_json
from coldforge.stages.training import joined_outcomes

__all__ = [
    "ONNX_FILE",
    "Arrow",
    "Shop",
    "Stage",
    "agree",
    "baseline",
    "control",
    "evaluate",
    "export",
    "finetune",
    "finetune_in_float",
    "gallery",
    "harden",
    "joined_outcomes",
    "masking",
    "measure",
    "prune",
    "quantize",
    "read_json",
    "reference",
]
