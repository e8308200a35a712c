"""What the exporter is spared: the table of ONNX functions is built once, a network is not traced twice without need;
the same files, torch as it was.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import ONNXRegistry

from coldforge.compress import quantize
from coldforge.deploy import OnnxSession, export_onnx, onnx, torchlib
from coldforge.deploy.torchlib import kept_table
from coldforge.recipe import QuantizeSpec


def exported(path: Path) -> bytes:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    export_onnx(network, path, image_shape=(2, 10, 10), classes="abc")
    return path.read_bytes()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tables that torch builds from now on; none is kept yet."""
    monkeypatch.setattr(torchlib, "_TABLES", {})
    tables: list[Any] = []
    build = ONNXRegistry.from_torchlib

    def from_torchlib(**kwargs: Any) -> Any:
        tables.append(build(**kwargs))
        return tables[-1]

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
    return tables


def test_the_table_is_built_once_and_the_files_are_the_same(
    built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [exported(tmp_path / f"{number}.onnx") for number in range(2)]
    assert len(built) == 1
    monkeypatch.setattr(onnx, "kept_table", nullcontext)
    assert files == [exported(tmp_path / "plain.onnx")] * 2
    assert len(built) == 2


def test_own_translations_do_not_enter_the_table_that_is_kept(built: list[Any]) -> None:
    target = torch.ops.aten.relu.default
    with kept_table():
        first, second = (ONNXRegistry.from_torchlib() for _ in range(2))
    known = len(second.get_decomps(target))
    first.register_op(target, lambda x: x)
    assert len(first.get_decomps(target)) == known + 1
    with kept_table():
        third = ONNXRegistry.from_torchlib()
    assert [len(table.get_decomps(target)) for table in (second, third)] == [known, known]
    assert len(built) == 1


def test_threads_take_turns() -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    inside, other = threading.Event(), threading.Event()

    def export() -> None:
        inside.wait(10)
        with kept_table():
            other.set()

    thread = threading.Thread(target=export)
    thread.start()
    with kept_table():
        inside.set()
        assert not other.wait(0.1)
    thread.join(10)
    assert other.is_set()
    assert ONNXRegistry.__dict__["from_torchlib"] is before


@pytest.mark.parametrize("table", [object(), SimpleNamespace(functions={"relu": ("a", "b")})])
def test_a_table_of_another_kind_is_built_for_each_file(table: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchlib, "_TABLES", {})
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(lambda cls: copy.copy(table)))
    with kept_table():
        first, second = (ONNXRegistry.from_torchlib() for _ in range(2))
    assert type(first) is type(second) is type(table)
    assert first is not second


@pytest.mark.parametrize("error", [None, ValueError])
def test_torch_is_left_as_it_was(error: type[Exception] | None) -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(error) if error else nullcontext(), kept_table():
        assert ONNXRegistry.__dict__["from_torchlib"] is not before
        if error:
            raise error
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_a_torch_without_such_a_table_exports_all_the_same(
    built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exported(tmp_path / "kept.onnx")
    monkeypatch.setitem(sys.modules, _registration.__name__, None)
    assert exported(tmp_path / "plain.onnx") == expected
    assert len(built) == 2, "not kept"


# --- decomposition


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(images)).reshape(images.shape[0], -1))


def _changed_in_place(network: nn.Module, x: Tensor) -> Tensor:
    y = network.second(x)
    y += x
    y[:, :2].mul_(0.5)
    return y.relu_()


def _changed_through_a_view(network: nn.Module, x: Tensor) -> Tensor:
    x.view(x.shape[0], -1).add_(1)
    return x


WHOLE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "residual": lambda network, x: F.max_pool2d(F.relu(network.second(x) + x), 3, 1, 1),
    "channels": lambda network, x: torch.cat([x[:, :3], network.second(x)[:, 3:]], 1),
    "squeeze": lambda network, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
}
TAKEN_APART: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "BatchNorm": lambda network, x: network.norm(network.second(x)),
    "dropout": lambda network, x: F.dropout(x, 0.5, network.training),
    "in place": _changed_in_place,
    "through a view": _changed_through_a_view,
    "chunks": lambda network, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "unused": lambda network, x: (x, torch.histc(x))[0],  # has no ONNX form, and needs none
}


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 32) for name in WHOLE | TAKEN_APART), ("squeeze", 8), ("BatchNorm", 8), ("in place", 8)]
)
def test_a_network_is_traced_again_only_where_operators_are_taken_apart_and_files_are_the_same(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network: nn.Module = Between((WHOLE | TAKEN_APART)[name]).eval()
    if bits < 32:
        network = quantize(network, QuantizeSpec(), torch.rand(8, 2, 6, 6))
    decomposed = 0
    run_decompositions = torch.export.ExportedProgram.run_decompositions

    def counted(*args: Any, **options: Any) -> torch.export.ExportedProgram:
        nonlocal decomposed
        decomposed += 1
        return run_decompositions(*args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    export_onnx(network, tmp_path / "spared.onnx", image_shape=(2, 6, 6), classes="abc")
    again = int(name in TAKEN_APART and (name, bits) != ("BatchNorm", 8))  # folded there
    assert decomposed == again
    monkeypatch.setattr(onnx, "decompose_if_need_be", lambda program: program)
    export_onnx(network, tmp_path / "plain.onnx", image_shape=(2, 6, 6), classes="abc")
    assert decomposed == again + 1
    assert (tmp_path / "spared.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_channels_that_are_shuffled_are_written_in_other_words_and_answer_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Between(lambda _, x: x.reshape(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6).flatten(2)).eval()
    images = torch.rand(8, 2, 6, 6)
    quantized = quantize(network, QuantizeSpec(), images)
    export_onnx(quantized, tmp_path / "spared.onnx", image_shape=(2, 6, 6), classes="abc")
    monkeypatch.setattr(onnx, "decompose_if_need_be", lambda program: program)
    export_onnx(quantized, tmp_path / "plain.onnx", image_shape=(2, 6, 6), classes="abc")
    spared, plain = (OnnxSession(tmp_path / f"{name}.onnx", threads=1).logits(images) for name in ("spared", "plain"))
    assert torch.equal(spared, plain)
