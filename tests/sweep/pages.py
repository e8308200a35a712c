"""A sweep whose numbers look like real ones, for its page: written by the toy workshop, all stages in every record."""

from __future__ import annotations

import math
import zlib

from toy import ToyWorkshop

from coldforge.records import LatencyRecord, MaskingRecord, PruningRatioRecord, Record, StageRecord
from coldforge.sealed import write_atomic
from coldforge.sweep import Listener, SweepSpec, conduct, expand, make_executor, survey

BITS = [
    {"label": label, "quantize.weight_bits": bits, "quantize.activation_bits": bits}
    for label, bits in (("8", 8), ("4", 4))
]
AXES = {"prune.ratio": [0.1, 0.3, 0.5, 0.7], "bits": BITS, "quantize.calibration": ["mse", "minmax"]}
SWEEP = {"name": "small nets", "description": "Widths and bits.", "seeds": [0, 1], "axes": AXES}


class PageWorkshop(ToyWorkshop):
    """Records with all stages. Suspect: 4 bits at 0.7; not checked: at 0.5; not timed: at 0.3 with minmax."""

    def __reduce__(self):
        return PageWorkshop, (self.root, self.record)

    def finish(self, trial, path):
        write_atomic(path, record_of(self.record, trial).to_json())


def record_of(base: Record, trial) -> Record:
    """Smooth numbers, with a little luck that depends on the trial alone."""
    ratio, bits = trial.recipe.prune.ratio, trial.recipe.quantize.weight_bits
    minmax = trial.recipe.quantize.calibration == "minmax"
    loss = 0.16 * ratio**2 + 0.25 * (4 / bits) ** 3 * (1.2 if minmax else 1.0) * (0.2 + ratio) * 0.4

    def luck(what: str) -> float:
        return (zlib.crc32(f"{what} {trial.id}".encode()) % 1000 / 1000 - 0.5) * 0.016

    def stage(name, label, clean, robust, **more) -> StageRecord:
        dense = name == "baseline"
        macs = 9_640_000 if dense else 9_640_000 * (1 - ratio) ** 2
        packed = 2_200_000 if dense else 2_200_000 * (1 - ratio) ** 2 * bits / 32
        clean, robust = max(0.1, clean + luck(label)), max(0.0, robust + (luck(label + "r") if robust else 0))
        robusts = {"fgsm": robust + 0.04, "pgd-20": robust, "worst_case": robust}
        n = 10_000
        fields = {
            "name": name, "label": label, "params": round(macs / 17), "macs": round(macs),
            "size_bytes": round(packed if dense else 2_200_000 * (1 - ratio) ** 2 / 4 + 12_000),
            "packed_bytes": round(packed),
            "weight_bits": 32 if dense else bits, "activation_bits": 32 if dense else bits,
            "pruning_ratio": PruningRatioRecord(requested=ratio, achieved=ratio), "n": n,
            "clean_accuracy": clean, "clean_ci95": _interval(clean, n), "robust_accuracy": robusts,
            "robust_n": dict.fromkeys(robusts, 1000),
            "robust_ci95": {key: _interval(value, 1000) for key, value in robusts.items()}, "per_class": {},
        }  # fmt: skip
        return StageRecord(**(fields | more))

    slow = [("pytorch", 1.1e-3), ("onnxruntime", 3.1e-4)]
    fast = [] if ratio == 0.3 and minmax else [("onnxruntime", 4e-5 + 2.6e-4 * (1 - ratio) ** 2)]
    verdict = "suspect" if bits == 4 and ratio == 0.7 else "not_run" if ratio == 0.5 else "ok"
    energy = {"energy_method": "estimated (10 W per busy core x CPU seconds)"}
    stages = (
        stage("baseline", "baseline", 0.92, 0.0, latency_s=_latencies(slow), train_seconds=82.0),
        stage("compressed", "compressed, not tuned", 0.86 - 3.2 * loss, 0.0),
        stage("tuned", "naturally tuned", 0.915 - 0.5 * loss, 0.004, train_seconds=20 + 60 * (1 - ratio)),
        stage("tuned", "adversarially tuned", 0.855 - loss, 0.75 - loss, train_seconds=40 + 120 * (1 - ratio)),
        stage("artifact", "artifact (model.onnx)", 0.855 - loss, 0.75 - loss, latency_s=_latencies(fast),
              masking=MaskingRecord(verdict=verdict), energy_j_per_image=4e-4 + 1.3e-3 * (1 - ratio) ** 2, **energy),
    )  # fmt: skip
    return base.model_copy(update={"stages": stages})


def _latencies(found) -> tuple[LatencyRecord, ...]:
    return tuple(
        LatencyRecord(runtime=runtime, batch=batch, threads=1, median=m * batch**0.8, p10=0.9 * m, p90=1.2 * m)
        for runtime, m in found
        for batch in (1, 64)
    )


def _interval(p: float, n: int) -> tuple[float, float]:
    half = 1.96 * math.sqrt(max(p * (1 - p), 0.25 / n) / n)
    return max(0.0, p - half), min(1.0, p + half)


def write_sweep_folder(folder, record: Record, *, trouble=None, listener=None, **changes):
    """Run the sweep in ``folder / "out"``; returns that folder."""
    spec = SweepSpec.model_validate({**SWEEP, "recipe": {"name": "r"}, **changes})
    workshop = PageWorkshop(folder / "store", record, trouble=trouble)
    trials = expand(spec)
    state = survey(spec, trials, workshop, folder / "out")
    conduct(state, workshop, make_executor("serial", workshop, workers=1, threads=1), folder / "out",
            listener=listener or Listener())  # fmt: skip
    return folder / "out"
