from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coldforge.compress.checkpoint import STRUCTURE, WEIGHTS, Structure, build, load_network, save_network
from coldforge.compress.fakequant import ActivationQuantizer
from coldforge.compress.prune import prune
from coldforge.compress.quantize import quantize
from coldforge.errors import ModelError
from coldforge.models import ModelSource, model_source
from coldforge.recipe import PruneSpec, QuantizeSpec

CLASSES = tuple("abcdefghij")
KINDS = ("dense", "pruned", "quantized", "pruned and quantized")
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def structure_of(name: str, channels: int, side: int) -> Structure:
    mean, std = (0.4, 0.45, 0.5)[:channels], (0.2, 0.25, 0.3)[:channels]
    shape = (channels, side, side)
    return Structure(source=name, image_shape=shape, classes=CLASSES, mean=mean, std=std)


def some_images(shape: tuple[int, int, int], n: int = 8) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def awake(network: nn.Module) -> nn.Module:
    """As if trained: nothing is at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network


def forge(start: Structure, kind: str, source: ModelSource | None = None) -> tuple[nn.Module, Structure]:
    """The network of ``start``, trained so to speak, then compressed."""
    network, structure = awake(build(start, source, seed=3)), start
    if "pruned" in kind:
        network, plan = prune(network, PruneSpec(ratio=0.5), image_shape=start.image_shape)
        structure = structure.model_copy(update={"pruning": plan})
    if "quantized" in kind:
        spec = QuantizeSpec(weight_bits=4, activation_bits=6)
        network = quantize(network, spec, some_images(start.image_shape, 4))
        structure = structure.rounded(spec)
        with torch.no_grad():  # a trained step is not the calibrated one
            for name, parameter in network.named_parameters():
                if "step" in name and parameter.requires_grad:
                    parameter.mul_(1.1)
    return network.eval(), structure


def assert_same_network(loaded: nn.Module, network: nn.Module, images: Tensor) -> None:
    """The same bits in the same places, and the same answers to the last bit."""
    found, expected = loaded.state_dict(), network.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert not loaded.training
    needs = [[(name, p.requires_grad) for name, p in part.named_parameters()] for part in (loaded, network)]
    assert needs[0] == needs[1]
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of one small checkpoint, pruned and quantized, to be damaged."""
    network, structure = forge(structure_of("zoo:cnn8", 1, 8), "pruned and quantized")

    def fresh() -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        save_network(folder, network, structure)
        return folder

    return fresh


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "channels", "side"), [("cnn8", 1, 28), ("resnet20", 3, 16), ("resnet18", 3, 8)])
def test_a_network_comes_back_to_the_bit(tmp_path: Path, name: str, channels: int, side: int, kind: str) -> None:
    network, structure = forge(structure_of(f"zoo:{name}", channels, side), kind)
    save_network(tmp_path, network, structure)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, STRUCTURE]
    loaded, read = load_network(tmp_path)
    assert read == structure
    assert_same_network(loaded, network, some_images(structure.image_shape))


def test_equal_networks_give_equal_bytes(saved: Callable[[], Path]) -> None:
    first, second = saved(), saved()
    for name in (WEIGHTS, STRUCTURE):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    network, structure = load_network(first)
    save_network(second, network, structure)  # over an older one
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_nothing_is_pickled(saved: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved()
    description = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    assert description["source"] == "zoo:cnn8"
    assert description["quantization"]["weight_bits"] == 4
    weights = (folder / WEIGHTS).read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32", "I32"}
    assert not weights.startswith(PICKLES)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint must not be unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    load_network(folder)


def test_memory_layout_changes_nothing(tmp_path: Path) -> None:
    network, structure = forge(structure_of("zoo:cnn8", 1, 8), "dense")
    images = some_images(structure.image_shape)
    save_network(tmp_path, network.to(memory_format=torch.channels_last), structure)  # type: ignore[call-overload]
    loaded, _ = load_network(tmp_path)
    assert_same_network(loaded, network.to(memory_format=torch.contiguous_format), images)  # type: ignore[call-overload]


def test_build_depends_on_the_seed_and_nothing_else() -> None:
    structure = structure_of("zoo:resnet20", 3, 8)
    states = [build(structure, seed=seed).state_dict() for seed in (1, 1, 2)]
    weight = "network.conv1.weight"
    assert torch.equal(states[0][weight], states[1][weight])
    assert not torch.equal(states[0][weight], states[2][weight])


# --- architectures without a name ------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's network, defined where nothing can import it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(inputs)).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_network_comes_back_with_its_source(tmp_path: Path, kind: str) -> None:
    model = Own()
    source = model_source(model, image_shape=(1, 8, 8), num_classes=10)
    network, structure = forge(structure_of("Own", 1, 8), kind, source)
    save_network(tmp_path, network, structure)
    loaded, _ = load_network(tmp_path, source)
    assert_same_network(loaded, network, some_images((1, 8, 8)))
    with torch.no_grad():  # independent of the live object
        model.conv.weight.zero_()
    assert_same_network(loaded, network, some_images((1, 8, 8)))
    with pytest.raises(ModelError, match=r"expected zoo:NAME, .* got 'Own'"):
        load_network(tmp_path)


def test_another_live_network_does_not_fit(tmp_path: Path) -> None:
    for kind, message in (
        ("dense", r"the checkpoint in .* does not fit 'Own'"),
        ("pruned", r"belongs to another network: expected layer 'network\.conv' with 16 channels, got 24"),
    ):
        source = model_source(Own(), image_shape=(1, 8, 8), num_classes=10)
        save_network(tmp_path, *forge(structure_of("Own", 1, 8), kind, source))
        with pytest.raises(ModelError, match=message):
            load_network(tmp_path, model_source(Own(24), image_shape=(1, 8, 8), num_classes=10))


# --- damage ----------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> None:
    path = folder / STRUCTURE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("name", [WEIGHTS, STRUCTURE])
def test_a_missing_file_is_named(saved: Callable[[], Path], name: str) -> None:
    folder = saved()
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"expected a coldforge checkpoint in .*checkpoint.*, found no {name}"):
        load_network(folder)
    with pytest.raises(ModelError, match=r"expected a coldforge checkpoint in .*nowhere, found no structure\.json"):
        load_network(folder / "nowhere")


