from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from coldforge.compress import ActivationQuantizer, QuantizedLayer, quantize
from coldforge.deploy.onnx import export_onnx
from coldforge.deploy.runtime import OnnxSession
from coldforge.errors import ExportError, UsageError
from coldforge.models import normalized
from coldforge.recipe import QuantizeSpec

SHAPE = (2, 10, 10)
CLASSES = ("a", "b", "c")
Factory = Callable[..., nn.Module]


def export(model: nn.Module, path: Path) -> OnnxSession:
    export_onnx(model, path, image_shape=SHAPE, classes=CLASSES)
    return OnnxSession(path, threads=1)


@torch.no_grad()
def assert_same_answers(model: nn.Module, session: OnnxSession, images: Tensor, *, tolerance: float = 0.01) -> None:
    """Equal up to rare codes that fall on the other side of a half: twin and kernel add up in a different order."""
    twin, artifact = model(images), session.logits(images)
    spread = float(twin.std())
    assert spread > 0
    assert float((twin - artifact).abs().mean()) <= tolerance * spread
    margin = twin.topk(2).values.diff().abs().ravel()  # (N,)
    clear = margin > 10 * tolerance * spread
    assert clear.any()
    assert torch.equal(twin.argmax(1)[clear], artifact.argmax(1)[clear])


class Residual(nn.Module):
    """Residual addition with a projection, both kinds of pooling, a depthwise convolution, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.project = nn.Conv2d(8, 16, 1, stride=2)
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean, 0, 0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(inputs))), 2)
        x = F.relu(self.body(F.relu(self.depthwise(x))) + self.project(x))
        x = F.relu(self.same(x) + x)
        return self.head(x.mean((2, 3)))


class Pooled(nn.Module):
    """Average pooling in the middle and at the end, as modules; a branch that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.pool, self.last = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.mix, self.head = nn.Conv2d(10, 8, 3), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.pool(torch.cat([F.relu(self.left(inputs)), F.relu(self.right(inputs))], 1))
        x = self.last(F.relu(self.mix(x)))
        return self.head(x.view(x.size(0), -1))


class CeilPooled(nn.Module):
    """Average poolings whose last windows are cut off: by the edge, and by the padding that does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 8, 2)
        self.first, self.last = nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, True, count_include_pad=False)
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.last(self.first(F.relu(self.body(inputs)))).flatten(1))


class Clipped(nn.Module):
    """ReLU6, as in many small networks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.depthwise = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.body.weight)  # some values above 6

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.relu6(self.body(inputs))))
        return self.head(x.mean((2, 3)))


@settings(
    max_examples=6,
    phases=[Phase.explicit, Phase.generate],  # an export takes a second: shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    layers=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 2)), min_size=1, max_size=3),
    bits=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    activation_bits=st.sampled_from([2, 4, 6, 8]),
)
def test_integer_file_equals_its_twin(
    plain_network: Factory,
    quantized: Factory,
    images: Tensor,
    tmp_path: Path,
    layers: list[tuple[int, int]],
    bits: int,
    activation_bits: int,
) -> None:
    widths, strides = zip(*layers, strict=True)
    twin = quantized(plain_network(widths, strides), bits=bits, activation_bits=activation_bits)
    session = export(twin, tmp_path / "model.onnx")
    assert_same_answers(twin, session, images)
    assert session.uses_integer_kernels(), session.operators()


@pytest.mark.parametrize(("ternary", "codes"), [(False, {-3, -1, 1, 3}), (True, {-1, 0, 1})])
def test_weights_of_two_bits_are_exported_with_their_codes(
    ternary: bool, codes: set[int], plain_network: Factory, quantized: Factory, images: Tensor, tmp_path: Path
) -> None:
    twin = quantized(plain_network(), bits=2, activation_bits=4, edge_bits=2, ternary=ternary)
    session = export(twin, tmp_path / "model.onnx")
    assert_same_answers(twin, session, images)
    shapes = {tuple(layer.weight.shape) for layer in twin.modules() if isinstance(layer, QuantizedLayer)}
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if tensor.data_type == TensorProto.INT8 and tuple(tensor.dims) in shapes  # not widened by channels of zeros
    ]
    assert len(weights) == 3
    assert {int(code) for weight in weights for code in np.unique(weight)} == codes


