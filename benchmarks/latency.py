"""The artifact against the dense network, side by side in one run.

    python benchmarks/latency.py [--networks cnn8 resnet20 resnet18] [--ratio 0.5] [--out results/latency.json]

For each network: the dense one in eager PyTorch fp32 and in ONNX Runtime, and the pruned int8 file in ONNX Runtime (and
OpenVINO, if it is installed), timed in turns. Weights are untrained: a forward pass takes the same time with any.
Prints medians and ratios, and writes a JSON record with CPU flags and versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coldforge.compress import prune, quantize
from coldforge.deploy import export_onnx, open_session
from coldforge.measure import count_macs, measure_latency
from coldforge.models import model_source, normalized
from coldforge.provenance import physical_cores, provenance
from coldforge.recipe import PruneSpec, QuantizeSpec

SHAPES = {"cnn8": (1, 28, 28), "resnet20": (3, 32, 32), "resnet18": (3, 32, 32)}


def compare(name: str, ratio: float, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Rows for one network."""
    shape = SHAPES[name]
    classes = [str(label) for label in range(10)]
    source = model_source(f"zoo:{name}", image_shape=shape, num_classes=10)
    dense = normalized(source.build(0), (0.5,) * shape[0], (0.25,) * shape[0]).eval()
    images = torch.rand(256, *shape, generator=torch.Generator().manual_seed(0))
    parent, plan = prune(dense, PruneSpec(ratio=ratio), image_shape=shape)
    twin = quantize(parent, QuantizeSpec(calibration="minmax"), images)
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense fp32": Path(folder, "dense.onnx"), "int8": Path(folder, "int8.onnx")}
        parent_file = Path(folder, "parent.onnx")
        for model, path in ((dense, files["dense fp32"]), (twin, files["int8"]), (parent, parent_file)):
            export_onnx(model, path, image_shape=shape, classes=classes, metadata={})
        sizes = {what: path.stat().st_size for what, path in files.items()}
        sessions = {
            f"{what}, {runtime}": open_session(path, runtime, threads=threads)
            for what, path in files.items()
            for runtime in ("onnxruntime", *(("openvino",) if importlib.util.find_spec("openvino") else ()))
        }
        rows: list[dict[str, Any]] = []
        with torch.inference_mode():
            for batch in (1, 64):
                calls = {"dense fp32, eager pytorch": partial(dense, images[:batch])}
                calls |= {who: partial(session.run, images[:batch]) for who, session in sessions.items()}
                found = measure_latency(calls, seconds=seconds)
                eager = found["dense fp32, eager pytorch"].median
                rows += [
                    {
                        "network": name,
                        "what": who,
                        "batch": batch,
                        "median_s": timing.median,
                        "p10_s": timing.p10,
                        "p90_s": timing.p90,
                        "times_faster_than_eager": eager / timing.median,
                    }
                    for who, timing in found.items()
                ]
        rows.append(
            {
                "network": name,
                "what": "sizes",
                "achieved_ratio": plan.achieved,
                "macs_dense": count_macs(dense, shape),
                "macs_pruned": count_macs(parent, shape),
                "dense_bytes": sizes["dense fp32"],
                "parent_bytes": parent_file.stat().st_size,
                "int8_bytes": sizes["int8"],
                "integer_kernels_only": sessions["int8, onnxruntime"].uses_integer_kernels(),
            }
        )
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--seconds", type=float, default=3.0, help="timed seconds for each row")
    parser.add_argument("--out", type=Path, default=Path("results/latency.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.networks:
        rows += compare(name, arguments.ratio, arguments.threads, arguments.seconds)
    for row in rows:
        name = f"{row['network']:9} "
        if row["what"] == "sizes":
            share, macs = row["int8_bytes"] / row["parent_bytes"], row["macs_pruned"] / row["macs_dense"]
            print(f"{name}int8 file: {share:.1%} of the bytes of the pruned float file; MACs: {macs:.1%} of dense")
        else:
            times = f"{1e3 * row['median_s']:8.3f} ms  {row['times_faster_than_eager']:6.1f} x"
            print(f"{name}batch {row['batch']:2}  {row['what']:26} {times}")
    record = {"rows": rows, "threads": arguments.threads, "provenance": provenance(0, "benchmarks/latency.py")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
