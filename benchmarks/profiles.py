"""Where does the time of a training step go, and of a step of an attack?

    python benchmarks/profiles.py [--only resnet20 "training step"] [--seconds 2]
    python benchmarks/profiles.py --table

A training step is forward and backward pass to all weights of a pruned network that is rounded to int8, on 64 images; a
step of an attack, forward and backward pass to the pixels, with weights that are rounded once. Under bf16 autocast,
channels-last, where the CPU has bfloat16. Three ways in turns: the network in float; ours; and ours without its kernels
and with a ReLU in a pass of its own, as it was before. The time is the median without the profiler; the profiler of
torch then tells what part each kind of operation has of it.

The whole takes about a minute on two quiet cores.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from itertools import product

import tables
import torch
from networks import CLASSES, SHAPES, Untrained, untrained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from turns import Record, Run, arguments_of, chosen

from coldforge.compress import attacking, fold_batchnorm, fused, rectified
from coldforge.measure import measure_latency
from coldforge.models import channels_last
from coldforge.provenance import has_bf16

STEPS = ("training step", "attack step")
WAYS = ("float", "ours", "ours, before")
BATCH, RATIO, PROFILED = 64, 0.5, 10
KINDS = {
    "convolutions, forward": ("aten::convolution",),
    "convolutions, backward": ("ConvolutionBackward0",),
    "linear layers": ("aten::addmm", "aten::mm"),
    "rounding": (
        *("_FakeQuantize", "_FakeQuantizeBackward", "_FusedFakeQuantize", "_FusedFakeQuantizeBackward"),
        *("_RoundBias", "_RoundBiasBackward"),
    ),
    "ReLU": ("aten::relu", "ReluBackward0"),
}
"""Kind of operation to the events that hold all of its time. What is left: casts of weights, additions, gradients that
are added up, and Python."""


def call_of(step: str, way: str, networks: Untrained) -> Callable[[], None]:
    """One step, to be timed and profiled."""
    images = channels_last(networks.images[:BATCH])
    labels = torch.arange(len(images)) % CLASSES
    network = channels_last(fold_batchnorm(networks.parent) if way == "float" else networks.twin)
    ours = way == "ours"

    def run() -> None:
        with fused(ours), rectified(network) if ours else contextlib.nullcontext():
            if step == "training step":
                _step(network, images, labels, list(network.parameters()))
            else:
                with attacking(network):
                    _step(network, images.clone().requires_grad_(), labels, [])

    return run


def _step(network: nn.Module, images: Tensor, labels: Tensor, parameters: list[nn.Parameter]) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
        logits = network(images)
    wanted = [parameter for parameter in parameters if parameter.requires_grad] or [images]
    torch.autograd.grad(F.cross_entropy(logits.float(), labels), wanted, allow_unused=True)


def shares(call: Callable[[], None]) -> dict[str, float]:
    """Part of the time for each kind of operation."""
    call()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(PROFILED):
            call()
    averages = profiled.key_averages()
    whole = sum(event.self_cpu_time_total for event in averages)
    times = {event.key: event.cpu_time_total for event in averages}
    return {kind: sum(times.get(name, 0.0) for name in names) / whole for kind, names in KINDS.items()}


def measured(name: str, step: str, seconds: float) -> Run:
    """All ways in turns, then profiled."""
    networks = untrained(name, RATIO)
    calls = {way: call_of(step, way, networks) for way in WAYS}
    rows = []
    for way, timing in measure_latency(calls, seconds=seconds).items():
        rows.append({"way": way, "median_s": timing.median, "shares": shares(calls[way])})
        print(f"{name:9} {step:14} {way:13} {1e3 * timing.median:7.2f} ms", flush=True)
    return {"network": name, "step": step, "batch": BATCH, "ratio": RATIO, "rows": rows}


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each row")
    arguments = arguments_of(parser, "results/profiles.json", tables.profiles)
    names, steps = chosen(arguments.only, SHAPES, STEPS)
    record = Record(arguments.out, "network", "step")
    measure = partial(measured, seconds=arguments.seconds)
    record.keep_each(product(names, steps), measure, missing=arguments.missing)
    print(tables.profiles(record.content))


if __name__ == "__main__":
    main()
