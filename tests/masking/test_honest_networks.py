"""Networks that hide nothing: none may be flagged, however robust, small or coarse."""

from __future__ import annotations

import pytest
import torch

from coldforge.attacks import ThreatModel, predict
from coldforge.compress import prune, quantize
from coldforge.deploy import export_onnx, open_session
from coldforge.evaluate import Target, masking_panel
from coldforge.recipe import PruneSpec, QuantizeSpec

L2 = ThreatModel("l2", 1.0)
SMALL = ThreatModel("linf", 0.03)
"""Where a natural network still stands on half of the images, so that attacks can differ."""
HONEST = ("natural", "adversarial", "pruned", "batchnorm", "int8", "int8 of a natural network", "int4")


@pytest.fixture(scope="module")
def networks(fresh, fit, natural, robust, data):
    pruned, _ = prune(robust, PruneSpec(ratio=0.5, round_to=4, min_width=4), image_shape=(1, 14, 14))
    calibration = data.train[:256]

    def coarse(network, bits):
        return quantize(network, QuantizeSpec(weight_bits=bits, activation_bits=bits), calibration)

    built = {
        "natural": natural,
        "adversarial": robust,
        "pruned": fit(pruned, epochs=2, inner="pgd-2", lr=0.02),
        "batchnorm": fit(fresh(norm=True), epochs=2),
        "int8": coarse(robust, 8),
        "int8 of a natural network": coarse(natural, 8),
        "int4": fit(coarse(robust, 4), epochs=2, inner="fgsm-rs", lr=0.02),
    }
    assert tuple(built) == HONEST
    return built


CASES = [
    ("natural", SMALL, True),
    ("natural", L2, False),  # an image can be planted for 50 of 62 images
    ("adversarial", None, True),
    ("adversarial", L2, False),  # for 54 of 60: just enough
    ("pruned", None, True),
    ("batchnorm", SMALL, True),
    ("int8", None, True),
    ("int8 of a natural network", SMALL, True),
    ("int4", None, False),  # for 39 of 61
]
"""Network, ball (None: that of its training), and whether the binarization test must be conclusive."""


def test_there_are_at_least_five_honest_networks():
    assert len(set(HONEST)) == len(HONEST) >= 5
    assert {name for name, _, _ in CASES} == set(HONEST)
    assert {name for name, _, conclusive in CASES if conclusive} >= {"natural", "adversarial"}


@pytest.mark.parametrize(
    ("name", "threat", "conclusive"), CASES, ids=[f"{n}-{t.norm if t else 'trained eps'}" for n, t, _ in CASES]
)
def test_an_honest_network_is_not_flagged(name, threat, conclusive, networks, data, ball):
    network = networks[name]
    assert (predict(network, data.test).argmax(1) == data.test_labels).float().mean() > 0.65
    found = masking_panel(Target(network), data.test, data.test_labels, threat or ball)
    wrong = [f"{check.name}: {check.meaning}" for check in found.checks if not check.passed]
    assert not wrong
    assert found.verdict == "ok"
    (planted,) = [check for check in found.checks if check.name == "binarization"]
    assert planted.meaning.startswith(("of the adversarial images planted for", "not conclusive, so not counted"))
    assert not (conclusive and planted.meaning.startswith("not conclusive")), planted.meaning


def test_an_honest_file_beside_its_twin_and_its_parent_is_not_flagged(networks, data, ball, tmp_path):
    """As `coldforge run` asks: the file has the last word, and images come from its parent, too."""
    export_onnx(networks["int8"], tmp_path / "model.onnx", image_shape=(1, 14, 14), classes=[str(n) for n in range(10)])
    file = open_session(tmp_path / "model.onnx", threads=1)
    target = Target(networks["int8"], file, {"its float parent": networks["adversarial"]})
    found = masking_panel(target, data.test, data.test_labels, ball)
    assert not [f"{check.name}: {check.meaning}" for check in found.checks if not check.passed]
    assert found.verdict == "ok"
    asked = {check.name: check for check in found.checks}
    assert asked["binarization"].conclusive
    assert "images made on other networks fooled" in asked["transfer_beats_gradient"].meaning


@pytest.mark.parametrize("name", ["natural", "adversarial", "int8", "int4"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a surrogate"])
def test_an_honest_file_that_is_all_there_is_is_not_flagged(name, beside, networks, data, ball, tmp_path):
    export_onnx(networks[name], tmp_path / "model.onnx", image_shape=(1, 14, 14), classes=[str(n) for n in range(10)])
    file = open_session(tmp_path / "model.onnx", threads=1)
    target = Target(
        None, file, {"its parent": networks["natural" if name == "natural" else "adversarial"]} if beside else {}
    )
    found = masking_panel(target, data.test, data.test_labels, SMALL if name == "natural" else ball)
    assert not [f"{check.name}: {check.meaning}" for check in found.checks if not check.passed]
    values = {check.name: check.value for check in found.checks}
    assert values["scores_vary"] == 0
    assert values.get("transfer_beats_square", 0) <= 0.12


def test_confident_is_not_masked(natural, data):
    """Logits three times as large, as of a network trained to the end: gaps of 30, and nothing underflows."""

    class Confident(torch.nn.Module):
        def forward(self, images):
            return 3 * natural(images)

    assert predict(Confident(), data.test).amax() > 20
    assert masking_panel(Target(Confident()), data.test, data.test_labels, SMALL).verdict == "ok"
