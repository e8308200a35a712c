"""Asking a network: logits, and gradients with respect to pixels; nothing about it is changed by the asking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from coldforge.errors import AttackError

TILE = 64
"""Images in one forward pass, as a rule (:mod:`coldforge.attacks.tiles`): kernels may round differently for others."""

Classifier = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, differentiable."""

Judge = Callable[[Tensor], Tensor]
"""Images to labels ``(N,)``: who has the last word, such as a deployed file, or the network in full precision."""


@contextmanager
def untouched(model: Classifier) -> Iterator[None]:
    """Inside, a network is in evaluation mode, its parameters need no gradient, and its quantizers' ranges stand still;
    after, every flag is as before.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [(module, module.training) for module in modules]
    needed = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    observers = [module._buffers["observer_enabled"] for module in modules if "observer_enabled" in module._buffers]
    observing = [(flag, flag.clone()) for flag in observers if flag is not None]  # of torch.ao: ranges that move
    try:
        for module, was in training:  # setting what is set already takes longer than looking
            if was:
                module.training = False
        for parameter, was in needed:
            if was:
                parameter.requires_grad_(False)
        for observer, _ in observing:
            observer.zero_()
        yield
    finally:
        for module, was in training:
            if module.training != was:
                module.training = was
        for parameter, was in needed:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)
        for observer, on in observing:
            observer.copy_(on)


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise an :class:`AttackError` unless these are images in [0, 1] with one label each."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise AttackError(f"expected float32 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise AttackError(f"expected {len(images)} int64 labels, got {labels.dtype} {tuple(labels.shape)}")
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise AttackError(
            f"expected images inside [0, 1], found {float(images.min()):g} … {float(images.max()):g}; "
            "attacks work in pixel space: make the normalization a layer of the model"
        )


def predict(model: Classifier, images: Tensor, *, tile: int = TILE) -> Tensor:
    """Logits ``(N, K)`` of ``images``, without gradients; always ``tile`` images at a time, the last ones filled up."""
    outputs = []
    with untouched(model), torch.no_grad():
        for part in images.split(tile) if len(images) else ():
            missing = tile - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            outputs.append(model(filled)[: len(part)].float())
    return torch.cat(outputs) if outputs else torch.empty(0, 0)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class minus the largest other, ``(N,)``; negative where misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)


def loss_direction(logits: Tensor, labels: Tensor, loss: Literal["ce", "margin"]) -> Tensor:
    """Gradient of each image's loss by its logits, scaled so that its largest entry is 1; ``(N, K)``.

    Steps use only the direction of the input gradient, so each image's loss may be scaled at will. The gradient of
    cross-entropy is the softmax minus the one-hot label; divided by one minus the probability of the true class it is
    the softmax of the *other* classes, and -1 at the true one. In this form it cannot underflow, whereas the usual one
    is 4e-18 at a logit gap of 40 and exactly 0 at one of 120: a common cause of overrated robustness.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    if loss == "ce":
        direction = torch.softmax(others.float(), 1)
    else:
        direction = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, others.argmax(1, keepdim=True), 1.0)
    return direction.scatter_(1, labels[:, None], -1.0).to(logits.dtype)


def query(
    model: Classifier, points: Tensor, direction: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """One forward pass, and one backward pass to the pixels where a direction is given.

    Args:
        model: the classifier.
        points: ``(N, C, H, W)``.
        direction: logits ``(N, K)`` to the gradient of the loss by them, of the same shape; None: only logits.

    Returns:
        Logits ``(N, K)`` in float32, and the gradient of the loss ``(N, C, H, W)`` or None.

    Raises:
        AttackError: a direction is given, and autograd knows no way from the logits to the pixels.
    """
    if direction is None:
        with torch.no_grad():
            return model(points).float(), None
    with torch.enable_grad():
        inputs = points.detach().requires_grad_()
        logits = model(inputs)
        gradient = None
        if logits.requires_grad:  # by the pixels, or only by something else
            (gradient,) = torch.autograd.grad(logits, inputs, direction(logits.detach()), allow_unused=True)
        if gradient is None:
            raise AttackError(
                "expected logits that depend on the pixels by differentiable operations, found none; take an attack "
                "that only asks for answers, such as square"
            )
    return logits.detach().float(), gradient
