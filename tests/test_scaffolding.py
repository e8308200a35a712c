"""The project around the package: links, layers, versions, sizes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coldforge._version import __version__
from coldforge.recipe import load_recipe, preset_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coldforge"
SKIPPED = {".git", ".venv", "build", "dist", "node_modules"}
MAX_LINES = 400
PRESETS = {
    "quickstart",
    "fashion-mnist",
    "fashion-mnist-paper",
    "cifar10-resnet20",
    "cifar10-resnet18",
    "cifar10-paper",
}


def documents() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.md")) if not SKIPPED & set(path.relative_to(ROOT).parts)]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub writes them."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        page = target.read_text(encoding="utf-8") if target.is_file() and target.suffix == ".md" else None
        if not target.exists() or (anchor and page is not None and anchor not in anchors(page)):
            broken.append(link)
    return broken


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[a](page.md#a-b) [b](#c) [c](gone.md) [d](https://example.org/x)", encoding="utf-8")
    assert broken_links(page) == ["#c", "gone.md"]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_markdown_links(document: Path) -> None:
    assert broken_links(document) == []


def test_presets_parse() -> None:
    assert set(preset_names()) >= PRESETS
    for name in preset_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description, f"preset {name} has no description for `coldforge recipes`"


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}, f"expected files of at most {MAX_LINES} lines; is each of these two?"


def test_version_has_a_changelog_entry() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog


def test_constraint_meets_the_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraint = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8"), re.M)
    least = next(re.fullmatch(r"torch>=(\d+)\.(\d+)", text) for text in project["dependencies"] if "torch>=" in text)
    assert constraint is not None
    assert least is not None
    assert tuple(map(int, constraint.groups())) >= tuple(map(int, least.groups()))


def test_scripts_are_executable() -> None:
    for script in (".ci/run", "scripts/run", "scripts/test", "scripts/lint", "scripts/setup"):
        assert (ROOT / script).stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize(
    "arguments", [["-c", "import coldforge"], ["-m", "coldforge", "--help"]], ids=["import", "help"]
)
def test_torch_is_not_imported_needlessly(arguments: list[str]) -> None:
    """Import and --help answer at once: -X importtime lists every module that was imported."""
    command = [sys.executable, "-X", "importtime", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "coldforge" in imported
    assert not imported & {"torch", "onnx", "onnxruntime", "openvino", "datasets", "matplotlib", "plotly"}
