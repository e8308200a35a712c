"""Agreement of a file and its twin: asked about the same images, the last iterates of the twin."""

import copy

import torch

from coldforge.attacks import parse_attack, predict
from coldforge.compress import attacking, quantize
from coldforge.data import ImageSet
from coldforge.evaluate import ask_both
from coldforge.evaluate.robustness import names_of
from coldforge.recipe import QuantizeSpec
from traces import draw_a_little, traces


class File:
    """Answers as its network does, but for every ``each``-th image; 0: for none."""

    def __init__(self, network, each=0):
        self.network, self.each = network, each
        self.seen = []

    def logits(self, images):
        return predict(self.network, images)

    def labels(self, images):
        self.seen.append(images)
        answers = predict(self.network, images).argmax(1)
        if self.each:
            answers[:: self.each] = (answers[:: self.each] + 1) % 4
        return answers


def test_both_are_asked_about_clean_images_and_the_last_iterates_on_the_twin(task, threat):
    network, data = task
    twin = quantize(network, QuantizeSpec(weight_bits=4, activation_bits=4), data.pixels())
    file, shown = File(copy.deepcopy(twin), 5), []
    predict(twin, data.pixels())  # quantizers read their zero points once
    twin.train()
    draw_a_little()
    before = traces(twin, data.images, data.labels)
    found = ask_both(twin, file, data, threat, n=12, seed=3, on_progress=lambda part, name: shown.append(name))
    assert traces(twin, data.images, data.labels) == before
    images, labels, names = data.pixels(), data.labels, names_of(data.pixels())
    with attacking(twin):
        last = parse_attack("pgd-20")(
            twin, images[:12], labels[:12], threat, seed=3, indices=names[:12], keep_last=True
        ).last
        assert torch.equal(found.clean_twin, predict(twin, images).argmax(1))
        assert torch.equal(found.adversarial_twin, predict(twin, last).argmax(1))
    threat.verify(found.last, images[:12])
    assert torch.equal(found.last, last)
    assert [torch.equal(*pair) for pair in zip(file.seen, (images, last), strict=True)] == [True, True]
    assert found.agreement.clean == 1 - len(range(0, 40, 5)) / 40
    assert found.agreement.adversarial == 1 - 3 / 12
    assert set(shown) == {"pgd-20"}


def test_pitfall_18_agreement_does_not_move_with_batch_or_order(task, threat):
    network, data = task
    twin = quantize(network, QuantizeSpec(weight_bits=4, activation_bits=4), data.pixels())
    file = File(network)
    whole = ask_both(twin, file, data, threat, n=40, seed=3)
    assert whole.agreement.adversarial < 1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    turned = ImageSet(data.images[order], data.labels[order], data.classes)
    for n in (1, 7, 40):
        found = ask_both(twin, file, turned, threat, n=n, seed=3)
        assert torch.equal(found.clean_file, whole.clean_file[order])
        for what in ("last", "adversarial_twin", "adversarial_file"):
            assert torch.equal(getattr(found, what), getattr(whole, what)[order[:n]]), (what, n)