@pytest.mark.parametrize("network", [Residual, Pooled, CeilPooled])
def test_additions_and_poolings_run_on_integers(
    network: type[nn.Module], quantized: Factory, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    twin = quantized(normalized(network(), [0.5, 0.4], [0.2, 0.3]).eval())
    session = export(twin, tmp_path / "model.onnx")
    found = session.operators()
    assert session.uses_integer_kernels(), found
    assert not set(found) & {"Add", "AveragePool", "GlobalAveragePool", "ReduceMean", "Relu", "Concat"}, found
    assert_same_answers(twin, session, images)


def test_relu6_does_not_take_a_convolution_off_the_integers(quantized: Factory, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin = quantized(normalized(Clipped(), [0.5, 0.4], [0.2, 0.3]).eval())
    session = export(twin, tmp_path / "model.onnx")
    assert not set(session.operators()) & {"Conv", "CastLike", "Cast"}, session.operators()
    assert_same_answers(twin, session, images)


def test_a_pooling_that_integer_kernels_get_wrong_is_refused(quantized: Factory, tmp_path: Path) -> None:
    """ONNX Runtime divides the last windows by a wrong number; a float file is right."""
    network = CeilPooled()
    network.last = nn.AvgPool2d(3, 2, 1, True)
    model = normalized(network, [0.5, 0.4], [0.2, 0.3]).eval()
    with pytest.raises(ExportError, match="expected an average pooling that integer kernels compute"):
        export(quantized(model), tmp_path / "model.onnx")
    export(model, tmp_path / "float.onnx")


def test_sixteen_bits_are_exported_as_sixteen_bits(
    plain_network: Factory, quantized: Factory, images: Tensor, tmp_path: Path
) -> None:
    twin = quantized(plain_network(), bits=16)
    session = export(twin, tmp_path / "model.onnx")
    assert_same_answers(twin, session, images, tolerance=1e-3)
    assert session.metadata["largest_bits"] == "16"
    assert not session.uses_integer_kernels()
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {TensorProto.INT16, TensorProto.UINT16} <= kinds


@pytest.mark.parametrize("network", [Residual, Pooled])
def test_a_float_network_stays_float(network: type[nn.Module], images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = normalized(network(), [0.5, 0.4], [0.2, 0.3]).eval()
    session = export(model, tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(session.logits(images), model(images), rtol=1e-4, atol=1e-5)
    assert not session.uses_integer_kernels()
    assert session.metadata["largest_bits"] == "32"
    assert "BatchNormalization" not in session.operators()


def test_graph_holds_integers_and_no_shape_arithmetic(
    plain_network: Factory, quantized: Factory, tmp_path: Path
) -> None:
    twin = quantized(plain_network(), bits=4, edge_bits=2)
    export(twin, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert operators == {
        "Sub", "Div", "QuantizeLinear", "Clip", "Pad", "DequantizeLinear", "Conv", "Relu", "Flatten", "Gemm"
    }  # fmt: skip
    assert [item.version for item in model.opset_import if item.domain == ""] == [21]
    constants = {item.name: item for item in model.graph.initializer}
    weights = [numpy_helper.to_array(item) for name, item in constants.items() if name.endswith(".weight")]
    assert len(weights) == 4
    assert all(codes.dtype.name == "int8" and abs(codes.astype(int)).max() <= 7 for codes in weights)
    biases = [item for name, item in constants.items() if name.endswith(".bias")]
    assert [item.data_type for item in biases] == [TensorProto.INT32] * 4
    clips = [numpy_helper.to_array(constants[n.input[2]]) for n in model.graph.node if n.op_type == "Clip"]
    assert [int(value) for value in clips] == [15] * 4  # image, two convolutions, first linear: 4 bits each


def convolutions(path: Path) -> list[tuple[np.ndarray, list[str]]]:
    """Of every convolution: the codes of its weight, and the operators before it, nearest first."""
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = []
    for node in (node for node in graph.node if node.op_type == "Conv"):
        above, at = [], node.input[0]
        while at in makers:
            above.append(makers[at].op_type)
            at = makers[at].input[0]
        found.append((constants[makers[node.input[1]].input[0]], above))
    return found


def image_network(channels: int, groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 8, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return normalized(nn.Sequential(*layers, *head), [0.5] * channels, [0.2] * channels).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_few_channels_are_widened_to_four(channels: int, tmp_path: Path) -> None:
    images = torch.rand(64, channels, 10, 10, generator=torch.Generator().manual_seed(0))
    twin = quantize(image_network(channels), QuantizeSpec(), images)
    export_onnx(twin, tmp_path / "model.onnx", image_shape=(channels, 10, 10), classes=CLASSES)
    session = OnnxSession(tmp_path / "model.onnx", threads=1)
    assert_same_answers(twin, session, images)
    assert session.uses_integer_kernels(), session.operators()
    (first, above), (second, _) = convolutions(tmp_path / "model.onnx")
    assert first.shape == (8, 4, 3, 3)
    assert not first[:, channels:].any()
    assert first[:, :channels].any()
    assert above[:3] == ["DequantizeLinear", "Pad", "QuantizeLinear"]  # on the codes
    assert second.shape == (6, 8, 3, 3)


@pytest.mark.parametrize(("channels", "groups", "seen"), [(4, 1, 4), (5, 1, 5), (2, 2, 1), (8, 8, 1)])
def test_wide_and_depthwise_first_layers_stay(channels: int, groups: int, seen: int, tmp_path: Path) -> None:
    images = torch.rand(16, channels, 10, 10, generator=torch.Generator().manual_seed(0))
    twin = quantize(image_network(channels, groups), QuantizeSpec(), images)
    export_onnx(twin, tmp_path / "model.onnx", image_shape=(channels, 10, 10), classes=CLASSES)
    (first, above), _ = convolutions(tmp_path / "model.onnx")
    assert first.shape == (8, seen, 3, 3)
    assert "Pad" not in above


def test_an_image_of_sixteen_bits_stays(
    plain_network: Factory, quantized: Factory, images: Tensor, tmp_path: Path
) -> None:
    twin = quantized(plain_network(), bits=8, activation_bits=16)
    session = export(twin, tmp_path / "model.onnx")
    assert_same_answers(twin, session, images)
    assert "Pad" not in session.operators()


@pytest.mark.parametrize("bits", [8, 16])
def test_bias_of_a_dead_channel_does_not_overflow(
    bits: int, plain_network: Factory, quantized: Factory, images: Tensor, tmp_path: Path
) -> None:
    """With 16 bits ONNX Runtime itself rounds the bias, which is a float, to 32 bits."""
    model = copy.deepcopy(plain_network())
    layer = model.get_submodule("network.0")
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight[3] = 1e-9
        assert layer.bias is not None
        layer.bias[3] = 1.5
    twin = quantized(model, bits=bits)
    assert_same_answers(twin, export(twin, tmp_path / "model.onnx"), images)


def test_equal_networks_give_equal_bytes_that_tell_nothing_about_this_machine(
    plain_network: Factory, quantized: Factory, tmp_path: Path
) -> None:
    paths = [tmp_path / "one" / "a.onnx", tmp_path / "two" / "b.onnx"]
    for path in paths:
        path.parent.mkdir()
        export(quantized(plain_network()), path)
    first, second = (path.read_bytes() for path in paths)
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()
    for trace in (str(tmp_path), str(Path.home()), "site-packages", ".py", "torch"):
        assert trace.encode() not in first
    assert [path.name for path in paths[0].parent.iterdir()] == ["a.onnx"]


SCRIPT = """
import sys, torch
from torch import nn
from coldforge.deploy.onnx import export_onnx
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
export_onnx(model, sys.argv[1], image_shape=(2, 10, 10), classes="abc")
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here.onnx", tmp_path / "there.onnx"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(there)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the exporter's own warnings are kept from the user
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(SCRIPT, {})
    assert here.read_bytes() == there.read_bytes()


def test_exporting_leaves_the_model_alone(plain_network: Factory, quantized: Factory, tmp_path: Path) -> None:
    twin = quantized(plain_network()).train()
    before = copy.deepcopy(twin.state_dict())
    kinds = [type(module) for module in twin.modules()]
    export(twin, tmp_path / "model.onnx")
    assert twin.training
    assert [type(module) for module in twin.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    assert all(p.requires_grad for m in twin.modules() if isinstance(m, QuantizedLayer) for p in [m.weight])


def test_metadata_comes_back(plain_network: Factory, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    facts = {"box": "[0, 1]", "threat_model": "linf 0.1"}
    export_onnx(plain_network(), path, image_shape=SHAPE, classes=["T-shirt/top", "Bär", 'a "b"'], metadata=facts)
    session = OnnxSession(path)
    assert session.header.classes == ("T-shirt/top", "Bär", 'a "b"')
    assert facts.items() <= session.metadata.items()
    assert session.metadata["input"] == "pixels in [0, 1], NCHW float32"
    assert session.metadata["image_shape"] == "[2, 10, 10]"
    assert session.metadata["coldforge_version"] == onnx.load(path).producer_version
    assert onnx.load(path).producer_name == "coldforge"


# --- what cannot be exported -----------------------------------------------------------------------------------------


class Choosy(nn.Module):
    """Control flow that depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


class Exotic(nn.Module):
    """An operation without an ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class TwoOnly(nn.Module):
    """Works on one shape only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 1000)


@pytest.mark.parametrize("layer", [Choosy, Exotic, TwoOnly])
def test_a_layer_that_cannot_be_exported_is_named(layer: type[nn.Module], tmp_path: Path) -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(200, 3))
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer()), head)
    with pytest.raises(ExportError, match=rf"layer '0\.1' \({layer.__name__}\) cannot be exported to ONNX"):
        export_onnx(model, tmp_path / "model.onnx", image_shape=SHAPE, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named(plain_network: Factory, tmp_path: Path) -> None:
    model = plain_network()
    with torch.no_grad():
        model.get_parameter("network.2.bias")[0] = torch.nan
    with pytest.raises(ExportError, match=r"expected finite weights, got NaN or infinity in 'network\.2\.bias'"):
        export(model, tmp_path / "model.onnx")


def test_class_names_must_fit_the_logits(plain_network: Factory, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected logits of shape \(N, 2\), one for each class, got \(2, 3\)"):
        export_onnx(plain_network(), tmp_path / "model.onnx", image_shape=SHAPE, classes=["a", "b"])


def test_images_of_a_wrong_size_fail_at_a_named_layer(plain_network: Factory, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"layer 'network\.5' \(Linear\) cannot"):
        export_onnx(plain_network(), tmp_path / "model.onnx", image_shape=(2, 12, 12), classes=CLASSES)
    with pytest.raises(UsageError, match=r"expected \(channels, height, width\), got \(10, 10\)"):
        export_onnx(plain_network(), tmp_path / "model.onnx", image_shape=(10, 10), classes=CLASSES)


def test_an_uncalibrated_quantizer_is_named(plain_network: Factory, quantized: Factory, tmp_path: Path) -> None:
    twin = copy.deepcopy(quantized(plain_network()))
    name, quantizer = next((n, m) for n, m in twin.named_modules() if isinstance(m, ActivationQuantizer))
    with torch.no_grad():
        quantizer.step.zero_()
    with pytest.raises(ExportError, match=f"layer '{name}': expected a calibrated quantizer"):
        export(twin, tmp_path / "model.onnx")


def test_own_metadata_keys_are_reserved(plain_network: Factory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got classes"):
        export_onnx(
            plain_network(), tmp_path / "m.onnx", image_shape=SHAPE, classes=CLASSES, metadata={"classes": "mine"}
        )


def test_a_failed_write_keeps_the_old_file(
    plain_network: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export(plain_network(), path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
