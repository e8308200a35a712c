"""What does it cost, layer by layer? Accuracies of a robust network after one layer alone was compressed.

For each layer (with those tied to it): its channels pruned, or its weights and its input rounded to few
bits, and nothing trained. Done on the validation part of the training images, because what is learned here decides
recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from coldforge.attacks import TILE, ThreatModel, parse_attack
from coldforge.compress import (
    ActivationQuantizer,
    QuantizedLayer,
    calibrate,
    insert_quantizers,
    prune,
    quantize,
    refit,
    set_bits,
)
from coldforge.compress.importance import Importance
from coldforge.data import ImageSet
from coldforge.errors import UsageError
from coldforge.evaluate import WORST_CASE, Target, evaluate, paired_interval, summarize
from coldforge.evaluation.job import pass_seconds
from coldforge.evaluation.request import ScanRequest
from coldforge.evaluation.subject import load_network_of
from coldforge.measure import count_macs, count_params
from coldforge.models import torch_threads
from coldforge.progress import Progress, Step
from coldforge.provenance import physical_cores
from coldforge.recipe import PruneSpec, QuantizeSpec
from coldforge.train.ranking import taylor_on

ATTACK = "pgd-10"
_PASSES = 20.0
"""Forward passes that judging a network takes for each tile, roughly: ten steps with gradients on what still stands."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer, compressed in one way."""

    layer: str
    """Name of the layer; tied layers are pruned with it."""
    how: str
    """Such as "prune 50 %" or "4 bits"."""
    params: float
    """Part of the network's parameters that this saves (pruning)."""
    macs: float
    """Part of its multiply-adds that this saves (pruning)."""
    clean_accuracy: float
    robust_accuracy: float
    robust_loss: float
    """Points of robust accuracy, as a fraction, that it costs; on the same images."""
    robust_loss_ci95: tuple[float, float]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def sensitivity(
    network: nn.Module,
    data: ImageSet,
    threat_model: ThreatModel,
    *,
    calibration: Tensor,
    ratios: Sequence[float] = (0.25, 0.5),
    bits: Sequence[int] = (4, 2),
    importance: str | Importance = "l1",
    seed: int = 0,
    on_progress: Callable[[float, str], None] | None = None,
) -> list[Sensitivity]:
    """Compress one layer at a time and attack with PGD-10.

    Args:
        network: float, and robust, or there is nothing to lose.
        data: validation images.
        threat_model: ball and box.
        calibration: training images ``(N, C, H, W)`` for the ranges of activations.
        ratios: parts of the channels to remove.
        bits: of the layer's weights and of its input; all others have 8.
        importance: ranks the channels: a name as in recipes that needs no images, or a function.
        seed: of the attack, and of a random ranking, which is that of a recipe for each layer.
        on_progress: called with the finished fraction and what was measured.

    Returns:
        One row for each layer and way, in the order of the network. The first, of the layer "(none)", is the network
        itself.

    Raises:
        UsageError: the network is quantized already.
    """
    if any(isinstance(module, QuantizedLayer) for module in network.modules()):
        raise UsageError(
            "expected a float network, whose layers can be compressed one at a time, got a quantized one; take a dense "
            "robust network, such as the model/ of a run with quantize.weight_bits = quantize.activation_bits = 32"
        )
    attacks = [parse_attack(ATTACK)]
    shape = data.image_shape
    macs, params = count_macs(network, shape), count_params(network)

    def stands(model: nn.Module) -> tuple[float, Tensor]:
        ledger = evaluate(Target(model), data, attacks, threat_model, seed=seed, precision="fp32", transfer=False)
        return summarize(ledger, data.classes).clean_accuracy, ledger.survived(WORST_CASE)

    ways = list(_ways(network, shape, calibration, ratios, bits, importance, seed))
    clean, before = stands(network)
    rows = [Sensitivity("(none)", "", 0.0, 0.0, clean, float(before.double().mean()), 0.0, (0.0, 0.0))]
    for number, (layer, how, make) in enumerate(ways):
        model = make()
        clean, after = stands(model)
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        pruned = how.startswith("prune")
        rows.append(
            Sensitivity(
                layer,
                how,
                1 - count_params(model) / params if pruned else 0.0,
                1 - count_macs(model, shape) / macs if pruned else 0.0,
                clean,
                float(after.double().mean()),
                (lost - won) / len(before),
                paired_interval(lost, won, len(before)),
            )
        )
        if on_progress is not None:
            on_progress((number + 1) / len(ways), f"{layer}: {how}")
    return rows


