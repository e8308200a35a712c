from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from coldforge.deploy import runtime
from coldforge.deploy.runtime import OnnxSession, OpenVinoSession, int8_saturates, open_session, pixels
from coldforge.errors import ModelError, UsageError
from coldforge.provenance import cpu_flags


def tiny_file(path: Path, input_shape: list[Any], output_shape: list[Any], kind: int = TensorProto.FLOAT) -> Path:
    """An ONNX file of the given input and output that only flattens."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["logits"], axis=1)],
        "tiny",
        [helper.make_tensor_value_info("image", kind, input_shape)],
        [helper.make_tensor_value_info("logits", kind, output_shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_an_image_gets_the_same_logits_whatever_its_neighbours(int8: Any) -> None:
    session = OnnxSession(int8.path, threads=1)
    images = torch.rand(150, 2, 10, 10, generator=torch.Generator().manual_seed(1))
    together = session.logits(images)
    alone = torch.cat([session.logits(images[i : i + 1]) for i in (0, 63, 64, 149)])
    assert together.shape == (150, 3)
    assert torch.equal(alone, together[[0, 63, 64, 149]])
    assert torch.equal(session.logits(images[5:]), together[5:])
    assert torch.equal(session.labels(images), together.argmax(1))
    torch.testing.assert_close(session.run(images[:3]), together[:3])


def test_the_runtime_sees_whole_tiles_only(int8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = OnnxSession(int8.path, threads=1)
    sizes = []
    call = session._call

    def spy(images: Any) -> Any:
        sizes.append(len(images))
        return call(images)

    monkeypatch.setattr(session, "_call", spy)
    session.logits(torch.zeros(70, 2, 10, 10), tile=32)
    assert sizes == [32, 32, 32]
    session.run(torch.zeros(5, 2, 10, 10))
    assert sizes[3:] == [5]


def test_uint8_images_are_pixels(int8: Any) -> None:
    session = OnnxSession(int8.path, threads=1)
    codes = torch.randint(0, 256, (3, 2, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(session.logits(codes), session.logits(codes.float() / 255))
    assert torch.equal(pixels(codes), codes.float() / 255)


def test_no_images_give_no_logits(int8: Any) -> None:
    assert OnnxSession(int8.path).logits(torch.zeros(0, 2, 10, 10)).shape == (0, 3)


def test_the_file_describes_itself(int8: Any) -> None:
    session = OnnxSession(int8.path, threads=1)
    assert session.header.image_shape == (2, 10, 10)
    assert session.header.outputs == 3
    assert session.header.classes == ("shirt", "trouser", "Bär")
    assert session.metadata["box"] == "[0, 1]"
    session.metadata["box"] = "changed"
    assert session.metadata["box"] == "[0, 1]"


def test_integer_kernels_are_found_in_the_optimized_graph(int8: Any, float32: Any) -> None:
    integer, floating = OnnxSession(int8.path, threads=1), OnnxSession(float32.path, threads=1)
    assert integer.operators()["QLinearConv"] == 2
    assert integer.operators()["QGemm"] == 2
    assert integer.uses_integer_kernels()
    assert not floating.uses_integer_kernels()
    assert floating.operators()["Conv"] + floating.operators()["FusedConv"] == 2


def test_one_float_layer_is_enough_to_say_no(int8: Any, tmp_path: Path) -> None:
    model = onnx.load(int8.path)
    outputs = {name: node for node in model.graph.node for name in node.output}
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.input[0] = outputs[gemm.input[0]].input[0]  # past the rounding of its input ...
    gemm.input[0] = outputs[outputs[gemm.input[0]].input[0]].input[0]
    before = next(node for node in model.graph.node if node.op_type == "Relu" and node.output[0] == gemm.input[0])
    flat = helper.make_node("Flatten", [before.output[0]], ["flat"], axis=1)
    gemm.input[0] = "flat"
    model.graph.node.insert(list(model.graph.node).index(gemm), flat)
    onnx.save(model, tmp_path / "mixed.onnx")
    session = OnnxSession(tmp_path / "mixed.onnx", threads=1)
    assert session.operators()["QLinearConv"] >= 1
    assert not session.uses_integer_kernels()


def test_a_file_with_a_fixed_batch_is_fed_that_batch(tmp_path: Path) -> None:
    session = OnnxSession(tiny_file(tmp_path / "fixed.onnx", [4, 1, 2, 2], [4, 4]), threads=1)
    images = torch.rand(6, 1, 2, 2)
    assert torch.equal(session.logits(images), images.flatten(1))


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "got"), [((1, 3, 10, 10), r"\(1, 3, 10, 10\)"), ((2, 10, 10), r"\(2, 10, 10\)"), ((1, 2, 9, 10), "9")]
)
def test_images_of_a_wrong_shape(int8: Any, shape: tuple[int, ...], got: str) -> None:
    with pytest.raises(UsageError, match=rf"expected shape \(N, 2, 10, 10\) for model\.onnx, got .*{got}"):
        OnnxSession(int8.path).logits(torch.zeros(shape))


def test_images_of_a_wrong_dtype(int8: Any) -> None:
    with pytest.raises(UsageError, match=r"expected float32 in \[0, 1\] or uint8, got torch.float64"):
        OnnxSession(int8.path).logits(torch.zeros(1, 2, 10, 10, dtype=torch.float64))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected an ONNX file, found nothing at"):
        OnnxSession(tmp_path / "no.onnx")


def test_a_file_with_two_outputs(tmp_path: Path) -> None:
    model = onnx.load(tiny_file(tmp_path / "two.onnx", [4, 1, 2, 2], [4, 4]))
    model.graph.output.append(model.graph.output[0])
    model.graph.output[1].name = "probabilities"
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(ModelError, match=r"expected one output, logits \(N, classes\), got \w+, probabilities"):
        OnnxSession(tmp_path / "two.onnx")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\x08\x0a" * 40, b"hello"])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"expected an ONNX file, but .*model\.onnx"):
        OnnxSession(path)


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_truncated_file(int8: Any, tmp_path: Path, part: float) -> None:
    whole = int8.path.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ModelError, match=r"export (it|the file) again"):
        OnnxSession(path)


def test_a_file_with_an_operator_unknown_to_the_runtime(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "model.onnx", ["n", 1, 2, 2], ["n", 4])
    model = onnx.load(path)
    model.graph.node[0].op_type = "Flatter"
    onnx.save(model, path)
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        OnnxSession(path)


def test_files_that_are_no_image_classifiers(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match=r"expected a float32 input of 4 dimensions.*got FLOAT of 2 dimensions"):
        OnnxSession(tiny_file(path, ["n", 4], ["n", 4]))
    with pytest.raises(ModelError, match=r"expected a float32 input.*got DOUBLE of 4 dimensions"):
        OnnxSession(tiny_file(path, ["n", 1, 2, 2], ["n", 4], TensorProto.DOUBLE))
    with pytest.raises(ModelError, match=r"expected logits of 2 dimensions \(N, classes\), got 3"):
        OnnxSession(tiny_file(path, ["n", 1, 2, 2], ["n", 4, 1]))


def test_threads_and_runtimes_are_checked(int8: Any) -> None:
    assert OnnxSession(int8.path).threads >= 1
    with pytest.raises(UsageError, match=r"expected 0 .* or more, got -1"):
        OnnxSession(int8.path, threads=-1)
    with pytest.raises(UsageError, match="expected a runtime of onnxruntime, openvino, got 'tflite'"):
        open_session(int8.path, "tflite")


# --- OpenVINO --------------------------------------------------------------------------------------------------------


def test_openvino_is_an_extra(int8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'coldforge\[openvino\]'"):
        open_session(int8.path, "openvino")


def test_openvino_gives_the_same_answers(int8: Any, float32: Any, images: Tensor) -> None:
    pytest.importorskip("openvino", reason="the extra coldforge[openvino] is not installed")
    integer, floating = OpenVinoSession(int8.path, threads=1), OpenVinoSession(float32.path, threads=1)
    torch.testing.assert_close(floating.logits(images), OnnxSession(float32.path).logits(images), rtol=1e-3, atol=1e-4)
    reference = OnnxSession(int8.path).logits(images)
    assert float((integer.logits(images) - reference).abs().mean()) <= 0.02 * float(reference.std())
    assert not floating.uses_integer_kernels()
    assert integer.metadata["box"] == "[0, 1]"
    assert integer.operators()["Convolution"] == 2


# --- saturation ------------------------------------------------------------------------------------------------------


def test_processors_with_vnni_do_not_saturate() -> None:
    if not cpu_flags() & {"avx512_vnni", "avx_vnni", "asimddp"}:
        pytest.skip("this processor has no 8-bit dot product; whether its kernels saturate is what the probe finds out")
    assert int8_saturates() is False


def test_a_kernel_that_saturates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class SixteenBits:
        """Adds pairs of products in 16 bits, as vpmaddubsw does, then requantizes like the real kernel."""

        def __init__(self, model: bytes, *_: object, **__: object) -> None:
            graph = onnx.load_from_string(model).graph
            self.constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}

        def run(self, _: object, feed: dict[str, Any]) -> list[Any]:
            weights = self.constants["weights"][0].astype(int).ravel()
            codes = np.full(len(weights), int(feed["codes"].ravel()[0]))
            pairs = (weights * codes).reshape(-1, 2).sum(1)
            total = np.clip(pairs, -32768, 32767).sum()
            return [np.round(total / self.constants["scale"]).astype(np.uint8)]

    monkeypatch.setattr(runtime.ort, "InferenceSession", SixteenBits)
    assert int8_saturates() is True
    assert ort.InferenceSession is SixteenBits


def test_sessions_of_one_file_agree_with_the_twin(
    int8: Any, images: Tensor, plain_network: Callable[..., nn.Module]
) -> None:
    with torch.no_grad():
        twin = int8.twin(images).argmax(1)
    assert float((OnnxSession(int8.path).labels(images) == twin).float().mean()) >= 0.98
