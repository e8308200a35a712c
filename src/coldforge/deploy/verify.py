"""Does a run's folder hold on this machine: the same file, the same labels, integer kernels, the same speed?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coldforge.deploy.agreement import agreement
from coldforge.deploy.runtime import FLOAT_KERNELS, OnnxSession, int8_saturates
from coldforge.errors import ModelError, UsageError
from coldforge.measure.latency import measure_latency
from coldforge.provenance import cpu_model, differences, hardware, versions
from coldforge.records import LEAST_AGREEMENT, LatencyRecord, Record, StageRecord, load_record
from coldforge.sealed import sha256_of, write_atomic

MODEL, PROBE = "model.onnx", "probe.safetensors"

MOST_SLOWDOWN = 2.0
"""A file this many times slower than its record, on the same CPU model, fails."""

_PROBE_TENSORS = ("images", "adversarial", "labels", "clean_answer", "adversarial_answer")


@dataclass(frozen=True)
class Check:
    """One question, answered."""

    name: str
    passed: bool
    expected: str
    found: str
    meaning: str


@dataclass(frozen=True)
class Verification:
    """All checks of a folder."""

    checks: tuple[Check, ...]
    differences: tuple[str, ...] = ()
    """What differs here in versions and hardware from where the folder was made; for information."""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def write_probe(
    path: str | Path,
    *,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    clean_answer: Tensor,
    adversarial_answer: Tensor,
) -> None:
    """Write the images that :func:`verify_folder` asks again, with the answers that the file gave here.

    Args:
        path: the file, ``probe.safetensors`` in the run's folder.
        images: clean test images, uint8 (N, C, H, W).
        adversarial: the last iterates of PGD-20 on them, float32 (N, C, H, W).
        labels: true labels, (N,).
        clean_answer: labels that the file gave to ``images``, (N,).
        adversarial_answer: labels that the file gave to ``adversarial``, (N,).

    Raises:
        UsageError: where the sizes do not fit.
    """
    values = (images, adversarial, labels, clean_answer, adversarial_answer)
    tensors = dict(zip(_PROBE_TENSORS, values, strict=True))
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1 or len(images) == 0 or images.shape != adversarial.shape:
        raise UsageError(f"probe: expected equal numbers of images and answers, at least one, got {sizes}")
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(Path(path), save(whole))


def verify_folder(folder: str | Path, *, seconds: float = 1.0) -> Verification:
    """Check the folder that a run left: record.json, model.onnx, probe.safetensors.

    Args:
        folder: copied from where it was made, as it is.
        seconds: how long to measure each latency of the record.

    Returns:
        The checks: the file's checksum; equal labels on clean and on adversarial images (at least 99.5 %); integer
        kernels, where the file has at most 8 bits and had them where it was made; exact 8-bit sums on this processor;
        latency. And what differs here.

    Raises:
        UsageError: where a part of the folder is missing or unreadable.
    """
    root = Path(folder)
    record = load_record(root)
    stage = record.stage("artifact")
    if stage is None:
        raise UsageError(
            f"{root / 'record.json'}: expected a stage 'artifact', found none; run `coldforge run` to its end"
        )
    file = root / MODEL
    if not file.is_file():
        raise UsageError(f"expected the file {file}, found nothing; copy the whole folder that `coldforge run` wrote")
    probe = _read_probe(root / PROBE)
    differs = tuple(differences(record.provenance, {"versions": versions(), "hardware": hardware()}))
    checks = [_check_checksum(file, record)]
    try:
        session = OnnxSession(file)
    except ModelError as error:
        checks.append(Check("file loads", False, "an ONNX file", str(error), "the file was damaged on its way here"))
        return Verification(tuple(checks), differs)
    clean = _check_labels("labels, clean", session, probe["images"], probe["clean_answer"])
    adversarial = _check_labels("labels, adversarial", session, probe["adversarial"], probe["adversarial_answer"])
    checks += [clean, adversarial]
    if _integers_expected(session, stage):
        checks.append(_check_kernels(session, record))
        reduced = int(session.metadata.get("largest_weight_bits", 8)) < 8
        checks.append(_check_saturation(labels_hold=clean.passed and adversarial.passed, reduced=reduced))
    checks += [_check_latency(file, record, row, probe["images"], seconds) for row in stage.latency_s]
    return Verification(tuple(checks), differs)


def _read_probe(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"expected the probe {path}, found nothing; copy the whole folder that `coldforge run` wrote")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}); copy it again") from None
    missing = [name for name in _PROBE_TENSORS if name not in tensors]
    if missing:
        raise UsageError(f"{path}: expected the tensors {', '.join(_PROBE_TENSORS)}, missing {', '.join(missing)}")
    return tensors


def _check_checksum(file: Path, record: Record) -> Check:
    expected, found = str(record.provenance.get("artifact_sha256", "")), sha256_of(file)
    shown = expected[:16] or "none in the record"
    return Check("checksum", found == expected, shown, found[:16], "model.onnx is the file that the record is about")


def _check_labels(name: str, session: OnnxSession, images: Tensor, answers: Tensor) -> Check:
    found = session.labels(images)
    equal = agreement(answers, found)
    return Check(
        name,
        equal >= LEAST_AGREEMENT,
        f"at least {LEAST_AGREEMENT:.1%}",
        f"{round(equal * len(found))} of {len(found)} ({equal:.1%})",
        "labels that the file gives here as where it was made",
    )


def _integers_expected(session: OnnxSession, stage: StageRecord) -> bool:
    recorded = max(stage.weight_bits, stage.activation_bits)
    return int(session.metadata.get("largest_bits", recorded)) <= 8


def _check_kernels(session: OnnxSession, record: Record) -> Check:
    expected = bool(record.provenance.get("integer_kernels", True))
    operators = session.operators()
    floats = ", ".join(f"{operators[name]} {name}" for name in sorted(FLOAT_KERNELS) if name in operators)
    integer = session.uses_integer_kernels()
    meaning = "every convolution and matrix product runs on 8-bit integers here"
    if not expected:
        meaning = "part of this network runs in floating point, as where it was made"
    found = "integer" if integer else floats or "no convolution or matrix product"
    wanted = "integer" if expected else "in part floating point"
    return Check("kernels", integer or not expected, wanted, found, meaning)


def _check_saturation(*, labels_hold: bool, reduced: bool) -> Check:
    saturates = int8_saturates()
    meaning = "8-bit kernels of this processor add up without loss"
    if saturates and reduced:
        return Check("8-bit sums", labels_hold, "exact", "exact for weights of 7 bits", meaning)
    if saturates:
        meaning = (
            "this processor adds pairs of 8-bit products in 16 bits (no VNNI), so labels may differ from other "
            "machines; export again with deploy.reduce_range = true"
        )
        meaning += "; the labels of the probe still hold" if labels_hold else ""
    return Check("8-bit sums", labels_hold or not saturates, "exact", "saturate" if saturates else "exact", meaning)


def _check_latency(file: Path, record: Record, row: LatencyRecord, images: Tensor, seconds: float) -> Check:
    name = f"latency, {row.runtime}, batch {row.batch}"
    expected = f"{row.median * 1e3:.3g} ms"
    if row.runtime != "onnxruntime":
        return Check(name, True, expected, "not measured", "only ONNX Runtime is measured again")
    session = OnnxSession(file, threads=row.threads)
    part = images[[index % len(images) for index in range(row.batch)]]
    pixels = part.float() / 255
    timing = measure_latency({name: lambda: session.run(pixels)}, seconds=seconds)[name]
    ratio = timing.median / row.median
    here, there = cpu_model(), str(record.provenance.get("hardware", {}).get("cpu", "an unknown processor"))
    if here == there:
        meaning = f"same processor as in the record, at most {MOST_SLOWDOWN:g} times as slow"
    else:
        meaning = f"for information: recorded on {there}, here {here}"
    return Check(
        name,
        here != there or ratio <= MOST_SLOWDOWN,
        expected,
        f"{timing.median * 1e3:.3g} ms ({ratio:.2f} times the record)",
        meaning,
    )