def scan(path: Path, request: ScanRequest, progress: Progress) -> list[Sensitivity]:
    """:func:`sensitivity` of what ``path`` names, on the first validation images.

    Raises:
        ColdforgeError: the message says what was expected, what was found and what to do.
    """
    with torch_threads(request.threads or min(physical_cores(), 8)):
        network, splits, threat_model = load_network_of(path, request)
        part = splits.validation.take(slice(0, request.n or None))
        calibration = splits.train.pixels(slice(0, QuantizeSpec().calibration_n))
        ways = 1 + sum(1 for _ in _ways(network, splits.image_shape, calibration, request.ratio, request.bits))
        seconds = ways * _PASSES * pass_seconds(network, part) * max(len(part) / TILE, 1.0)
        progress.plan([Step("sensitivity", seconds)])
        progress.note("nothing of this scan is kept when it is stopped")
        progress.begin("sensitivity")
        rows = sensitivity(
            network,
            part,
            threat_model,
            calibration=calibration,
            ratios=request.ratio,
            bits=request.bits,
            importance=_ranking(network, splits.train, threat_model, request),
            seed=request.seed,
            on_progress=progress.advance,
        )
        progress.end("sensitivity")
    return rows


def _ranking(network: nn.Module, data: ImageSet, threat_model: ThreatModel, request: ScanRequest) -> str | Importance:
    if not request.importance.startswith("taylor"):
        return request.importance
    attacked = threat_model if request.importance == "taylor-adversarial" else None
    return taylor_on(network, data.take(slice(0, PruneSpec().importance_n)), attacked, seed=request.seed)


def _ways(
    network: nn.Module,
    shape: Sequence[int],
    calibration: Tensor,
    ratios: Sequence[float],
    bits: Sequence[int],
    importance: str | Importance = "l1",
    seed: int = 0,
) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """(layer, how, what makes the network)."""
    named, ranking = (importance, None) if isinstance(importance, str) else ("l1", importance)
    fine = PruneSpec(ratio=0.5, round_to=1, min_width=1).model_copy(update={"importance": named})
    roots = [step[0] for step in prune(network, fine, image_shape=shape)[1].steps]
    names = [name for name, _ in network.named_modules() if name in roots]
    for layer in names:
        for ratio in ratios:
            spec = fine.model_copy(update={"ratio": ratio})
            yield layer, f"prune {ratio:.0%}", partial(_narrower, network, shape, layer, spec, ranking, seed)
    eight = quantize(network, QuantizeSpec(), calibration)
    for layer, module in eight.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight.requires_grad:
            for count in bits:
                yield layer, f"{count} bits", partial(_coarser, network, calibration, layer, count)


def _narrower(
    network: nn.Module, shape: Sequence[int], layer: str, spec: PruneSpec, ranking: Importance | None, seed: int
) -> nn.Module:
    return prune(network, spec, image_shape=shape, seed=seed, importance=ranking, only=[layer])[0]


def _coarser(network: nn.Module, calibration: Tensor, layer: str, bits: int) -> nn.Module:
    spec = QuantizeSpec.model_validate({"activation_bits": bits})
    rounded = insert_quantizers(network, spec)  # sums of what the layer reads have a grid of their own
    set_bits(rounded, spec.edge_bits, keep_steps=True)  # there are none yet
    calibrate(rounded, calibration, spec.calibration)
    module = rounded.get_submodule(layer)
    assert isinstance(module, QuantizedLayer)
    module.bits = module.final_bits = bits
    refit(module)
    reads: ActivationQuantizer = module.input_quantizer
    if not reads.reads_image:  # the image keeps its 8 bits, as in every recipe
        low, high = -reads.zero * float(reads.step.detach()), (reads.qmax - reads.zero) * float(reads.step.detach())
        reads.bits = reads.final_bits = bits
        with torch.no_grad():
            reads.set_range(low, high)
    return rounded
