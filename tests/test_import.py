import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import coldforge


def python(code):
    """Standard output of a fresh interpreter that has this coldforge."""
    environment = {**os.environ, "PYTHONPATH": str(Path(coldforge.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


HEAVY = "print(sorted({'torch', 'numpy', 'pydantic', 'onnx', 'rich', 'datasets'} & set(sys.modules)))"


def test_import_is_light():
    assert python(f"import sys, coldforge; {HEAVY}").strip() == "[]"


def test_help_does_not_import_torch():
    code = "import sys; from coldforge.cli import main; main(['--help']); print('torch' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"


def test_the_lowest_layer_does_not_import_torch():
    modules = "recipe, records, store, provenance, progress, errors, sealed, lease, console"
    assert python(f"import sys; from coldforge import {modules}; print('torch' in sys.modules)").strip() == "False"


def test_pages_are_drawn_without_torch():
    """Those of sweeps, too, and whoever keeps the books of a sweep does without: only who makes stages has it."""
    assert python("import sys, coldforge.report.folder; print('torch' in sys.modules)").strip() == "False"


def test_all_is_sorted_and_complete():
    names = coldforge.__all__
    assert names == sorted(names)
    assert set(coldforge._HOMES) | {"__version__"} == set(names)
    assert set(names) <= set(dir(coldforge))


@pytest.mark.parametrize("name", sorted(set(coldforge._HOMES) - {"forge", "run", "load_data"}))
def test_public_names_resolve(name):
    assert getattr(coldforge, name).__name__ == name


@pytest.mark.parametrize("name", ["forge", "load_data", "run"])
def test_names_that_need_torch_are_defined_where_they_are_looked_for(name):
    home = Path(coldforge.__file__).parent / coldforge._HOMES[name]
    file = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    nodes = ast.walk(ast.parse(file.read_text()))
    assert name in {getattr(node, "name", "") for node in nodes if isinstance(node, (ast.FunctionDef, ast.alias))}


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'forged'"):
        _ = coldforge.forged


def test_the_arrow_is_in_the_docstring():
    assert "recipe -> data -> baseline -> prune" in coldforge.__doc__
