"""The artifact against the dense network, and against other ways to make an int8 file, side by side in one run.

    python benchmarks/latency.py [--only resnet18] [--ratio 0.5] [--seconds 3]
    python benchmarks/latency.py --table

For each network, at batch 1 and 64, timed in turns: the dense one in eager PyTorch fp32, in ONNX Runtime and (if it is
installed) in OpenVINO; our pruned int8 file in ONNX Runtime and in OpenVINO; and the file that ONNX Runtime's own
static quantizer (QDQ, weights per channel) makes of the same pruned float network from the same calibration images.
Weights are untrained: a forward pass takes the same time with any.

Share of the machine: in the same turns a large product of 8-bit matrices (u8 times s8, MatMulInteger of ONNX Runtime,
the fastest of several sizes) shows what these cores can do; the share is the file's operations a second (two for each
multiply-add) relative to that. Printed, too: what operators ONNX Runtime really executes for the int8 files.

The whole takes about 5 minutes on two quiet cores; --only takes names of networks.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tables
import torch
from networks import CLASSES, SHAPES, Untrained, untrained
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor
from turns import Record, Run, arguments_of, chosen, judged

from coldforge.deploy import OnnxSession, export_onnx, open_session
from coldforge.measure import count_macs, measure_latency

EAGER, OURS = "dense fp32, eager pytorch", "int8, onnxruntime"
OWN_QUANTIZER = "int8 by onnxruntime's quantizer, onnxruntime"
GOALS = {("resnet18", 1): 20.0, ("resnet18", 64): 18.0}
"""Network, batch: times faster than eager PyTorch."""
SHARE_GOALS = {("resnet18", 64): 0.4}
"""Network, batch: share of the int8 peak."""
PEAK_SIZES = (1024, 2048)
"""Rows and columns of the matrices."""


def write_files(networks: Untrained, name: str, folder: Path) -> dict[str, Path]:
    """Dense and pruned float files, ours, and that of ONNX Runtime's own quantizer."""
    files = {what: folder / f"{number}.onnx" for number, what in enumerate(("dense fp32", "parent fp32", "int8"))}
    for model, path in zip((networks.dense, networks.parent, networks.twin), files.values(), strict=True):
        classes = [str(label) for label in range(CLASSES)]
        export_onnx(model, path, image_shape=SHAPES[name], classes=classes, metadata={})
    own = files[OWN_QUANTIZER.partition(",")[0]] = folder / "own.onnx"
    static_quantize(files["parent fp32"], own, networks.images)
    return files


class _Images(CalibrationDataReader):
    """Calibration images in batches of 64."""

    def __init__(self, images: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(images.split(64))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch.numpy()}


def static_quantize(source: Path, target: Path, images: Tensor) -> None:
    """ONNX Runtime's post-training quantization as its documentation has it for CNNs on x86."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # advice to preprocess, which our exporter has done
        try:
            quantize_static(
                str(source),
                str(target),
                _Images(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)


def matrix_product(size: int, threads: int) -> Callable[[], object]:
    """A product of two ``size`` x ``size`` matrices, u8 times constant s8, in ONNX Runtime."""
    generator = np.random.default_rng(0)
    weights = generator.integers(-127, 128, (size, size), np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weights"], ["sums"])],
        "peak",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, (size, size))],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, (size, size))],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    codes = generator.integers(0, 256, (size, size), np.uint8)
    return lambda: session.run(None, {"codes": codes})


def compare(name: str, ratio: float, threads: int, seconds: float) -> Run:
    """Everything about one network."""
    networks = untrained(name, ratio)
    macs = {what: count_macs(getattr(networks, what), SHAPES[name]) for what in ("dense", "parent")}
    runtimes = ["onnxruntime"] + ["openvino"] * bool(importlib.util.find_spec("openvino"))
    products = {f"product of {size}": matrix_product(size, threads) for size in PEAK_SIZES}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(networks, name, Path(folder))
        ours = OnnxSession(files["int8"], threads=threads)
        sessions = {
            f"{what}, {runtime}": open_session(files[what], runtime, threads=threads)
            for what in ("dense fp32", "int8")
            for runtime in runtimes
        }
        own = OWN_QUANTIZER.partition(",")[0]
        sessions[OWN_QUANTIZER] = open_session(files[own], threads=threads)
        sizes = {what: path.stat().st_size for what, path in files.items()}
        for batch in (1, 64):
            images = networks.images[:batch]
            with torch.inference_mode():
                calls: dict[str, Callable[[], object]] = {EAGER: partial(networks.dense, images)}
                calls |= {who: partial(session.run, images) for who, session in sessions.items()}
                found = measure_latency(calls | products, seconds=seconds)
            peak = max(2 * size**3 / found[f"product of {size}"].median for size in PEAK_SIZES)
            for who in calls:
                timing = found[who]
                times = found[EAGER].median / timing.median
                share = 2 * macs["parent"] * batch / timing.median / peak  # of int8; a MAC is two operations
                rows.append(
                    {
                        "network": name,
                        "what": who,
                        "batch": batch,
                        "median_s": timing.median,
                        "p10_s": timing.p10,
                        "p90_s": timing.p90,
                        "images_per_s": batch / timing.median,
                        "times_faster_than_eager": times,
                        **judged(times, GOALS.get((name, batch)) if who == OURS else None),
                        "peak_ops_per_s": peak,
                        "share_of_peak": share if who.startswith("int8") else None,
                    }
                )
                if who == OURS:
                    own_times = found[OWN_QUANTIZER].median / timing.median
                    rows[-1]["own_quantizer"] = {"times_faster": own_times, **judged(own_times, 1.0)}
                    rows[-1]["share"] = judged(share, SHARE_GOALS.get((name, batch)))
                print(f"{name:9} batch {batch:2}  {who:45} {1e3 * timing.median:9.3f} ms  {times:6.1f} x", flush=True)
        made = {
            "achieved_ratio": networks.achieved,
            "macs_dense": macs["dense"],
            "macs_pruned": macs["parent"],
            "dense_bytes": sizes["dense fp32"],
            "parent_bytes": sizes["parent fp32"],
            "int8_bytes": sizes["int8"],
            "own_quantizer_bytes": sizes[own],
            "integer_kernels_only": ours.uses_integer_kernels(),
            "operators": dict(ours.operators()),
            "operators_of_own_quantizer": dict(OnnxSession(files[own]).operators()),
        }
    return {"network": name, "ratio": ratio, "rows": rows, "sizes": made}


def main() -> None:
    """Run what is asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=3.0, help="timed seconds for each row")
    arguments = arguments_of(parser, "results/latency.json", tables.latency_whole)
    (names,) = chosen(arguments.only, SHAPES)
    record = Record(arguments.out, "network", "ratio")
    measure = partial(compare, threads=arguments.threads, seconds=arguments.seconds)
    record.keep_each([(name, arguments.ratio) for name in names], measure, missing=arguments.missing)
    print(tables.latency_whole(record.content))


if __name__ == "__main__":
    main()
