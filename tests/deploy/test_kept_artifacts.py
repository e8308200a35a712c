"""Networks of results/artifacts, saved by older code, still answer like their files: checkpoints keep their meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coldforge.attacks import predict
from coldforge.compress import attacking, load_network, read_structure
from coldforge.deploy import OnnxSession

ARTIFACTS = Path(__file__).parents[2] / "results" / "artifacts"


def test_there_are_artifacts() -> None:
    structures = [read_structure(path.parent) for path in ARTIFACTS.glob("*/model/structure.json")]
    ternary = [s for s in structures if s.quantization and s.quantization.weight_bits == 2 and not s.odd_codes]
    assert ternary, "one of 2 bits was saved before these had odd codes"


@pytest.mark.parametrize("folder", sorted(path.parent for path in ARTIFACTS.glob("*/model.onnx")), ids=lambda p: p.name)
def test_a_kept_network_answers_like_its_file(folder: Path) -> None:
    network, structure = load_network(folder / "model")
    images = torch.rand(64, *structure.image_shape, generator=torch.Generator().manual_seed(0))
    images = (255 * images).round() / 255
    with attacking(network):
        twin = predict(network, images)
    file = OnnxSession(folder / "model.onnx", threads=1).logits(images)
    assert float((twin.argmax(1) == file.argmax(1)).double().mean()) >= 0.98
    assert float((twin - file).abs().median()) < 0.01 * float(twin.std())
