from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coldforge.deploy import verify
from coldforge.deploy.onnx import export_onnx
from coldforge.deploy.runtime import OnnxSession
from coldforge.deploy.verify import Verification, verify_folder, write_probe
from coldforge.errors import UsageError
from coldforge.provenance import cpu_model
from coldforge.records import LatencyRecord, PruningRatioRecord, Record, StageRecord, ThreatModelRecord

N = 32
CODES = torch.randint(0, 256, (N, 2, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ADVERSARIAL = torch.rand(N, 2, 10, 10, generator=torch.Generator().manual_seed(1))


def record_of(
    file: Path,
    *,
    median: float = 10.0,
    cpu: str | None = None,
    name: str = "artifact",
    bits: int = 8,
    integer_kernels: bool = True,
) -> Record:
    latency = LatencyRecord(runtime="onnxruntime", batch=4, threads=1, median=median, p10=median, p90=median)
    stage = StageRecord(
        name=name,  # type: ignore[arg-type]
        label=name,
        params=1,
        macs=1,
        size_bytes=1,
        packed_bytes=1,
        weight_bits=bits,
        activation_bits=bits,
        pruning_ratio=PruningRatioRecord(requested=0, achieved=0),
        n=N,
        clean_accuracy=0.5,
        clean_ci95=(0.4, 0.6),
        robust_accuracy={},
        robust_n={},
        robust_ci95={},
        per_class={},
        latency_s=(latency,),
    )
    return Record(
        coldforge_version="0",
        recipe={},
        provenance={
            "artifact_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "hardware": {"cpu": cpu or cpu_model()},
            "integer_kernels": integer_kernels,
            "versions": {"torch": "0.1"},
        },
        threat_model=ThreatModelRecord(norm="linf", eps=0.1, eps_255=25.5, box=True),
        stages=(stage,),
    )


@pytest.fixture
def folder(int8: Any, tmp_path: Path) -> Path:
    """What a run leaves."""
    return fill(tmp_path, int8.path)


def fill(folder: Path, file: Path, **record: Any) -> Path:
    shutil.copy(file, folder / "model.onnx")
    session = OnnxSession(file, threads=1)
    probe(folder, session.labels(CODES), session.labels(ADVERSARIAL))
    (folder / "record.json").write_text(record_of(file, **record).to_json())
    return folder


def probe(folder: Path, clean: Tensor, adversarial: Tensor) -> None:
    write_probe(
        folder / "probe.safetensors",
        images=CODES,
        adversarial=ADVERSARIAL,
        labels=torch.zeros(N, dtype=torch.int64),
        clean_answer=clean,
        adversarial_answer=adversarial,
    )


def failed(found: Verification) -> list[str]:
    assert found.ok == all(check.passed for check in found.checks)
    return [check.name for check in found.checks if not check.passed]


def check(found: Verification, name: str) -> verify.Check:
    return next(item for item in found.checks if item.name.startswith(name))


def test_an_untouched_folder_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "int8_saturates", lambda: False)
    found = verify_folder(folder, seconds=0.01)
    assert failed(found) == []
    assert [item.name for item in found.checks] == [
        "checksum", "labels, clean", "labels, adversarial", "kernels", "8-bit sums", "latency, onnxruntime, batch 4"
    ]  # fmt: skip
    assert check(found, "labels, clean").found == f"{N} of {N} (100.0%)"


def test_a_changed_file_fails(folder: Path, float32: Any) -> None:
    shutil.copy(float32.path, folder / "model.onnx")
    assert "checksum" in failed(verify_folder(folder, seconds=0.01))


def test_a_damaged_file_fails_without_a_crash(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:-100])
    assert failed(verify_folder(folder, seconds=0.01)) == ["checksum", "file loads"]


def test_other_labels_fail_with_their_number(folder: Path) -> None:
    session = OnnxSession(folder / "model.onnx", threads=1)
    answers = session.labels(ADVERSARIAL)
    probe(folder, session.labels(CODES), torch.cat([(answers[:1] + 1) % 3, answers[1:]]))
    found = verify_folder(folder, seconds=0.01)
    assert failed(found) == ["labels, adversarial"]
    assert check(found, "labels, adversarial").found == f"{N - 1} of {N} (96.9%)"


