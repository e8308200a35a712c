"""The threat model: a norm ball around each image, inside the image box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coldforge.errors import AttackError
from coldforge.recipe import ThreatModelSpec

TOLERANCE = 1e-6
"""Room for float32 rounding when a finished perturbation is checked against the ball and the box."""
_LEVELS = 255
_SLACK = 1e-4
"""Steps of an 8-bit pixel that float32 may be away from a whole number of them; less than :data:`TOLERANCE`."""
_PARTS = 50


@dataclass(frozen=True)
class ThreatModel:
    """A ball of radius ``eps`` (pixel units) in ``norm``, cut with the box [0, 1] unless ``box`` is False.

    ``box=False`` is the literal protocol of the code of arXiv 2403.09441, whose adversarial images may leave the box.
    """

    norm: Literal["linf", "l2"]
    eps: float
    box: bool = True

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise AttackError(f'expected the norm "linf" or "l2", got "{self.norm}"')

    @classmethod
    def of(cls, spec: ThreatModelSpec) -> ThreatModel:
        """From a recipe's table."""
        return cls(spec.norm, spec.eps, box=not spec.literal)

    def size(self, perturbations: Tensor) -> Tensor:
        """Norm of each perturbation ``(N, ...)``, as ``(N,)``."""
        flat = perturbations.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        sizes: Tensor = torch.linalg.vector_norm(flat, 2.0, dim=1, dtype=torch.float64)  # many squares are summed
        return sizes.to(flat.dtype)

    def project(self, points: Tensor, clean: Tensor) -> Tensor:
        """The nearest allowed points: first onto the ball, then into the box (exact for linf; for l2 the second
        step only shrinks the perturbation, so the result stays allowed).
        """
        if self.norm == "linf":
            points = torch.minimum(torch.maximum(points, clean - self.eps), clean + self.eps)
        else:
            delta = points - clean
            norms = self.size(delta).clamp_min(1e-12).view(-1, *[1] * (delta.ndim - 1))
            points = clean + delta * (self.eps / norms).clamp_max(1.0)
        return points.clamp(0.0, 1.0) if self.box else points

    def rounded(self, points: Tensor, clean: Tensor) -> Tensor:
        """Points as an 8-bit image can hold them, multiples of 1/255 in [0, 1], inside the ball if the clean images are
        8-bit images: for linf the nearest ones there; for l2 the nearest ones to as much of the perturbation, in
        fiftieths, as stays inside.
        """
        centre = clean.double()
        if self.norm == "linf":
            lowest = ((centre - self.eps) * _LEVELS - _SLACK).ceil()
            highest = ((centre + self.eps) * _LEVELS + _SLACK).floor()
            return _pixels((points.double() * _LEVELS).round().clamp(lowest, highest)).to(points.dtype)
        found = _pixels((centre * _LEVELS).round())
        left = torch.ones(len(points), dtype=torch.bool)
        for part in range(_PARTS, 0, -1):
            tried = _pixels(((centre + (points.double() - centre) * (part / _PARTS)) * _LEVELS).round())
            fits = left & (self.size(tried - centre) <= self.eps + TOLERANCE / 2)
            found[fits] = tried[fits]
            left &= ~fits
        return found.to(points.dtype)

    def step(self, gradient: Tensor, length: float | Tensor) -> Tensor:
        """Steepest ascent of ``length`` (pixel units; one number, or one for each image as ``(N, 1, 1, 1)``) in this
        norm: a sign for linf, a unit vector for l2.
        """
        if self.norm == "linf":
            return gradient.sign() * length
        norms = self.size(gradient).clamp_min(1e-30).view(-1, *[1] * (gradient.ndim - 1))
        return gradient / norms * length

    def random_start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A point drawn uniformly from the ball around each of ``clean`` ``(N, C, H, W)``, then put into the box."""
        noise = torch.empty(clean.shape, dtype=clean.dtype)
        if self.norm == "linf":
            noise.uniform_(-self.eps, self.eps, generator=generator)
        else:
            noise.normal_(generator=generator)
            radius = torch.rand(len(clean), generator=generator) ** (1.0 / noise[0].numel())
            noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * (self.eps * radius).view(-1, 1, 1, 1)
        return self.project(clean + noise.to(clean.device), clean)

    def contains(self, points: Tensor, clean: Tensor) -> Tensor:
        """Which points are finite and inside ball and box, up to :data:`TOLERANCE` of the ball; ``(N,)`` bool.

        Computed in float64, apart from the code that made the points.
        """
        inside = self.size(points.double() - clean.double()) <= self.eps + TOLERANCE
        flat = points.flatten(1)
        inside &= flat.isfinite().all(1)
        if self.box:
            inside &= (flat >= 0).all(1) & (flat <= 1).all(1)
        return inside

    def verify(self, points: Tensor, clean: Tensor) -> None:
        """Check finished adversarial images.

        Raises:
            AttackError: one is not finite, outside the ball, or outside the box.
        """
        if not torch.isfinite(points).all():
            raise AttackError("expected finite adversarial images, found NaN or infinite pixels")
        largest = float(self.size(points.double() - clean.double()).max()) if len(points) else 0.0
        if largest > self.eps + TOLERANCE:
            raise AttackError(f"expected perturbations of at most {self.eps:g} ({self.norm}), found {largest:g}")
        if self.box and len(points) and (float(points.min()) < 0 or float(points.max()) > 1):
            raise AttackError(
                f"expected adversarial images inside [0, 1], found {float(points.min()):g} … {float(points.max()):g}"
            )


def _pixels(steps: Tensor) -> Tensor:
    return steps.clamp(0, _LEVELS) / _LEVELS
