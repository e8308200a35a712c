"""How much longer do forward and backward pass take when a network is fake-quantized?

    python benchmarks/quantization_overhead.py [--only resnet18 brevitas] [--seconds 3]
    python benchmarks/quantization_overhead.py --table

Training steps (forward, cross-entropy, backward to all weights) of one pruned network on one batch: in float, and
fake-quantized to int8 by ours (as training does, with compiled kernels and without), by torch's own operators on
fixed grids (see plain.py), by Brevitas and by torchao's pt2e flow for x86, the last two as their documentation has it.
All quantize the same float network with BatchNorm folded and get the same channels-last images; all in turns, in
float32 and, where the CPU has it, under bf16 autocast. The overhead is relative to the float network in the same
precision. Ours learns its steps, and so does Brevitas; pt2e observes ranges.

The whole takes about 4 minutes on two quiet cores; --only takes names of networks, precisions and contenders.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import tables
import torch
from networks import CLASSES, SHAPES, untrained
from plain import plain_quantized
from torch import Tensor, nn
from torch.nn import functional as F
from turns import Record, Run, arguments_of, chosen, installed, judged, version

from coldforge.compress import fused, rectified
from coldforge.compress.graph import fold_batchnorm
from coldforge.measure import measure_latency
from coldforge.models import channels_last
from coldforge.provenance import has_bf16

PRECISIONS = ("fp32", "bf16")
CONTENDERS = {
    "float": "torch",
    "ours": "coldforge",
    "ours, uncompiled": "coldforge",
    "torch's own operators": "torch",
    "brevitas": "brevitas",
    "torchao pt2e": "torchao",
}
"""Contender: the module that it needs."""
PACKAGES = {"brevitas": "brevitas", "torchao pt2e": "torchao"}
GOAL = 1.35
"""Times the float network."""


def quantized_by(who: str, parent: nn.Module, twin: nn.Module, images: Tensor) -> nn.Module:
    """A network in training mode, channels-last."""
    folded = fold_batchnorm(parent)
    make: dict[str, Callable[[], nn.Module]] = {
        "float": lambda: folded,
        "ours": lambda: copy.deepcopy(twin),
        "ours, uncompiled": lambda: copy.deepcopy(twin),
        "torch's own operators": lambda: plain_quantized(twin),
        "brevitas": lambda: _brevitas(folded, images),
        "torchao pt2e": lambda: _pt2e(folded, images),
    }
    return channels_last(make[who]())


def _brevitas(network: nn.Module, images: Tensor) -> nn.Module:
    """Its default: int8 weights and activations, scales of activations learned from calibrated ones."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    quantized = quantize(preprocess_for_quantize(network, equalize_iters=0))
    with torch.no_grad(), calibration_mode(quantized):
        quantized(images)
    return quantized.train()


def _pt2e(network: nn.Module, images: Tensor) -> nn.Module:
    """Quantization-aware training with the quantizer for x86 CPUs."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(network.train(), (images,), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))


def step(network: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool, compiled: bool) -> None:
    """Forward and backward pass; gradients of the step before are dropped."""
    for parameter in network.parameters():
        parameter.grad = None
    with fused(compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()


def race(name: str, ratio: float, precision: str, contenders: list[str], batch: int, seconds: float) -> Run:
    """Everybody in turns on one network."""
    torch._dynamo.reset()  # one network a process is what a recipe has
    networks = untrained(name, ratio)
    images = channels_last(networks.images[:batch])
    labels = torch.arange(len(images)) % CLASSES
    calls, skipped = {}, {}
    rectifying = contextlib.ExitStack()
    for who in contenders:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            network = quantized_by(who, networks.parent, networks.twin, images)
            if who.startswith("ours"):
                rectifying.enter_context(rectified(network))

        def call(network: nn.Module = network, compiled: bool = who == "ours") -> None:
            step(network, images, labels, bf16=precision == "bf16", compiled=compiled)

        try:
            call()
        except (RuntimeError, NotImplementedError) as error:  # a peer that does not know bf16
            skipped[who] = str(error).strip().splitlines()[0]
            print(f"{name:9} {precision} {who:22} left out: {skipped[who]}", flush=True)
        else:
            calls[who] = call
    found = measure_latency(calls, seconds=seconds)
    rows: list[dict[str, Any]] = []
    for who, timing in found.items():
        overhead = timing.median / found["float"].median
        rows.append(
            {
                "who": who,
                "version": version(PACKAGES[who]) if who in PACKAGES else "",
                "median_s": timing.median,
                "p10_s": timing.p10,
                "p90_s": timing.p90,
                "repeats": timing.repeats,
                "times_float": overhead,
                **judged(overhead, GOAL if who == "ours" else None, at_most=True),
            }
        )
        print(f"{name:9} {precision} {who:22} {1e3 * timing.median:9.2f} ms  {overhead:5.2f} x float", flush=True)
    return {"network": name, "precision": precision, "batch": batch, "ratio": ratio, "rows": rows, "skipped": skipped}


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="timed seconds for each row")
    arguments = arguments_of(parser, "results/quantization_overhead.json", tables.quantization_overhead)
    networks, precisions, contenders = chosen(arguments.only, SHAPES, PRECISIONS, CONTENDERS)
    there = installed(CONTENDERS)
    contenders = [who for who in there if who == "float" or who in contenders]
    record = Record(arguments.out, "network", "precision")
    possible = [precision for precision in precisions if precision == "fp32" or has_bf16()]
    record.keep_each(
        itertools.product(networks, possible),
        lambda name, precision: race(name, arguments.ratio, precision, contenders, arguments.batch, arguments.seconds),
        missing=arguments.missing,
    )
    print(tables.quantization_overhead(record.content))


if __name__ == "__main__":
    main()
