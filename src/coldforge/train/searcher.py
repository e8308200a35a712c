"""Where inner attacks search while a network is trained: on a fast copy that follows it, if it has BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coldforge.attacks import predict
from coldforge.compress import QuantizedLayer, batchnorm_behind, scale_and_shift
from coldforge.data import ImageSet
from coldforge.errors import TraceError
from coldforge.evaluate import fast_copy

_FEW = 64
_MOST_ERROR = 0.05
"""Of the copy's logits, relative to how far the network's lie apart; more, and it is no copy."""


class Searcher:
    """Keeps a copy of a network in training with BatchNorm folded, ReLU as part of the convolution before it, and in
    bfloat16 where the training is.

    An inner attack needs neither gradients of weights nor statistics of its batch, so BatchNorm, which takes as long as
    a narrow convolution, can be part of the layer before it: anew for every batch. A network without BatchNorm, one
    that is rounded, and one that cannot be traced or does not answer like its copy, is searched on itself.

    Args:
        network: what is trained, in place.
        precision: ``"bf16"`` or ``"fp32"``, as in :func:`coldforge.train.train`.
        images: some, to see that the copy answers like the network; None: there is no inner attack.
    """

    def __init__(self, network: nn.Module, precision: str, images: ImageSet | None) -> None:
        self._network = network
        self._copy: nn.Module | None = None
        kinds = {type(module) for module in network.modules()}
        if images is None or QuantizedLayer in kinds or not any(issubclass(kind, _BatchNorm) for kind in kinds):
            return
        try:
            behind = batchnorm_behind(network)
        except TraceError:
            return
        if not behind:
            return
        self._copy = fast_copy(network, "bf16" if precision == "bf16" else "fp32")
        inner = self._copy.get_submodule("network") if precision == "bf16" else self._copy
        mine, theirs = dict(inner.named_modules()), dict(network.named_modules())
        folded = {layer: norm for layer, norm in behind.items() if norm not in mine}
        self._folded = [(theirs[layer], theirs[norm], mine[layer]) for layer, norm in folded.items()]
        self._plain = [
            (tensor, _tensors(theirs[name])[key])
            for name, module in mine.items()
            if name not in folded and name in theirs
            for key, tensor in _tensors(module).items()
        ]
        if not self._is_like(images.pixels(slice(0, _FEW))):
            self._copy = None

    @torch.no_grad()
    def now(self) -> nn.Module:
        """The network to search on, as it is now."""
        if self._copy is None:
            return self._network
        for layer, norm, mine in self._folded:
            scale, shift = scale_and_shift(norm)
            torch.mul(layer.weight, scale.view(-1, *[1] * (layer.weight.ndim - 1)), out=mine.weight)
            mine.bias.copy_(shift if layer.bias is None else shift + layer.bias * scale)
        for tensor, its in self._plain:
            tensor.copy_(its)
        return self._copy

    def _is_like(self, images: Tensor) -> bool:
        expected, found = predict(self._network, images), predict(self.now(), images)
        spread = (expected - expected.mean(1, keepdim=True)).square().mean()
        return bool((expected - found).square().mean() <= _MOST_ERROR**2 * spread)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
