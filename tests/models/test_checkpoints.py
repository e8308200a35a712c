from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coldforge.data import load_data
from coldforge.errors import ModelError
from coldforge.models import OptionAShortcut, load_weights, normalized, resnet20
from coldforge.recipe import DataSpec


def small(classes: int = 3, channels: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes)
    return nn.Sequential(*layers)


def equal(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(network: nn.Module, path: Path, message: str, **options: Any) -> str:
    """Loading fails with the message, and changes nothing."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(network, path, **options)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("container", ["", "state_dict", "model"])
def test_torch_files(suffix: str, container: str, tmp_path: Path) -> None:
    source, target = small(), small()
    state: Any = source.state_dict()
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / f"net{suffix}")
    load_weights(target, tmp_path / f"net{suffix}")
    assert equal(source, target)


def test_safetensors_prefix_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small()
    save_file({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "net.safetensors")
    monkeypatch.setenv("MY_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("$MY_WEIGHTS/net.safetensors", "~/net.safetensors"):
        target = small()
        load_weights(target, path, key_prefix="module.")
        assert equal(source, target)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        small(), tmp_path / "none.pt", f"expected a checkpoint at {re.escape(str(tmp_path))}/none.pt, found nothing$"
    )
    monkeypatch.delenv("NOT_SET_AT_ALL", raising=False)
    refused(small(), Path("$NOT_SET_AT_ALL/net.pt"), "an environment variable in it is not set")
    (tmp_path / "net.onnx").touch()
    refused(small(), tmp_path / "net.onnx", r"ends in \.safetensors, \.pt, .*, \.bin, got '\.onnx'")


def written(path: Path, kind: str) -> Path:
    state = {key: value.contiguous() for key, value in small().state_dict().items()}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
def test_truncated(kind: str, keep: float, tmp_path: Path) -> None:
    path = written(tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pt"), kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(small(), path, "the checkpoint is truncated or damaged .*; copy or download it again")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_not_a_checkpoint_at_all(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("<html>404 not found</html>")
    refused(small(), tmp_path / name, "truncated or damaged")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_is_not_executed(kind: str, tmp_path: Path) -> None:
    content = {"state_dict": small().state_dict(), "extra": Evil(tmp_path / "executed")}
    path = tmp_path / "net.pt"
    if kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    message = refused(small(), path, "refused, because loading it could execute code")
    assert "weights_only=True" in message
    assert "safetensors.torch.save_file" in message
    assert not (tmp_path / "executed").exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "net.pt")
    refused(small(), tmp_path / "net.pt", r"it holds torch\.nn\.modules\.container\.Sequential and not only tensors")


def save(tmp_path: Path, state: Any) -> Path:
    torch.save(state, tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict of tensors, got list"),
        ({"epoch": 3}, "got int at 'epoch'"),
        ({}, "expected a dict of tensors, got dict"),
        (torch.zeros(3), "expected a dict of tensors, got Tensor"),
    ],
)
def test_other_content(content: Any, message: str, tmp_path: Path) -> None:
    refused(small(), save(tmp_path, content), message)


def test_prefix_is_hinted(tmp_path: Path) -> None:
    state = {f"net.module.{key}": value for key, value in small().state_dict().items()}
    path = save(tmp_path, state)
    refused(small(), path, re.escape("9 missing (0.weight, 0.bias, 1.weight, ...)").replace("9", r"\d"))
    refused(small(), path, r'set key_prefix = "net\.module\."')
    refused(small(), path, r'set key_prefix = "net\.module\."', key_prefix="net.")
    refused(
        small(),
        path,
        r"expected keys that begin with key_prefix 'mdule\.', got net\.module\.0\.weight",
        key_prefix="mdule.",
    )


def test_prefix_that_makes_keys_collide(tmp_path: Path) -> None:
    state = small().state_dict()
    half = {f"m.{key}": value for key, value in list(state.items())[:2]}
    path = save(tmp_path, dict(state) | half)
    refused(small(), path, "some keys occur with and without key_prefix", key_prefix="m.")


def test_what_is_outside_of_the_prefix_belongs_to_others(tmp_path: Path) -> None:
    """As in checkpoints of training frameworks, which hold the loss function, or averaged weights, too."""
    source, target = small(), small()
    inside = {f"net.{key}": value for key, value in source.state_dict().items()}
    others = {"criterion.weight": torch.ones(3)} | dict(small().state_dict())
    path = save(tmp_path, {"state_dict": inside | others}).rename(tmp_path / "last.ckpt")
    load_weights(target, path, key_prefix="net.")
    assert equal(source, target)
    refused(
        small(), save(tmp_path, {f"net.{key}": value for key, value in others.items()}), "unexpected", key_prefix="net."
    )


def test_an_archive_of_code_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(small().eval(), torch.zeros(1, 1, 4, 4)), str(tmp_path / "net.pt"))
    message = refused(small(), tmp_path / "net.pt", "expected weights, got a TorchScript archive")
    assert "weights_only" not in message


def test_another_architecture(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["stem.weight"] = state.pop("0.weight")
    message = refused(small(), save(tmp_path, state), "is it the checkpoint of another architecture")
    assert "1 missing (0.weight), 1 unexpected (stem.weight)" in message


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            small(classes=5),
            r"'3\.weight': expected shape \(3, 16\), got \(5, 16\); it was trained for 5 classes, not 3",
        ),
        (small(channels=3), r"'0\.weight': expected shape \(4, 1, 3, 3\), got \(4, 3, 3, 3\); .* 3 channels, not 1"),
    ],
)
def test_shapes(saved: nn.Module, message: str, tmp_path: Path) -> None:
    refused(small(), save(tmp_path, saved.state_dict()), message)


def test_shape_in_the_middle(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["1.bias"] = torch.zeros(5)
    refused(
        small(), save(tmp_path, state), r"'1\.bias': expected shape \(4,\), got \(5,\); is it .* another architecture"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["3.bias"] = torch.tensor([0.0, value, 0.0])
    refused(small(), save(tmp_path, state), r"expected finite weights, found NaN or infinity in '3\.bias'")


def test_weights_of_a_quantized_network(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["3.weight"] = state["3.weight"].to(torch.int8)
    refused(small(), save(tmp_path, state), r"'3\.weight': expected torch\.float32, got torch\.int8")


def test_only_shortcuts_and_counters_may_be_missing(tmp_path: Path) -> None:
    source, target = resnet20(), resnet20()
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    fixed = [f"{name}.weight" for name, layer in source.named_modules() if isinstance(layer, OptionAShortcut)]
    for key in fixed:
        del state[key]
    assert len(fixed) == 2
    load_weights(target, save(tmp_path, state))
    assert equal(source, target)
    assert not target.get_parameter(fixed[0]).requires_grad
    del state["bn1.running_mean"]
    refused(resnet20(), save(tmp_path, state), r"1 missing \(bn1\.running_mean\)")


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("COLDFORGE_CIFAR10") and os.environ.get("COLDFORGE_RESNET20")),
    reason="set COLDFORGE_CIFAR10 (a folder) and COLDFORGE_RESNET20 (resnet20-12fca82f.th of akamaster)",
)
def test_foreign_resnet20_gets_its_accuracy(tmp_path: Path) -> None:
    network = resnet20()
    load_weights(network, "$COLDFORGE_RESNET20", key_prefix="module.")
    model = normalized(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    test = load_data(DataSpec(source="cifar10"), cache=tmp_path).test
    with torch.inference_mode():
        parts = [test.take(slice(i, i + 500)) for i in range(0, len(test), 500)]
        right = sum(int((model(part.pixels()).argmax(1) == part.labels).sum()) for part in parts)
    assert abs(right - 9173) <= 2  # ties of rounding between CPUs
