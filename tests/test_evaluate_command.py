"""The command ``coldforge evaluate``: options, output, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from coldforge import cli
from coldforge.cli import main
from coldforge.errors import AttackError, UsageError
from coldforge.evaluation.request import Request
from coldforge.records import EvaluationRecord, load_evaluation

RECORD = EvaluationRecord.model_validate(
    {
        "coldforge_version": "0.1.0",
        "provenance": {"seed": 0},
        "target": {
            "path": "some/network", "sha256": "ab", "kind": "folder", "weight_bits": 8, "activation_bits": 8,
            "size_bytes": 4000,
        },
        "data": {"source": "fashion-mnist"},
        "threat_model": {"norm": "linf", "eps": 0.1, "eps_255": 25.5, "box": True},
        "n": 200,
        "clean_accuracy": 0.9,
        "clean_ci95": [0.85, 0.93],
        "attacked": {"n": 100, "clean_accuracy": 0.88, "clean_ci95": [0.8, 0.93]},
        "robust_accuracy": {"fgsm": 0.71, "autoattack-lite": 0.62, "worst_case": 0.61},
        "robust_n": {"fgsm": 100, "autoattack-lite": 100, "worst_case": 100},
        "robust_ci95": {"fgsm": [0.614, 0.79], "autoattack-lite": [0.52, 0.713], "worst_case": [0.51, 0.7]},
        "broken": {"fgsm": 17, "autoattack-lite": 26, "worst_case": 27},
        "unfinished": {"autoattack-lite": 12},
        "budget_s": 1200.0,
        "per_class": {},
        "seconds": 1234.0,
        "masking": {
            "verdict": "suspect",
            "checks": [
                {"name": "square", "passed": False, "value": 0.2, "threshold": 0.02, "meaning": "square breaks more"},
                {"name": "steps", "passed": True, "value": 0.0, "threshold": 0.02, "meaning": "more steps help"},
            ],
        },
        "attacks": {"fgsm": {"attack": "PGD", "version": 1}, "autoattack-lite": {"attack": "Ensemble", "version": 1}},
    }
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[SimpleNamespace]]:
    """An evaluation that is done at once, or raises; what it was asked."""
    asked: list[SimpleNamespace] = []

    def replace(error: BaseException | None = None) -> list[SimpleNamespace]:
        def evaluate_path(path: Path, request: Request, *, out: Path, progress: Any, command: str) -> Any:
            asked.append(SimpleNamespace(path=path, request=request, out=out, command=command))
            progress.note("something to know")
            if error is not None:
                raise error
            out.mkdir()
            (out / "evaluation.json").write_text(RECORD.to_json())
            return RECORD

        module = ModuleType("coldforge.evaluation.job")
        module.evaluate_path = evaluate_path  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return asked

    return replace


def test_every_robust_accuracy_is_printed_with_its_flags(
    job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job()
    assert main(["evaluate", "some/network"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    for number in ("71.0", "62.0", "61.0"):
        (row,) = [line for line in lines if number in line and "right on" not in line]
        assert "suspect" in row
    assert "It stays right on 61.0 % (suspect, bounded by budget) of 100" in out
    assert "12 of 100 images not finished" in out
    assert "In 20 min, 12 of 100 images were not finished by AA-lite" in out
    assert "Masking checks: suspect; 1 of 2 passed." in out
    assert "failed: square: 0.200 against 0.0200. square breaks more" in out
    assert "AutoAttack " not in out, "the lite cascade is not AutoAttack"
    assert "AutoAttack's" in out, "... and that is said"
    assert "evaluation-network/evaluation.html" in out
    assert "suspect" in Path("evaluation-network/evaluation.html").read_text()
    assert "something to know" in err


def test_json_is_the_record_and_nothing_else(job: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    job()
    assert main(["evaluate", "some/network", "--json", "--quiet"]) == 0
    out, _ = capsys.readouterr()
    assert EvaluationRecord.model_validate_json(out) == RECORD
    assert json.loads(out)["masking"]["verdict"] == "suspect"


def test_every_option_arrives_and_the_command_can_be_repeated(job: Callable[..., Any]) -> None:
    asked = job()
    words = [
        "evaluate", "net.pt", "--data", "cifar10", "--eps", "8/255", "--norm", "l2", "--n", "0", "--seed", "3",
        "--model", "nets:make", "--mean", "0.5,0.4,0.3", "--std", "1", "--key-prefix", "module.", "--threads", "2",
        "--attack", "fgsm,pgd-20", "--attack", "square", "--budget", "20min", "--surrogate", "other run",
        "--precision", "bf16", "--no-masking", "--masking-n", "50",
    ]  # fmt: skip
    assert main([*words, "--out", "here", "--quiet"]) == 0
    (call,) = asked
    assert call.request == Request(
        data="cifar10", eps="8/255", norm="l2", attack=("fgsm,pgd-20", "square"), n=0, seed=3, budget="20min",
        model="nets:make", mean="0.5,0.4,0.3", std="1", key_prefix="module.", surrogate=Path("other run"),
        precision="bf16", threads=2, no_masking=True, masking_n=50,
    )  # fmt: skip
    assert call.request.attack_names == ("fgsm", "pgd-20", "square")
    assert call.out == Path("here")
    assert call.command == "coldforge " + " ".join(words).replace("other run", "'other run'")
    assert ["evaluate", "net.pt", *call.request.words()] == words


@pytest.mark.parametrize(
    ("target", "out"),
    [("runs/mine", "evaluation-mine"), ("a/float.onnx", "evaluation-float"), ("net.best.pt", "evaluation-net.best")],
)
def test_the_folder_is_named_after_the_target(job: Callable[..., Any], target: str, out: str) -> None:
    asked = job()
    assert main(["evaluate", target, "--quiet"]) == 0
    assert asked[0].out == Path(out)
    assert load_evaluation(out) == RECORD


def test_the_current_folder_has_a_name_too(job: Callable[..., Any], folder: Path) -> None:
    asked = job()
    assert main(["evaluate", ".", "--quiet"]) == 0
    assert asked[0].out == Path(f"evaluation-{folder.name}")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--eps: expected"), 2, "coldforge: error: --eps: expected\n"),
        (AttackError("means nothing"), 1, "coldforge: error: means nothing\n"),
        (KeyboardInterrupt(), 130, f"coldforge: {cli.CONTINUE_EVALUATION}\n"),
    ],
)
def test_exit_codes(
    job: Callable[..., Any], error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job(error)
    assert main(["evaluate", "x"]) == code
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.onnx"], "found nothing at nowhere.onnx"),
        (["x", "--n", "-3"], "--n: expected 0 or more, got -3"),
        (["x", "--norm", "l3"], 'Choose from: "linf", "l2"'),
        (["x", "--atack", "fgsm"], "Did you mean --attack?"),
        ([], "TARGET"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option_and_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in (
        "--data", "--eps", "--norm", "--attack", "--n ", "--seed", "--budget", "--model", "--mean", "--std",
        "--key-prefix", "--surrogate", "--threads", "--no-masking", "--masking-n", "--out", "--json", "--quiet",
    ):  # fmt: skip
        assert option in out, option
    assert out.split("Examples:")[1].count("coldforge evaluate") == 5
    assert "None" not in out


def test_a_black_box_from_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from torch import nn

    from coldforge.data import load_data
    from coldforge.deploy import export_onnx

    data = load_data()
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))
    images, labels = data.train.pixels(slice(0, 500)), data.train.labels[:500]
    optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    export_onnx(network.eval(), folder / "net.onnx", image_shape=data.image_shape, classes=data.classes)
    words = ["evaluate", "net.onnx", "--data", "fashion-mnist-mini", "--eps", "0.1", "--attack", "square-50"]
    assert main([*words, "--n", "12", "--threads", "1", "--no-masking"]) == 0
    out, err = capsys.readouterr()
    record = load_evaluation("evaluation-net")
    assert record.clean_accuracy > 0.6
    assert record.broken["square-50"] > 0
    assert "Square-50" in out
    assert "Black box." in out
    assert "not checked" in out
    assert "attack: done" in err
    found = {path.name for path in (folder / "evaluation-net").iterdir()}
    assert found == {"evaluation.html", "evaluation.json", "ledger.parquet"}
    assert main([*words, "--n", "12", "--attack", "pgd-20"]) == 2
    assert "needs gradients" in capsys.readouterr().err
