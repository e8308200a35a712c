"""Is this network a classifier of these images? Asked before anything expensive starts."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from coldforge.errors import ModelError
from coldforge.models.normalize import Normalize

_PROBABILITIES = "the network returns probabilities; expected logits; remove the softmax"
_SIGMOIDS = (
    "the network returns probabilities, one for each class, as after a sigmoid; expected logits; remove the sigmoid"
)
_SURE = 0.9
"""Logits that all lie between 0 and 1 do not move so far, in three classes or all."""
_MOVES = 3.0
"""Probabilities move by more than so many times what rounding moves their sum."""


def check_classifier(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Run four random images through ``model`` in eval mode and look at the answer; the model is not changed.

    Args:
        model: from pixels in [0, 1] (N, C, H, W) to logits (N, K).
        image_shape: (C, H, W).
        num_classes: K.

    Raises:
        ModelError: for weights or logits that are NaN or infinite, images or classes that do not fit, an output that
            is no tensor, and probabilities in place of logits.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"expected finite weights, found NaN or infinity in {name!r}; its training went wrong")
    channels = image_shape[0]
    for name, layer in model.named_modules():
        if isinstance(layer, Normalize) and layer.mean.numel() != channels:
            raise ModelError(
                f"{name or 'normalization'}: expected mean and std of {channels} channels, as the images have, "
                f"got {layer.mean.numel()}"
            )
    logits = _answer(model, image_shape)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected logits as one tensor (N, {num_classes}), got {type(logits).__name__}; wrap the network"
        )
    if not logits.is_floating_point() or logits.ndim != 2 or len(logits) != 4:
        raise ModelError(
            f"expected logits as floating point (N, {num_classes}), "
            f"got {logits.dtype} {('N', *tuple(logits.shape)[1:])} for N = 4 images"
        )
    if logits.shape[1] != num_classes:
        raise ModelError(f"expected {num_classes} classes, as the data have, got logits for {logits.shape[1]}")
    if not bool(logits.isfinite().all()):
        raise ModelError("expected finite logits, got NaN or infinity for random images in [0, 1]")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones(4), atol=sum_tolerance(num_classes)):
        raise ModelError(_PROBABILITIES)


def refuse_probabilities(logits: Tensor) -> None:
    """Look at the answers ``(N, K)`` to real images, float, finite or not: after a softmax margins shrink and gradients
    vanish, so that attacks lose their way. Probabilities, scaled or of 8 bits, votes and one-hot answers are told by
    their sum, which stays where they move; those of a sigmoid by lying between 0 and 1 and coming near to both.

    Raises:
        ModelError: they are probabilities.
    """
    in_8_bits = _in_8_bits(logits)
    sums = (logits if in_8_bits else logits - logits.min()).sum(1)  # beside a large offset all sums are alike
    missed = sum_tolerance(logits.shape[1]) if in_8_bits else 1e-3
    off = float((sums - sums.mean()).abs().max())
    moves = float((logits - logits[0]).abs().max())  # a dead network's sum stays because nothing moves
    if bool((logits >= 0).all()) and off <= missed * float(sums.mean()) and moves > _MOVES * off:
        raise ModelError(_PROBABILITIES)
    sure = int((logits.amax(0) - logits.amin(0) > _SURE).sum())
    if bool(((logits >= 0) & (logits <= 1)).all()) and sure >= min(3, logits.shape[1]):
        raise ModelError(_SIGMOIDS)


def _in_8_bits(logits: Tensor) -> bool:
    """Whether all values ``(n, K)`` are multiples of one step, none of more than 256."""
    values = logits.unique()
    codes = values / values.diff().min() if len(values) > 1 else values
    return bool(((codes - codes.round()).abs() < 0.01).all()) and bool(codes.abs().max() <= 256)


def sum_tolerance(num_classes: int) -> float:
    """By how much the sum of an image's probabilities may miss 1 when each is rounded to 8 bits, as files are written
    by tools that quantize the softmax too; at most 5 %.
    """
    return min(num_classes, 25) / 510


def _answer(model: nn.Module, image_shape: tuple[int, int, int]) -> object:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    inputs = torch.rand(4, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            answer: object = model(inputs)
    except Exception as error:  # a network may raise anything
        raise ModelError(_explain(str(error) or type(error).__name__, image_shape)) from error
    finally:
        for module, training in modes:
            module.training = training
    return answer.cpu().float() if isinstance(answer, Tensor) and answer.is_floating_point() else answer


def _explain(message: str, image_shape: tuple[int, int, int]) -> str:
    channels, height, width = image_shape
    if found := re.search(r"expected input\[.*?\] to have (\d+) channels, but got (\d+) channels", message):
        where = "" if int(found[2]) == channels else f" ({message.splitlines()[0]})"
        return f"the network expects images with {found[1]} channels, got images with {channels}{where}"
    if found := re.search(r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", message):
        return (
            f"the network does not fit images of {height}x{width} pixels: a linear layer expects {found[2]} features, "
            f"got {found[1]}; build it for this image size"
        )
    return f"the network cannot take images of (C, H, W) = {image_shape}: {message.splitlines()[0]}"
