"""Networks that hide nothing: none may be flagged, however robust, small or coarse."""

from __future__ import annotations

import pytest
import torch

from coldforge.attacks import ThreatModel, predict
from coldforge.compress import prune, quantize
from coldforge.evaluate import Target, masking_panel
from coldforge.recipe import PruneSpec, QuantizeSpec

L2 = ThreatModel("l2", 1.0)
SMALL = ThreatModel("linf", 0.03)
"""Where a natural network still stands on half of the images, so that attacks can differ."""


@pytest.fixture(scope="module")
def networks(fresh, fit, natural, robust, data):
    pruned, _ = prune(robust, PruneSpec(ratio=0.5, round_to=4, min_width=4), image_shape=(1, 14, 14))
    calibration = data.train[:256]

    def coarse(network, bits):
        return quantize(network, QuantizeSpec(weight_bits=bits, activation_bits=bits), calibration)

    return {
        "natural": natural,
        "adversarial": robust,
        "pruned": fit(pruned, epochs=2, inner="pgd-2", lr=0.02),
        "batchnorm": fit(fresh(norm=True), epochs=2),
        "int8": coarse(robust, 8),
        "int8 of a natural network": coarse(natural, 8),
        "int4": fit(coarse(robust, 4), epochs=2, inner="fgsm-rs", lr=0.02),
    }


CASES = [
    ("natural", SMALL),
    ("natural", L2),
    ("adversarial", None),
    ("adversarial", L2),
    ("pruned", None),
    ("batchnorm", SMALL),
    ("int8", None),
    ("int8 of a natural network", SMALL),
    ("int4", None),
]


@pytest.mark.parametrize(("name", "threat"), CASES, ids=[f"{n}-{t.norm if t else 'trained eps'}" for n, t in CASES])
def test_an_honest_network_is_not_flagged(name, threat, networks, data, ball):
    network = networks[name]
    assert (predict(network, data.test).argmax(1) == data.test_labels).float().mean() > 0.65
    found = masking_panel(Target(network), data.test, data.test_labels, threat or ball)
    wrong = [f"{check.name}: {check.meaning}" for check in found.checks if not check.passed]
    assert not wrong
    assert found.verdict == "ok"


def test_confident_is_not_masked(natural, data):
    """Logits three times as large, as of a network trained to the end: gaps of 30, and nothing underflows."""

    class Confident(torch.nn.Module):
        def forward(self, images):
            return 3 * natural(images)

    assert predict(Confident(), data.test).amax() > 20
    assert masking_panel(Target(Confident()), data.test, data.test_labels, SMALL).verdict == "ok"
