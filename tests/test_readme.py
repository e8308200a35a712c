"""README: its tables are those of the records, its commands exist, its Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from coldforge.evaluate import masking
from coldforge.recipe import load_recipe, preset_names
from coldforge.stages import evidence

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_tables_are_made_from_the_records() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert README.count("<!-- table:") == README.count("<!-- latency:") == 1
    assert "| **artifact" in README, "the table of results must be there"


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.strip()])
def test_commands_exist(line: str) -> None:
    command, *words = shlex.split(line, comments=True)
    if command == "coldforge":
        shown = subprocess.run(
            [sys.executable, "-m", "coldforge", words[0], "--help"], capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.stdout, f"{option} is not an option of coldforge {words[0]}"
        if "--set" in words:
            load_recipe(words[1], overrides=[words[words.index("--set") + 1]])
    else:
        script = ROOT / command
        assert script.is_file()
        assert script.stat().st_mode & 0o111, f"{command} must be executable"


def test_presets_are_those_of_the_table() -> None:
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)) == preset_names()


def test_the_python_block_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = blocks("python")
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 8
    project = types.ModuleType("my_project")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(264) % 3
    images = torch.randint(0, 60, (264, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(264), 0, 2 * labels] += 150
    project.images, project.labels = images[:240], labels[:240]  # type: ignore[attr-defined]
    project.test_images, project.test_labels = images[240:], labels[240:]  # type: ignore[attr-defined]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 3),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:240] / 255), labels[:240]).backward()
        optimizer.step()
    project.model = model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", project)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(evidence, "LATENCY_SECONDS", 0.0)
    monkeypatch.setattr(masking, "FEWEST_RIGHT", 10**6)  # the panel attacks nothing; its own tests do
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["answers"], torch.Tensor)
    assert len(names["answers"]) == 24
    assert (tmp_path / "forged" / "report.html").is_file()
