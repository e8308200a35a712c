"""``coldforge compare``: two ledgers of the same images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from coldforge.cli import main
from coldforge.errors import UsageError
from coldforge.evaluate import Ledger, mcnemar, paired_interval
from coldforge.evaluation.compare import compare
from coldforge.records import EvaluationRecord

LABELS = torch.arange(60) % 3


def folder(
    path: Path, wrong: list[int], broken: dict[str, list[int]], *, labels: torch.Tensor = LABELS, **changes: object
) -> Path:
    """An evaluation: which images are wrong when clean, and which each attack broke of the first 50."""
    answers = labels.clone()
    answers[wrong] = (answers[wrong] + 1) % 3
    ledger = Ledger(labels, answers)
    for name, images in broken.items():
        ledger.open(name, 50)
        ledger.fooled[name][images] = True
    path.mkdir()
    ledger.write(path / "ledger.parquet")
    record = {
        "coldforge_version": "0",
        "provenance": {},
        "target": {
            "path": "x", "sha256": "", "kind": "onnx", "weight_bits": 8, "activation_bits": 8, "size_bytes": 1,
        },
        "data": {"fingerprint": "ab"},
        "threat_model": {"norm": "linf", "eps": 0.1, "eps_255": 25.5, "box": True},
        "n": 60, "clean_accuracy": 0.5, "clean_ci95": (0, 1), "robust_accuracy": {}, "robust_n": {}, "robust_ci95": {},
        "attacked": {"n": 50, "clean_accuracy": 0.5, "clean_ci95": (0, 1)},
        "broken": {}, "per_class": {}, "seconds": 1,
        "attacks": {name: {"attack": name, "version": 1} for name in broken},
        "masking": {"verdict": "ok", "checks": []},
    } | changes  # fmt: skip
    (path / "evaluation.json").write_text(EvaluationRecord.model_validate(record).to_json())
    return path


def test_differences_are_those_of_the_images(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", [0, 1, 55], {"pgd-20": [2, 3], "square": [4]})
    second = folder(tmp_path / "b", [1, 2], {"pgd-20": [3, 5, 6, 7], "fgsm": [8]})
    found = compare(first, second)
    clean, pgd, worst = found.differences
    assert (clean.what, clean.n, clean.only_first, clean.only_second) == ("clean", 60, 1, 2)
    assert (clean.first, clean.second) == (57 / 60, 58 / 60)
    assert (pgd.what, pgd.n, pgd.only_first, pgd.only_second) == ("pgd-20", 50, 3, 1)  # 5, 6, 7 against 0
    assert pgd.interval == paired_interval(3, 1, 50)
    assert pgd.p == mcnemar(3, 1)
    assert (worst.what, worst.only_first, worst.only_second) == ("worst_case", 4, 2)  # 5 to 8 against 0 and 4
    assert (worst.first, worst.second) == (45 / 50, 43 / 50)
    assert found.notes == (
        f"only {first} was attacked with square: the worst cases are not of the same attacks",
        f"only {second} was attacked with fgsm: the worst cases are not of the same attacks",
    )
    same = compare(first, first)
    assert not same.notes
    assert all((each.only_first, each.only_second, each.p) == (0, 0, 1.0) for each in same.differences)


def test_what_a_reader_must_know_is_said(tmp_path: Path) -> None:
    check = {"name": "square", "passed": False, "value": 1, "threshold": 0, "meaning": ""}
    suspect = {"verdict": "suspect", "checks": [check]}
    other = {"pgd-20": {"attack": "pgd-20", "version": 2}}
    first = folder(tmp_path / "a", [], {"pgd-20": []}, masking=suspect, unfinished={"pgd-20": 3})
    second = folder(tmp_path / "b", [], {"pgd-20": []}, masking={"verdict": "not_run", "checks": []}, attacks=other)
    assert compare(first, second).notes == (
        f"the robust accuracies of {first} are suspect (square)",
        f"{first} is bounded by its budget: images that were not finished count as robust",
        f"the robust accuracies of {second} are not checked for masking",
        "pgd-20 had other settings, or another version, in one of them",
    )


def test_a_suspect_accuracy_is_printed_with_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suspect = {"verdict": "suspect", "checks": []}
    first = folder(tmp_path / "a", [0], {"pgd-20": [1]})
    second = folder(tmp_path / "b", [0], {"pgd-20": [2, 3]}, masking=suspect)
    assert [each.suspect for each in compare(first, second).differences] == [(False, False), *[(False, True)] * 2]
    assert main(["compare", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    clean, pgd, worst = (next(line for line in lines if name in line) for name in ("clean", "pgd-20", "worst_case"))
    assert "suspect" not in clean
    for line in (pgd, worst):
        assert re.search(r"96\.0\s.*94\.0 suspect", line)
    assert main(["compare", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"][1]["suspect"] == [False, True]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", [], {"pgd-20": []})
    with pytest.raises(UsageError, match=r"found no ledger.parquet in"):
        compare(first, tmp_path)
    for number, changes in enumerate(({"labels": (LABELS + 1) % 3}, {"data": {"fingerprint": "cd"}})):
        with pytest.raises(UsageError, match="expected ledgers of the same test images, got others in"):
            compare(first, folder(tmp_path / f"b{number}", [], {"pgd-20": []}, **changes))
    weaker = {"norm": "linf", "eps": 0.05, "eps_255": 12.75, "box": False}
    with pytest.raises(UsageError, match=r"same threat model, got linf 0.1 in .* and linf 0.05 without the box in"):
        compare(first, folder(tmp_path / "c", [], {"pgd-20": []}, threat_model=weaker))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = folder(tmp_path / "a", [0], {"pgd-20": [2, 3]})
    second = folder(tmp_path / "b", [1, 2], {"pgd-20": []})
    assert main(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "worst_case" in out
    assert "-2.0 [" in out  # 47 against 48 of 50
    assert main(["compare", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"][1]["what"] == "pgd-20"
    assert main(["compare", str(first), str(tmp_path)]) == 2