def test_a_float_file_that_should_be_integer_fails(int8: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxSession, "uses_integer_kernels", lambda self: False)
    found = verify_folder(folder, seconds=0.01)
    assert failed(found) == ["kernels"]
    assert check(found, "kernels").expected == "integer"


def test_kernels_that_were_never_integer_need_not_be_so(
    int8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a network with an activation that has no integer kernel."""
    folder = fill(tmp_path, int8.path, integer_kernels=False)
    monkeypatch.setattr(OnnxSession, "uses_integer_kernels", lambda self: False)
    monkeypatch.setattr(OnnxSession, "operators", lambda self: Counter({"Conv": 2, "Cast": 4}))
    found = verify_folder(folder, seconds=0.01)
    assert failed(found) == []
    assert check(found, "kernels").found == "2 Conv"


def test_what_differs_here_is_said(folder: Path) -> None:
    found = verify_folder(folder, seconds=0.01)
    assert f"torch: 0.1 when recorded, {torch.__version__} here" in found.differences


def test_a_float_file_need_not_be_integer(float32: Any, tmp_path: Path) -> None:
    found = verify_folder(fill(tmp_path, float32.path, bits=32), seconds=0.01)
    assert failed(found) == []
    assert not [item for item in found.checks if item.name in ("kernels", "8-bit sums")]


def test_saturation_warns_while_the_labels_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "int8_saturates", lambda: True)
    sums = check(verify_folder(folder, seconds=0.01), "8-bit sums")
    assert sums.passed
    assert sums.found == "saturate"
    assert "deploy.reduce_range = true; the labels of the probe still hold" in sums.meaning
    probe(folder, torch.full((N,), 9), torch.full((N,), 9))
    assert "8-bit sums" in failed(verify_folder(folder, seconds=0.01))


def test_weights_of_seven_bits_do_not_saturate(
    plain_network: Callable[..., nn.Module], quantized: Callable[..., nn.Module], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    twin = quantized(plain_network(), bits=7, activation_bits=8, edge_bits=7)
    export_onnx(twin, tmp_path / "seven.onnx", image_shape=(2, 10, 10), classes=("a", "b", "c"))
    assert OnnxSession(tmp_path / "seven.onnx").metadata["largest_weight_bits"] == "7"
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(verify, "int8_saturates", lambda: True)
    sums = check(verify_folder(fill(folder, tmp_path / "seven.onnx"), seconds=0.01), "8-bit sums")
    assert sums.passed
    assert "reduce_range" not in sums.meaning


@pytest.mark.parametrize(
    ("median", "cpu", "passes"), [(10.0, None, True), (1e-9, None, False), (1e-9, "Another Processor", True)]
)
def test_latency_fails_only_on_the_same_processor(
    int8: Any, tmp_path: Path, median: float, cpu: str | None, passes: bool
) -> None:
    found = verify_folder(fill(tmp_path, int8.path, median=median, cpu=cpu), seconds=0.01)
    latency = check(found, "latency")
    assert latency.passed is passes
    assert "times the record" in latency.found
    assert ("recorded on Another Processor" in latency.meaning) == (cpu is not None)


def spoil_probe(folder: Path) -> None:
    (folder / "probe.safetensors").write_bytes(b"nonsense")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "record.json").unlink(), "expected a record at"),
        (lambda folder: (folder / "model.onnx").unlink(), "expected the file .*copy the whole folder"),
        (lambda folder: (folder / "probe.safetensors").unlink(), "expected the probe .*copy the whole folder"),
        (spoil_probe, "probe.safetensors is damaged .*copy it again"),
        (
            lambda folder: (folder / "record.json").write_text(
                record_of(folder / "model.onnx", name="baseline").to_json()
            ),
            "expected a stage 'artifact', found none",
        ),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        verify_folder(folder)


def test_a_probe_of_unequal_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected equal numbers of images and answers"):
        probe(tmp_path, torch.zeros(N - 1), torch.zeros(N))
    assert list(tmp_path.iterdir()) == []
