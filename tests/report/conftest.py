"""Sample records and examples: what the report layer reads, without any training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coldforge.recipe import Recipe
from coldforge.records import (
    AgreementRecord,
    CurvePoint,
    LatencyRecord,
    MaskingCheckRecord,
    MaskingRecord,
    PruningRatioRecord,
    Record,
    StageRecord,
    ThreatModelRecord,
)
from coldforge.report.examples import Examples

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
N = 10_000


def _wilson(p: float, n: int) -> tuple[float, float]:
    z = 1.959964
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return center - half, center + half


def _robust(fgsm: float, pgd: float, worst: float, n: int = N) -> dict[str, Any]:
    found = {"fgsm": fgsm, "pgd-20": pgd, "worst_case": worst}
    return {
        "robust_accuracy": found,
        "robust_n": dict.fromkeys(found, n),
        "robust_ci95": {name: _wilson(value, n) for name, value in found.items()},
    }


def _latency(runtime: str, one: float, many: float) -> tuple[LatencyRecord, ...]:
    return tuple(
        LatencyRecord(runtime=runtime, batch=batch, threads=2, median=m, p10=0.96 * m, p90=1.12 * m)
        for batch, m in ((1, one), (64, many))
    )


def _per_class(clean: float, worst: float, classes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    spread = np.sin(np.arange(len(classes)) * 1.9)
    return {
        name: {
            "n": N / len(classes),
            "clean": min(1.0, max(0.0, clean + 0.09 * float(s))),
            "worst_case": max(0.0, min(worst + 0.2 * float(s), clean + 0.09 * float(s) - 0.02)),
        }
        for name, s in zip(classes, spread, strict=True)
    }


def _curve(clean: list[float], robust: list[float], eps: float = 0.1) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            epoch=index + 1,
            loss=1.4 / (index + 1) + 0.3,
            lr=0.05 / (index + 1),
            eps=min(eps, eps * (index + 1) / 2) if eps else 0.0,
            clean_accuracy=c,
            robust_accuracy=r,
        )
        for index, (c, r) in enumerate(zip(clean, robust, strict=True))
    )


def _stage(name: Any, label: str, clean: float, classes: tuple[str, ...], **changes: Any) -> StageRecord:
    dense = name in ("baseline", "reference")
    fields: dict[str, Any] = {
        "name": name,
        "label": label,
        "params": 550_570 if dense else 140_218,
        "macs": 9_640_000 if dense else 2_480_000,
        "size_bytes": 2_206_000 if dense else 161_300,
        "packed_bytes": 2_202_280 if dense else 142_912,
        "weight_bits": 32 if dense else 8,
        "activation_bits": 32 if dense else 8,
        "pruning_ratio": PruningRatioRecord(requested=0.0 if dense else 0.5, achieved=0.0 if dense else 0.5),
        "n": N,
        "clean_accuracy": clean,
        "clean_ci95": _wilson(clean, N),
        "per_class": {},
        **_robust(0.0, 0.0, 0.0),
    }
    return StageRecord(**(fields | changes))


MASKING_OK = MaskingRecord(
    verdict="ok",
    checks=(
        MaskingCheckRecord(
            name="eps sweep reaches zero",
            passed=True,
            value=0.0,
            threshold=0.02,
            meaning="With eps of half the pixel range nothing may survive.",
        ),
        MaskingCheckRecord(
            name="iterative beats single step",
            passed=True,
            value=0.041,
            threshold=0.0,
            meaning="PGD must be at least as strong as FGSM.",
        ),
    ),
)
MASKING_SUSPECT = MaskingRecord(
    verdict="suspect",
    checks=(
        MASKING_OK.checks[0],
        MaskingCheckRecord(
            name="square attack not stronger",
            passed=False,
            value=0.182,
            threshold=0.02,
            meaning="An attack without gradients fooled images that PGD did not: gradients may be masked.",
        ),
    ),
)


def build_record(
    *,
    masking: MaskingRecord = MASKING_OK,
    latency: bool = True,
    artifact: bool = True,
    extras: bool = True,
    box: bool = True,
    classes: tuple[str, ...] = CLASSES,
    recipe: dict[str, Any] | None = None,
    name: str = "fashion-mnist",
) -> Record:
    """A record with realistic numbers: cnn8 on Fashion-MNIST at eps 0.1."""
    dense = _latency("pytorch", 0.00118, 0.0190) + _latency("onnxruntime", 0.00031, 0.0060) if latency else ()
    small = _latency("onnxruntime", 0.00009, 0.0015) if latency else ()
    energy = {"energy_method": "estimated (10 W per busy core x CPU seconds)"}
    tough = _robust(0.7912, 0.7503, 0.7498)
    stages = [
        _stage(
            "baseline",
            "baseline",
            0.9203,
            classes,
            latency_s=dense,
            train_seconds=61.0,
            train_macs=1.4e13,
            per_class=_per_class(0.92, 0.0, classes),
            energy_j_per_image=0.0061,
            **energy,
            curve=_curve([0.83, 0.87, 0.885, 0.9, 0.908, 0.915, 0.918, 0.9215], [-1] * 8, eps=0.0),
            **_robust(0.0821, 0.0031, 0.0029),
        ),
        _stage("compressed", "compressed", 0.8504, classes, latency_s=small, **_robust(0.0502, 0.0022, 0.0021)),
        _stage(
            "tuned",
            "naturally tuned",
            0.9152,
            classes,
            train_seconds=21.4,
            train_macs=1.6e12,
            curve=_curve([0.902, 0.911, 0.916], [0.006, 0.005, 0.005], eps=0.0),
            **_robust(0.0911, 0.0053, 0.0051),
        ),
        _stage(
            "tuned",
            "adversarially tuned",
            0.8449,
            classes,
            train_seconds=64.8,
            train_macs=3.4e12,
            curve=_curve([0.81, 0.832, 0.846], [0.64, 0.723, 0.752]),
            **tough,
            notes=("Training collapsed at lr 0.05 in epoch 1 and was started again at lr 0.0167.",),
        ),
    ]
    if artifact:
        stages.append(
            _stage(
                "artifact",
                "artifact (int8 ONNX)",
                0.8448,
                classes,
                latency_s=small,
                masking=masking,
                agreement=AgreementRecord(clean=0.9997, adversarial=0.9991),
                energy_j_per_image=0.00042,
                **energy,
                per_class=_per_class(0.845, 0.75, classes),
                **tough,
            )
        )
    if extras:
        stages += [
            _stage(
                "reference",
                "dense adversarially trained",
                0.8631,
                classes,
                train_seconds=1932.0,
                train_macs=4.1e14,
                latency_s=dense,
                curve=_curve([0.80, 0.83, 0.85, 0.86], [0.70, 0.74, 0.76, 0.773]),
                **_robust(0.8100, 0.7731, 0.7729),
            ),
            _stage(
                "control",
                "control from scratch",
                0.8012,
                classes,
                train_seconds=64.9,
                train_macs=3.4e12,
                curve=_curve([0.70, 0.77, 0.80], [0.55, 0.66, 0.691]),
                **_robust(0.7366, 0.6921, 0.6919),
            ),
        ]
    resolved = Recipe(name=name).model_dump(mode="json") if recipe is None else recipe
    return Record(
        coldforge_version="0.1.0",
        recipe=resolved,
        provenance={
            "command": "coldforge run fashion-mnist",
            "created": "2025-11-22T20:57:00+00:00",
            "seed": 0,
            "git_commit": "0123456789abcdef",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.32.0"},
            "hardware": {"cpu": "AMD EPYC 9B14", "cores": 2, "flags": ["avx2", "avx512_bf16", "avx512_vnni"]},
            "data": {"name": "fashion-mnist", "fingerprint": "a" * 64, "train": 55000, "validation": 5000, "test": N},
            "stage_keys": {"baseline": "b" * 64, "prune": "c" * 64, "finetune-adversarial": "d" * 64},
            "classes": list(classes),
        },
        threat_model=ThreatModelRecord(norm="linf", eps=0.1, eps_255=25.5, box=box),
        stages=tuple(stages),
    )


def build_examples(
    *, count: int = 6, channels: int = 1, side: int = 28, classes: tuple[str, ...] = CLASSES
) -> Examples:
    """Smooth random images, one network fooled on all of them and one on every third."""
    draw = np.random.default_rng(0)
    grid = np.linspace(0, 3, side)
    waves = draw.uniform(1, 3, (count, channels, 2))
    clean = np.stack(
        [[0.5 + 0.5 * np.outer(np.sin(a * grid), np.cos(b * grid)) for a, b in image] for image in waves]
    ).astype(np.float32)
    labels = np.arange(count) % len(classes)
    wrong = (labels + 1) % len(classes)
    some = np.where(np.arange(count) % 3 == 2, wrong, labels)
    noise = {
        label: 0.1 * np.sign(draw.standard_normal(clean.shape)) for label in ("naturally tuned", "artifact (int8 ONNX)")
    }
    return Examples(
        clean=clean,
        labels=labels,
        classes=classes,
        adversarial={label: np.clip(clean + part, 0, 1).astype(np.float32) for label, part in noise.items()},
        predictions={"naturally tuned": (labels, wrong), "artifact (int8 ONNX)": (labels, some)},
        eps=0.1,
    )


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """Builder of sample records."""
    return build_record


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., Examples]:
    """Builder of sample examples."""
    return build_examples


@pytest.fixture(scope="session")
def masking_suspect() -> MaskingRecord:
    """A masking verdict that is suspect, with one failed check."""
    return MASKING_SUSPECT


@pytest.fixture(scope="session")
def minimal_record() -> Record:
    """Only a baseline, nothing attacked, nothing timed, an unknown recipe, no provenance."""
    stage = _stage("baseline", "baseline", 0.5, CLASSES, robust_accuracy={}, robust_n={}, robust_ci95={})
    return Record(
        coldforge_version="0.1.0",
        recipe={"written_by": "a later version"},
        provenance={},
        threat_model=ThreatModelRecord(norm="linf", eps=8 / 255, eps_255=8.0, box=True),
        stages=(stage,),
    )
