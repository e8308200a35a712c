"""Agreement of a file and its twin: asked about the same images, the last iterates of the twin."""

import torch

from coldforge.attacks import parse_attack, predict
from coldforge.compress import attacking, quantize
from coldforge.evaluate import ask_both
from coldforge.recipe import QuantizeSpec


class File:
    """Answers as its network does, but for every ``each``-th image."""

    def __init__(self, network, each):
        self.network, self.each = network, each
        self.seen = []

    def logits(self, images):
        return predict(self.network, images)

    def labels(self, images):
        self.seen.append(images)
        answers = predict(self.network, images).argmax(1)
        answers[:: self.each] = (answers[:: self.each] + 1) % 4
        return answers


def test_both_are_asked_about_clean_images_and_the_last_iterates_on_the_twin(task, threat):
    network, data = task
    twin = quantize(network, QuantizeSpec(weight_bits=4, activation_bits=4), data.pixels())
    file, shown = File(twin, 5), []
    found = ask_both(twin, file, data, threat, n=12, seed=3, on_progress=lambda part, name: shown.append(name))
    images, labels = data.pixels(), data.labels
    with attacking(twin):
        last = parse_attack("pgd-20")(twin, images[:12], labels[:12], threat, seed=3, keep_last=True).last
        assert torch.equal(found.clean_twin, predict(twin, images).argmax(1))
        assert torch.equal(found.adversarial_twin, predict(twin, last).argmax(1))
    threat.verify(found.last, images[:12])
    assert torch.equal(found.last, last)
    assert [torch.equal(*pair) for pair in zip(file.seen, (images, last), strict=True)] == [True, True]
    assert found.agreement.clean == 1 - len(range(0, 40, 5)) / 40
    assert found.agreement.adversarial == 1 - 3 / 12
    assert set(shown) == {"pgd-20"}