def test_a_checkpoint_from_before_the_last_input_was_at_the_edge_has_its_bits(saved: Callable[[], Path]) -> None:
    folder = saved()
    description = json.loads((folder / STRUCTURE).read_text())
    assert description.pop("last_input_at_edge") is True
    bits = {}
    for age in ("today", "before"):
        if age == "before":
            (folder / STRUCTURE).write_text(json.dumps(description))
        network, structure = load_network(folder)
        assert structure.last_input_at_edge == (age == "today")
        bits[age] = [part.bits for part in network.modules() if isinstance(part, ActivationQuantizer)]
    assert bits == {"today": [8, *[6] * (len(bits["today"]) - 2), 8], "before": [8, *[6] * (len(bits["today"]) - 1)]}


def test_a_checkpoint_from_before_sums_were_at_the_edge_has_its_bits(tmp_path: Path) -> None:
    structure = Structure(
        source="zoo:resnet20", image_shape=(3, 8, 8), classes=("a", "b"), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    structure = structure.rounded(QuantizeSpec(weight_bits=4, activation_bits=4))
    one_grid = Structure.model_validate_json(structure.model_dump_json(exclude={"sums_apart"}))
    before = Structure.model_validate_json(structure.model_dump_json(exclude={"sums_apart", "sums_at_edge"}))
    assert (structure.sums_apart, one_grid.sums_apart) == (True, False)
    assert (one_grid.sums_at_edge, before.sums_at_edge) == (True, False)
    for described, wide in ((structure, 23), (one_grid, 14), (before, 2)):
        save_network(tmp_path, build(described), described)
        network, _ = load_network(tmp_path)
        assert [part.bits for part in network.modules() if isinstance(part, ActivationQuantizer)].count(8) == wide


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_checkpoint_is_damaged(saved: Callable[[], Path], kept: int) -> None:
    folder = saved()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ModelError, match=r"the checkpoint in .* is damaged: \S"):
        load_network(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is damaged: structure\.json: Invalid JSON"),
        (b'{"format_version": 1, "source": "zoo:cn', r"is damaged: structure\.json: Invalid JSON"),
        (b"\x80\x04\xff\xfe", r"is damaged: structure\.json: Invalid JSON"),
        (b"{}", r"is damaged: structure\.json: Field required"),
    ],
)
def test_a_damaged_description_is_refused(saved: Callable[[], Path], content: bytes, message: str) -> None:
    folder = saved()
    (folder / STRUCTURE).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_network(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"is damaged: structure\.json: Input should be 1"),
        ({"surprise": 1}, r"is damaged: structure\.json: Extra inputs are not permitted"),
        ({"image_shape": [1, 8]}, r"is damaged: structure\.json: Field required"),
        ({"quantization": {"weight_bits": 3.5}}, r"expected a whole number of bits"),
        ({"mean": [0.4, 0.5]}, r"expected one mean and one std per channel, got 2 means and 1 stds"),
        ({"source": "zoo:cnn9"}, r"unknown network 'zoo:cnn9'; did you mean 'cnn8'\?"),
        ({"source": "zoo:resnet20"}, r"belongs to another network: expected layer 'network\.conv1' with 32"),
        ({"source": "zoo:resnet20", "pruning": None}, r"does not fit 'zoo:resnet20': .*[Mm]issing key"),
        ({"pruning": None}, r"does not fit 'zoo:cnn8': .*size mismatch for network\.conv1\.weight"),
        ({"quantization": None}, r"does not fit 'zoo:cnn8': .*Unexpected key\(s\).*quantizer_0"),
        ({"classes": ["a", "b"]}, r"does not fit 'zoo:cnn8': .*size mismatch for network\.linear2\.weight"),
    ],
)
def test_a_description_of_another_network_is_refused(
    saved: Callable[[], Path], changes: dict[str, object], message: str
) -> None:
    folder = saved()
    edit(folder, **changes)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_network(folder)


def test_a_failed_save_keeps_the_old_checkpoint(saved: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    network, structure = load_network(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_network(folder, awake(network), structure)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
