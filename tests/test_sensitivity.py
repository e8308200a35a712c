"""What each layer costs: the scan, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from coldforge.attacks import ThreatModel
from coldforge.cli import main
from coldforge.compress import ActivationQuantizer, Structure, network_digest, prune, quantize, refit, save_network
from coldforge.console import RichProgress
from coldforge.data import from_arrays
from coldforge.errors import UsageError
from coldforge.evaluation import sensitivity as scanning
from coldforge.evaluation.request import Importance
from coldforge.evaluation.sensitivity import Sensitivity, sensitivity
from coldforge.models import cnn8, normalized, resnet20
from coldforge.progress import Step
from coldforge.recipe import PruneSpec, QuantizeSpec, TrainSpec
from coldforge.train import train

BALL = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 1, 8, 8, generator=generator).round() * 0.6 + 0.2
    labels = torch.randint(3, (300,), generator=generator)
    images = (patterns[labels] + 0.1 * torch.randn(300, 1, 8, 8, generator=generator)).clamp(0, 1)
    data = from_arrays(images, labels, images[:60], labels[:60], validation=100)
    torch.manual_seed(0)
    network = normalized(
        nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 4, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (0.5,),
        (0.25,),
    )
    with torch.no_grad():  # the first layer's second half is never read: it costs nothing
        network.network[2].weight[:, 6:] = 0
        network.network[0].weight[6:] *= 1e-3
    spec = TrainSpec(epochs=8, batch_size=16, lr=0.05, objective="adversarial", attack="pgd-3")
    trained = train(network, data, spec, BALL).model
    with torch.no_grad():
        trained.network[2].weight[:, 6:] = 0
        trained.network[0].weight[6:] *= 1e-3
    return trained, data


def test_what_a_layer_reads_is_coarser_and_the_sum_of_the_same_is_not():
    network = normalized(resnet20(), (0.5,) * 3, (0.25,) * 3).eval()
    layer, images = "network.layer1.1.conv1", torch.rand(8, 3, 8, 8)
    coarse, fine = scanning._coarser(network, images, layer, 2), quantize(network, QuantizeSpec(), images)
    own = coarse.get_submodule(layer).input_quantizer
    others = [part.bits for part in coarse.modules() if isinstance(part, ActivationQuantizer) and part is not own]
    assert (own.bits, coarse.get_submodule(layer).bits, set(others)) == (2, 2, {8})
    with torch.no_grad():
        own.bits = own.final_bits = 8
        own.set_range(0.0, float(fine.get_submodule(layer).input_quantizer.step) * 255)
        coarse.get_submodule(layer).bits = 8
        refit(coarse.get_submodule(layer))
        torch.testing.assert_close(coarse(images), fine(images), rtol=0.05, atol=0.05)


def test_the_scan_finds_what_costs_nothing(task):
    network, data = task
    said = []
    rows = sensitivity(
        network,
        data.validation,
        BALL,
        calibration=data.train.pixels(),
        ratios=(0.5, 0.75),
        bits=(4, 1),
        on_progress=lambda fraction, text: said.append((fraction, text)),
    )
    assert (rows[0].layer, rows[0].robust_loss) == ("(none)", 0.0)
    assert rows[0].robust_accuracy > 0.7
    found = {(row.layer, row.how): row for row in rows[1:]}
    assert len(found) == len(rows) - 1 == 2 * 2 + 3 * 2
    assert said[-1][0] == 1
    assert len(said) == len(found)
    free = found["network.0", "prune 50%"]
    assert free.robust_loss == 0
    assert free.robust_loss_ci95[0] < 0 < free.robust_loss_ci95[1]
    assert free.params > 0.2
    assert free.macs > 0.3
    dear = found["network.2", "prune 75%"]
    assert dear.robust_loss > 0.1
    assert dear.robust_loss_ci95[0] > 0
    assert dear.robust_accuracy == pytest.approx(rows[0].robust_accuracy - dear.robust_loss)
    assert found["network.2", "1 bits"].robust_loss >= found["network.2", "4 bits"].robust_loss


def test_channels_go_by_the_importance_that_is_given(task):
    network, data = task

    def backwards(model: nn.Module, name: str) -> torch.Tensor:
        return -model.get_submodule(name).weight.detach().abs().flatten(1).sum(1)

    rows = {}
    for importance in ("l1", backwards):
        found = sensitivity(
            network,
            data.validation,
            BALL,
            calibration=data.train.pixels(),
            ratios=(0.5,),
            bits=(),
            importance=importance,
        )
        rows[importance] = {row.layer: row for row in found}
    assert rows["l1"]["network.0"].robust_loss == 0
    assert rows[backwards]["network.0"].robust_loss > 0.1, "the half that is read"


def test_channels_that_go_at_random_are_those_of_a_recipe(task):
    network, data = task
    for ratios in ((0.5,), (0.25, 0.5)):
        ways = scanning._ways(network, data.image_shape, data.train.pixels(), ratios, (), "random", 5)
        made = {layer: make() for layer, how, make in ways if how == "prune 50%"}
        for layer, small in made.items():
            spec = PruneSpec(ratio=0.5, round_to=1, min_width=1, importance="random")
            expected = prune(network, spec, image_shape=data.image_shape, seed=5, only=[layer])[0]
            assert network_digest(small) == network_digest(expected)
        assert len(made) == 2


def test_a_quantized_network_is_refused(task):
    network, data = task
    rounded = quantize(network, QuantizeSpec(), data.train.pixels())
    with pytest.raises(UsageError, match="expected a float network"):
        sensitivity(rounded, data.validation, BALL, calibration=data.train.pixels())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = normalized(cnn8(), (0.3,), (0.35,)).eval()
    classes = tuple("abcdefghij")
    structure = Structure(source="zoo:cnn8", image_shape=(1, 28, 28), classes=classes, mean=(0.3,), std=(0.35,))
    save_network(tmp_path, network, structure)
    words = ["sensitivity", str(tmp_path), "--data", "fashion-mnist-mini", "--eps", "0.1", "--n", "8", "--threads", "1"]
    words += ["--ratio", "0.5", "--bits", "4", "--quiet"]
    planned: list[Step] = []
    monkeypatch.setattr(RichProgress, "plan", lambda self, steps: planned.extend(steps))
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 + 7 + 8
    assert [step.estimate_s > 0.5 for step in planned] == [True]
    assert rows[1]["layer"] == "network.conv1"
    with monkeypatch.context() as known:
        known.setattr(scanning, "sensitivity", lambda *_, **__: [Sensitivity(**row) for row in rows])
        assert main(words) == 0
    out = capsys.readouterr().out
    assert "cost, points [95 %]" in out
    assert "network.conv1" in out
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(scanning, "taylor_on", lambda _, images, ball, *, seed: (len(images), ball))
    monkeypatch.setattr(scanning, "sensitivity", lambda *_, **more: asked.append(more) or [])
    for kind in get_args(Importance):
        assert main([*words, "--importance", kind, "--json"]) == 0
    assert {(each["ratios"], each["bits"]) for each in asked} == {((0.5,), (4,))}
    rankings = {kind: each["importance"] for kind, each in zip(get_args(Importance), asked, strict=True)}
    assert [rankings.pop(kind) for kind in ("taylor", "taylor-adversarial")] == [(1024, None), (1024, BALL)]
    assert rankings == {kind: kind for kind in rankings}
    assert set(get_args(Importance)) == set(get_args(PruneSpec.model_fields["importance"].annotation))
    monkeypatch.undo()
    assert main([*words, "--importance", "batchnorm"]) == 1
    assert "expected a network with BatchNorm behind its layers, found none" in capsys.readouterr().err
    assert main([*words, "--importance", "size"]) == 2
    assert "importance" in capsys.readouterr().err
    assert main([*words, "--ratio", "1.5"]) == 2
    assert "--ratio: expected a part of the channels between 0 and 1, got 1.5" in capsys.readouterr().err
    assert main([*words, "--bits", "9"]) == 2
    assert "--bits: expected 1 to 8, got 9" in capsys.readouterr().err
    assert main([*words, "--mean", "0.9", "--std", "0.01"]) == 2
    assert "--mean is for checkpoint files" in capsys.readouterr().err
    (tmp_path / "x.onnx").write_bytes(b"")
    assert main(["sensitivity", str(tmp_path / "x.onnx"), "--data", "fashion-mnist-mini", "--eps", "0.1"]) == 2
    assert "expected a network whose layers can be changed" in capsys.readouterr().err
