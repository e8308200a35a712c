"""Runs exported files: ONNX Runtime, and OpenVINO as an extra, behind one small surface.

Images go through a session in tiles of a fixed size, the last one padded, so that an image gets the same logits
whether it comes alone or among ten thousand.
"""

from __future__ import annotations

import json
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from coldforge.errors import ModelError, UsageError
from coldforge.provenance import physical_cores

TILE = 64
"""Images per call of :meth:`Session.logits`."""

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "QAttention", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul"}) | {
    "FusedMatMul"
}

Runtime = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class FileHeader:
    """What an ONNX image classifier says about itself."""

    input_name: str
    image_shape: tuple[int, int, int]
    """(C, H, W); 0 where the file leaves a size open."""
    batch: int
    """The only batch size that the file accepts; 0 if any."""
    outputs: int
    """Number of logits; 0 where the file leaves it open."""
    metadata: dict[str, str]
    """The file's own key and value pairs: coldforge_version, classes, input, ..."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or an empty tuple where the file has none."""
        return tuple(json.loads(self.metadata.get("classes", "[]")))


def pixels(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, float32 passes as it is.

    Raises:
        UsageError: for another dtype.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    if images.dtype != torch.float32:
        raise UsageError(f"images: expected float32 in [0, 1] or uint8, got {images.dtype}")
    return images


def read_header(path: str | Path) -> FileHeader:
    """Read and check an ONNX image classifier: one float32 input (N, C, H, W), one output (N, K).

    Raises:
        ModelError: where there is no file, it is not ONNX or damaged, or it is no image classifier.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"expected an ONNX file, found nothing at {file}")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError lives in a different place in each of its versions
        raise ModelError(
            f"expected an ONNX file, but {file} cannot be read as one: {error}; export it again"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"expected an ONNX file, but {file} holds no network; export it again")
    weights = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in weights]
    if len(inputs) != 1:
        raise ModelError(f"{file}: expected one input (N, C, H, W), got {len(inputs)}")
    kind = inputs[0].type.tensor_type
    shape = _sizes(inputs[0])
    if kind.elem_type != TensorProto.FLOAT or len(shape) != 4:
        name = TensorProto.DataType.Name(kind.elem_type)
        raise ModelError(
            f"{file}: expected a float32 input of 4 dimensions (N, C, H, W), "
            f"got {name} of {len(shape)} dimensions {shape}"
        )
    if len(model.graph.output) != 1:
        names = ", ".join(item.name for item in model.graph.output)
        raise ModelError(f"{file}: expected one output, logits (N, classes), got {names}; export it with these alone")
    answer = _sizes(model.graph.output[0])
    if len(answer) != 2:
        raise ModelError(f"{file}: expected logits of 2 dimensions (N, classes), got {len(answer)} dimensions {answer}")
    metadata = {item.key: item.value for item in model.metadata_props}
    return FileHeader(inputs[0].name, (shape[1], shape[2], shape[3]), shape[0], answer[1], metadata)


def _sizes(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)  # 0 for a symbolic size


class Session(ABC):
    """A file, ready to run. Subclasses load it and write one hook, :meth:`_call`."""

    runtime: Runtime

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        if threads < 0:
            raise UsageError(f"threads: expected 0 (all physical cores) or more, got {threads}")
        self.path = Path(path)
        self.header = read_header(self.path)
        self.threads = threads or physical_cores()

    @abstractmethod
    def _call(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits (N, K) of float32 images (N, C, H, W), in one call of the runtime."""

    @abstractmethod
    def operators(self) -> Counter[str]:
        """Operator types that the runtime really executes, after its own optimization, and how often."""

    @abstractmethod
    def uses_integer_kernels(self) -> bool:
        """True where convolutions and matrix products run on integers and none is left in floating point."""

    @property
    @final
    def metadata(self) -> dict[str, str]:
        """The file's own key and value pairs."""
        return dict(self.header.metadata)

    @final
    def run(self, images: Tensor) -> Tensor:
        """Logits (N, K) in one call, as a program that serves the file would do it; for measuring.

        Args:
            images: float32 in [0, 1] or uint8, (N, C, H, W).
        """
        return torch.from_numpy(self._call(self._checked(images).numpy()))

    @final
    def logits(self, images: Tensor, *, tile: int = TILE) -> Tensor:
        """Logits (N, K) float32, the same for an image whatever its neighbours.

        Args:
            images: float32 in [0, 1] or uint8, (N, C, H, W).
            tile: images per call; the last call is filled up with black images.

        Raises:
            UsageError: for images of a wrong dtype or shape.
        """
        inputs = self._checked(images)
        tile = self.header.batch or tile
        rows = []
        for start in range(0, len(inputs), tile):
            part = inputs[start : start + tile]
            padded = part if len(part) == tile else torch.cat([part, part.new_zeros(tile - len(part), *part.shape[1:])])
            rows.append(torch.from_numpy(self._call(padded.numpy())[: len(part)]))
        return torch.cat(rows) if rows else torch.empty(0, self.header.outputs)

    @final
    def labels(self, images: Tensor, *, tile: int = TILE) -> Tensor:
        """Index of the largest logit, int64 (N,); see :meth:`logits`."""
        return self.logits(images, tile=tile).argmax(1)

    def _checked(self, images: Tensor) -> Tensor:
        expected = self.header.image_shape
        given = tuple(images.shape)
        fits = len(given) == 4 and all(want in (0, got) for want, got in zip(expected, given[1:], strict=True))
        if not fits:
            sizes = ", ".join(str(size) if size else "any" for size in expected)
            raise UsageError(f"images: expected shape (N, {sizes}) for {self.path.name}, got {given}")
        return pixels(images.detach().cpu()).contiguous()


@final
class OnnxSession(Session):
    """An ONNX file in ONNX Runtime on the CPU.

    Args:
        path: the file.
        threads: threads of one call; 0 takes the physical cores.

    Raises:
        ModelError: where the file cannot be used.
    """

    runtime: Runtime = "onnxruntime"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__(path, threads=threads)
        self._session = _load(self.path, _options(self.threads))

    def _call(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            (logits,) = self._session.run(None, {self.header.input_name: images})
        except Exception as error:  # ONNX Runtime raises its own classes, which share no public base
            raise ModelError(f"{self.path.name} failed on images of shape {images.shape}: {error}") from error
        return np.asarray(logits, dtype=np.float32)

    def operators(self) -> Counter[str]:
        """Operator types after ONNX Runtime's own optimization for this processor, and how often."""
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            options = _options(1)
            options.optimized_model_filepath = str(optimized)
            _load(self.path, options)
            graph = onnx.load(str(optimized)).graph
        return Counter(node.op_type for node in graph.node)

    def uses_integer_kernels(self) -> bool:
        """True where convolutions and matrix products run on integers and none is left in floating point."""
        found = set(self.operators())
        return bool(found & INTEGER_KERNELS) and not found & FLOAT_KERNELS


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return options


def _load(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, which share no public base
        raise ModelError(f"ONNX Runtime cannot load {path}: {error}; export the file again") from error


@final
class OpenVinoSession(Session):
    """An ONNX file in OpenVINO on the CPU (``pip install coldforge[openvino]``).

    Floating point is kept at 32 bits; OpenVINO would choose bfloat16 by itself on processors that have it.

    Raises:
        UsageError: where OpenVINO is not installed.
        ModelError: where the file cannot be used.
    """

    runtime: Runtime = "openvino"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__(path, threads=threads)
        try:
            import openvino
        except ImportError:
            raise UsageError(
                "the openvino runtime: expected the package openvino, found none; pip install 'coldforge[openvino]'"
            ) from None
        self._asking = threading.Lock()
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            self._compiled: Any = openvino.Core().compile_model(str(self.path), "CPU", settings)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot load {self.path}: {error}; use the onnxruntime runtime") from error

    def _call(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with self._asking:  # one request, which one thread at a time can use
            return np.array(self._compiled([images])[0], dtype=np.float32)

    def _layers(self) -> list[tuple[str, str]]:
        infos = [operation.get_rt_info() for operation in self._compiled.get_runtime_model().get_ops()]
        return [(str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in infos]

    def operators(self) -> Counter[str]:
        """Layer types of the compiled model, and how often."""
        return Counter(kind for kind, _ in self._layers())

    def uses_integer_kernels(self) -> bool:
        """True where convolutions and matrix products run on 8-bit integers and none is left in floating point."""
        heavy = [bits for kind, bits in self._layers() if kind in ("Convolution", "FullyConnected", "MatMul")]
        return bool(heavy) and all(bits in ("u8", "i8") for bits in heavy)


def open_session(path: str | Path, runtime: str = "onnxruntime", *, threads: int = 0) -> Session:
    """Load a file into a runtime by its name.

    Raises:
        UsageError: for an unknown runtime, or one that is not installed.
    """
    if runtime == "onnxruntime":
        return OnnxSession(path, threads=threads)
    if runtime == "openvino":
        return OpenVinoSession(path, threads=threads)
    raise UsageError(f"expected a runtime of onnxruntime, openvino, got {runtime!r}")


def int8_saturates() -> bool:
    """True where this processor's 8-bit kernels lose large sums, so that files answer differently than on others.

    Without VNNI (or an equivalent) pairs of products are added in 16 bits: 2 * 255 * 127 does not fit. The probe is one
    convolution of the largest codes, whose exact result is known, in ONNX Runtime. The cure is 7-bit weights
    (``deploy.reduce_range = true``).
    """
    channels, kernel = 16, 3
    taps = channels * kernel * kernel
    exact = taps * 255 * 127
    codes = np.full((1, channels, 8, 8), 255, np.uint8)
    weights = np.full((channels, channels, kernel, kernel), 127, np.int8)
    constants = {
        "one": np.float32(1.0),
        "zero_u8": np.uint8(0),
        "weights": weights,
        "weight_scales": np.ones(channels, np.float32),
        "weight_zeros": np.zeros(channels, np.int8),
        "scale": np.float32(exact / 200),  # the exact sum becomes the code 200; a saturated one about half of it
    }
    names = ("codes", "one", "zero_u8", "weights", "weight_scales", "weight_zeros", "scale", "zero_u8")
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", list(names), ["sums"])],
        "saturation_probe",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, codes.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.UINT8, (1, channels, 6, 6))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), _options(1), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": codes})
    return bool(np.any(np.asarray(sums) != 200))
