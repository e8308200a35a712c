"""Square attack: random search with square patches; asks only for logits.

Andriushchenko, Croce, Flammarion and Hein, *Square Attack: a query-efficient black-box adversarial attack via random
search*, ECCV 2020 (arXiv 1912.00049), algorithms 1 to 3. Deviations: each image draws its own windows (the published
code draws one for the whole batch), the last row and column can be drawn (there they cannot), images may be oblong.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
from torch import Tensor

from coldforge.attacks.base import Attack, Slots
from coldforge.attacks.query import margins
from coldforge.attacks.randomness import signs, uniforms
from coldforge.attacks.threat import ThreatModel

STANDARD_QUERIES = 5000
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these steps the part of the image that a square covers is halved (section 4 of the paper)."""
_START = -1
"""Counter of the draws of the first point; steps count from 0."""


class Square(Attack):
    """``steps`` random squares, each kept where it lowers the margin (published name: n_queries)."""

    uses_gradients: ClassVar[bool] = False

    steps: int = STANDARD_QUERIES
    p_init: float = 0.8
    """Part of the image that the first squares cover."""

    @property
    def name(self) -> str:
        """Such as "square" or "square-500"."""
        return "square" if self.steps == STANDARD_QUERIES else f"square-{self.steps}"

    def sides(self, height: int, width: int, *, least: int = 1) -> Tensor:
        """Side of the square at each step, in pixels, int64 ``(steps,)``."""
        return _sides(self.steps, self.p_init, height, width, least).clone()

    def start(self, slots: Slots, rows: list[int], threat_model: ThreatModel) -> Tensor:
        """linf: vertical stripes of +-eps; l2: a grid of patches."""
        clean, keys = slots.clean[rows], slots.key[rows]
        count, channels, height, width = clean.shape
        counter = torch.full((count,), _START)
        if threat_model.norm == "linf":
            stripes = signs(uniforms(keys, counter, channels * width)).view(count, channels, 1, width)
            return threat_model.project(clean + threat_model.eps * stripes, clean)
        side = max(min(height, width) // 5, 1)
        down, right = height // side, width // side
        draws = uniforms(keys, counter, down * right * (channels + 1)).view(count, down, right, channels + 1)
        delta = torch.zeros_like(clean)
        top, left = (height - down * side) // 2, (width - right * side) // 2
        for i in range(down):
            for j in range(right):
                patch = _patch(side, draws[:, i, j, 0]) * signs(draws[:, i, j, 1:])[:, :, None, None]
                delta[:, :, top + i * side :, left + j * side :][:, :, :side, :side] = patch
        return _scaled(clean, delta, threat_model)

    def advance(self, slots: Slots, threat_model: ThreatModel) -> Tensor:
        """Keep the last square where it helped, draw the next."""
        memory = slots.memory
        height, width = slots.points.shape[2:]
        if not memory:
            memory["best"] = torch.zeros(len(slots.labels))
            memory["best_points"] = torch.zeros_like(slots.points)
        margin = margins(slots.logits, slots.labels)
        better = ((slots.step == 0) | (margin < memory["best"])).nonzero()[:, 0]
        memory["best"][better] = margin[better]
        memory["best_points"][better] = slots.points[better]
        sides = _sides(self.steps, self.p_init, height, width, 1 if threat_model.norm == "linf" else 3)
        side = sides[slots.step.clamp(0, self.steps - 1)]
        if threat_model.norm == "linf":
            return self._square(slots, side, threat_model)
        moved = memory["best_points"].clone()
        for length in side.unique().tolist():
            rows = (side == length).nonzero()[:, 0]
            moved[rows] = self._exchange(slots, rows, length, threat_model)
        return moved

    def _square(self, slots: Slots, side: Tensor, threat_model: ThreatModel) -> Tensor:
        """linf: inside one window each channel is put to +eps or -eps."""
        best = slots.memory["best_points"]
        channels, height, width = best.shape[1:]
        draws = uniforms(slots.key, slots.step, 2 + channels)
        rows = _inside(height, _corner(draws[:, 0], height, side), side)
        columns = _inside(width, _corner(draws[:, 1], width, side), side)
        window = (rows[:, :, None] & columns[:, None, :])[:, None]
        sign = signs(draws[:, 2:])[:, :, None, None]
        return torch.where(window, slots.clean + threat_model.eps * sign, best)

    def _exchange(self, slots: Slots, rows: Tensor, side: int, threat_model: ThreatModel) -> Tensor:
        """l2: one window gives up its share of the norm, another gets it as a patch."""
        clean = slots.clean[rows]
        delta = slots.memory["best_points"][rows] - clean
        count, channels, height, width = clean.shape
        side += side % 2 == 0 and side < min(height, width)
        lengths = torch.full((count,), side)
        draws = uniforms(slots.key[rows], slots.step[rows], 5 + channels)
        here, there = (
            _inside(height, _corner(draws[:, i], height, lengths), lengths)[:, None, :, None]
            & _inside(width, _corner(draws[:, i + 1], width, lengths), lengths)[:, None, None, :]
            for i in (0, 2)
        )
        budget = (threat_model.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / channels
        shared = (delta * (here | there)).square().sum((2, 3), keepdim=True)
        old = (delta * here)[here.expand_as(delta)].view(count, channels, side, side)
        old = old / (old.square().sum((2, 3), keepdim=True).sqrt() + 1e-12)
        new = _patch(side, draws[:, 4]) * signs(draws[:, 5:])[:, :, None, None] + old
        new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + 1e-12) * (budget + shared).sqrt()
        delta = delta.masked_fill(there, 0.0)
        delta = delta.masked_scatter(here.expand_as(delta), new)
        return _scaled(clean, delta, threat_model)


@functools.cache
def _sides(steps: int, p_init: float, height: int, width: int, least: int) -> Tensor:
    sides, halvings = [], 0
    for step in range(steps):
        while halvings < len(_HALVINGS) and step > _HALVINGS[halvings]:
            halvings += 1
        side = max(round(math.sqrt(p_init / 2**halvings * height * width)), least)
        sides.append(min(side, height, width))
    return torch.tensor(sides)


def _corner(uniform: Tensor, length: int, side: Tensor) -> Tensor:
    """First row (or column) of a window that lies inside, every place with the same chance."""
    return (uniform * (length - side + 1)).long()


def _inside(length: int, first: Tensor, side: Tensor) -> Tensor:
    """Which of ``length`` rows a window covers, ``(N, length)``."""
    place = torch.arange(length)
    return (place >= first[:, None]) & (place < (first + side)[:, None])


def _scaled(clean: Tensor, delta: Tensor, threat_model: ThreatModel) -> Tensor:
    """A perturbation of norm eps in this direction, cut by the box."""
    norms = threat_model.size(delta).clamp_min(1e-12).view(-1, 1, 1, 1)
    return threat_model.project(clean + delta / norms * threat_model.eps, clean)


def _bump(rows: int, columns: int) -> Tensor:
    """A pyramid of nested rectangles of unit norm, ``(rows, columns)`` (equation 2 of the paper)."""
    bump = torch.zeros(rows, columns)
    top, left = rows // 2, columns // 2
    for ring in range(max(rows, columns) // 2 + 1):
        bump[max(top, 0) : top + 2 * ring + 1, max(left, 0) : left + 2 * ring + 1] += 1.0 / (ring + 1) ** 2
        top, left = top - 1, left - 1
    return bump / bump.square().sum().sqrt()


def _patch(side: int, turned: Tensor) -> Tensor:
    """Two pyramids of opposite signs side by side, unit norm, on its side where ``turned`` > 1/2; ``(N, 1, s, s)``."""
    patch = torch.zeros(side, side)
    if side > 1:
        patch[: side // 2] = _bump(side // 2, side)
        patch[side // 2 :] = -_bump(side - side // 2, side)
        patch = patch / patch.square().sum().sqrt()
    else:
        patch = torch.ones(1, 1)
    return torch.where((turned > 0.5)[:, None, None, None], patch.t(), patch)
