"""Structured pruning: remove whole channels, so that the network that is left is small without masks.

Every layer but the output loses the same part of its channels (uniform pruning), those with the least importance first
(:mod:`coldforge.compress.importance`; L1 in arXiv 2403.09441), or those go that matter least wherever they are (global
pruning, with a floor for each layer). Layers that must keep the same channels, such as those joined by a residual
connection, are ranked together: the score of a channel is the sum over all of them. Which layers these are is found by
torch-pruning (DepGraph, https://arxiv.org/abs/2301.12900). Where we differ from it: it rounds widths down, to 0 if need
be, we round to the nearest multiple and keep a minimum width; and its pruned networks are pickles, ours are a plan in
plain JSON.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coldforge.compress.dependency import (
    check_function,
    dependency_graph,
    is_filter_layer,
    output_layers,
    probe_images,
    traceable,
)
from coldforge.compress.importance import Importance, by_weights, norm
from coldforge.errors import ModelError, nearest
from coldforge.models.zoo import OptionAShortcut
from coldforge.recipe import PruneSpec
from coldforge.spec import Spec


class PruningPlan(Spec):
    """What was removed, in plain JSON; :func:`replay` does it again."""

    steps: tuple[tuple[str, bool, tuple[int, ...]], ...] = ()
    """In order: layer name, True for its output channels (always), and the channels removed, counted before pruning.
    Layers that depend on it lose theirs with it."""
    requested: float = Field(default=0.0, ge=0, lt=1)
    """Part of the channels that the recipe asked to remove."""
    achieved: float = Field(default=0.0, ge=0, lt=1)
    """Part that was removed, of the output channels of all layers but the output and parameter-free shortcuts."""
    widths: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Layer name to output channels before and after, of the same layers."""


def target_width(width: int, ratio: float, *, round_to: int = 8, min_width: int = 8, blocks: int = 1) -> int:
    """Channels to keep: the multiple of ``round_to`` nearest to ``width * (1 - ratio)``, halves rounded up.

    Never below ``min_width`` (raised to a multiple), never above ``width``: a layer narrower than that stays whole.

    Args:
        width: channels before.
        ratio: part to remove, 0 <= ratio <= 1.
        round_to: the result is a multiple of it, or ``width``.
        min_width: least width.
        blocks: groups of a grouped convolution, which all must keep as many; the result is also a multiple of it.

    >>> target_width(64, 0.5), target_width(20, 0.5), target_width(16, 0.9), target_width(6, 0.5)
    (32, 16, 8, 6)
    """
    if ratio == 0:
        return width
    step = math.lcm(round_to, blocks)
    wanted = round(width * (1 - ratio), 6)  # 0.3 * 40 is not quite 12 in binary
    kept = max(math.floor(wanted / step + 0.5), math.ceil(min_width / step), 1) * step
    return min(width, kept)


def prune(
    model: nn.Module,
    spec: PruneSpec,
    *,
    image_shape: Sequence[int],
    seed: int = 0,
    importance: Importance | None = None,
    only: Sequence[str] = (),
) -> tuple[nn.Module, PruningPlan]:
    """Remove channels from a copy of ``model``.

    Works for chains, residual connections, concatenation, grouped and depthwise convolutions, BatchNorm and flattening
    before a linear layer. The result is checked: it computes what ``model`` computes once the removed channels are
    multiplied by zero. Channels that cannot be removed without breaking a group structure are kept.

    Args:
        model: takes images in [0, 1] and returns logits; left untouched.
        spec: how much, and how channels are ranked.
        image_shape: of one image. # (C, H, W)
        seed: of the random ranking (``importance = "random"``).
        importance: ranks channels in place of ``spec.importance``; scores of layers that hang together are added.
        only: names of layers; where given, only they and the layers tied to them lose channels.

    Returns:
        The pruned copy, and the plan. Ratio 0 gives an unchanged copy and an empty plan.

    Raises:
        TraceError: names the layer at which the channels cannot be followed.
        ModelError: nothing can be pruned, or weights are not finite.
    """
    pruned = copy.deepcopy(model)
    if spec.ratio == 0:
        return pruned, PruningPlan()
    dense = copy.deepcopy(model)
    images = probe_images(pruned, image_shape)
    scores = importance or by_weights(model, spec.importance, seed)
    with traceable(pruned):
        graph = dependency_graph(pruned, images)
        kept_whole = output_layers(graph)
        names = {module: name for name, module in pruned.named_modules()}
        layers = {
            name: int(graph.get_out_channels(layer))
            for layer, name in names.items()
            if is_filter_layer(layer)
            and layer in graph.module2node
            and layer not in kept_whole
            and not isinstance(layer, OptionAShortcut)
        }
        groups = [group for group in graph.get_all_groups() if not _holds(graph, group, kept_whole)]
        groups = [group for group in groups if not only or _names_in(graph, group, names) & set(only)]
        if not groups:
            raise ModelError(
                "expected a network with channels that can be pruned, found none besides the output; "
                "set prune.ratio = 0"
            )
        steps: list[tuple[str, bool, tuple[int, ...]]] = []
        removed_in: dict[str, set[int]] = defaultdict(set)
        removed_out: dict[str, set[int]] = defaultdict(set)
        ranked = [_ranked_parts(graph, group, dense, names, scores) for group in groups]
        surplus = iter(_surplus([part for parts in ranked for part in parts], spec))
        for group, parts in zip(groups, ranked, strict=True):
            indices = sorted(index for part in parts for index in part.worst(next(surplus)))
            if not indices:
                continue
            root, function = group[0].dep.target.module, group[0].dep.handler
            items = list(graph.get_pruning_group(root, function, indices))
            if set(items[0].idxs) != set(indices):
                continue  # channels of one layer are tied to each other, as by cat([x, x]): more would go than asked
            steps.append((names[root], True, tuple(indices)))
            for item in items:
                layer = item.dep.target.module
                if is_filter_layer(layer):
                    out = graph.is_out_channel_pruning_fn(item.dep.handler)
                    (removed_out if out else removed_in)[names[layer]].update(item.idxs)
        _execute(graph, pruned, steps)
    widths = {name: (before, _width(pruned.get_submodule(name))) for name, before in layers.items()}
    total = sum(before for before, _ in widths.values())
    plan = PruningPlan(
        steps=tuple(steps),
        requested=spec.ratio,
        achieved=(total - sum(after for _, after in widths.values())) / max(total, 1),
        widths=widths,
    )
    with traceable(pruned), traceable(dense):
        check_function(
            dense,
            pruned,
            images,
            {name: sorted(indices) for name, indices in removed_in.items()},
            {name: sorted(indices) for name, indices in removed_out.items()},
        )
    return pruned, plan


def joined(first: PruningPlan, second: PruningPlan, requested: float) -> PruningPlan:
    """One plan for two prunings, one after the other."""
    widths = {name: (before, second.widths.get(name, (0, after))[1]) for name, (before, after) in first.widths.items()}
    total = sum(before for before, _ in widths.values())
    achieved = (total - sum(after for _, after in widths.values())) / max(total, 1)
    return PruningPlan(steps=first.steps + second.steps, requested=requested, achieved=achieved, widths=widths)


def replay(model: nn.Module, plan: PruningPlan, *, image_shape: Sequence[int]) -> nn.Module:
    """Prune a copy of ``model`` as ``plan`` says; the same weights in give the same weights out.

    Args:
        model: the dense network, of the architecture that the plan was made for; left untouched.
        plan: from :func:`prune`, or read with ``PruningPlan.model_validate_json``.
        image_shape: of one image. # (C, H, W)

    Raises:
        ModelError: the plan belongs to another network; names the layer.
        TraceError: names the layer at which the channels cannot be followed.
    """
    pruned = copy.deepcopy(model)
    modules = dict(pruned.named_modules())
    for name, (before, _) in plan.widths.items():
        layer = modules.get(name)
        if layer is None:
            raise ModelError(
                f"the pruning plan belongs to another network: expected a layer {name!r}, found none; "
                f"{nearest(name, [name for name, module in modules.items() if is_filter_layer(module)])}"
            )
        if not is_filter_layer(layer) or _width(layer) != before:
            got = f"{_width(layer)} channels" if is_filter_layer(layer) else type(layer).__name__
            raise ModelError(
                f"the pruning plan belongs to another network: expected layer {name!r} with {before} channels, "
                f"got {got}"
            )
    if not plan.steps:
        return pruned
    with traceable(pruned):
        _execute(dependency_graph(pruned, probe_images(pruned, image_shape)), pruned, plan.steps)
    for name, (_, after) in plan.widths.items():
        if _width(modules[name]) != after:
            raise ModelError(
                f"the pruning plan belongs to another network: expected layer {name!r} to end with {after} channels, "
                f"got {_width(modules[name])}"
            )
    return pruned


# --- the parts -------------------------------------------------------------------------------------------------------


def _width(layer: nn.Module) -> int:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(width, int)
    return width


def _holds(graph: Any, group: Any, layers: set[nn.Module]) -> bool:
    """True where the group would remove output channels of one of ``layers``, or of a layer that we do not prune."""
    return any(
        graph.is_out_channel_pruning_fn(item.dep.handler)
        and (item.dep.target.module in layers or isinstance(item.dep.target.module, nn.LSTM | nn.MultiheadAttention))
        for item in group
    )


def _names_in(graph: Any, group: Any, names: dict[nn.Module, str]) -> set[str]:
    """Layers whose output channels the group removes."""
    layers = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
    return {names[layer] for layer in layers if is_filter_layer(layer)}


def _blocks(graph: Any, group: Any) -> int | None:
    """How many equal blocks the channels of a group form; None where they cannot be removed evenly.

    Grouped convolutions and GroupNorm need as many channels in each of their groups. torch-pruning keeps the same
    positions in each, which is right only where the channels of that layer are those of the root, in the same order.
    """
    blocks, width = 1, len(group[0].idxs)
    for item in group:
        layer = item.dep.target.module
        if isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels:
            continue  # depthwise: channels are independent
        if is_filter_layer(layer):
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            if max(item.idxs) >= (graph.get_out_channels if out else graph.get_in_channels)(layer):
                return None  # broadcast over channels
        groups = getattr(layer, "num_groups" if isinstance(layer, nn.GroupNorm) else "groups", 1)
        if groups > 1:
            if isinstance(layer, _ConvNd) and groups in (layer.in_channels, layer.out_channels):
                return None  # one channel in each group on one side: nothing to take from
            if list(item.idxs) != list(item.root_idxs) or len(item.idxs) != width:
                return None
            blocks = math.lcm(blocks, groups)
    return blocks if width % blocks == 0 else None


def _parts(group: Any, width: int) -> list[list[int]]:
    """The root's channels, split by the layers that touch them: one part, unless there is a concatenation or a split.

    Each part loses the same share, so that every layer does, and that ``chunk`` still cuts where it did.
    """
    touched: list[list[int]] = [[] for _ in range(width)]
    for number, item in enumerate(group):
        if is_filter_layer(item.dep.target.module):
            for index in set(item.root_idxs):
                touched[index].append(number)
    parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, numbers in enumerate(touched):
        parts[tuple(numbers)].append(index)
    return list(parts.values())


_SIZE = norm(1)
"""How channels are ranked about which nothing else is known."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Channels of one group's root that are ranked among each other."""

    rows: Tensor  # (blocks, n): channels of the root; the blocks of a grouped convolution lose the same columns
    scores: Tensor  # (n,), high to keep
    layers: int  # that lose channels with them

    @property
    def width(self) -> int:
        return self.rows.numel()

    def kept(self, ratio: float, spec: PruneSpec, *, floor: float = 0.0) -> int:
        """Channels that stay at a ratio of its own, and at least the part ``floor`` of them."""
        least = max(spec.min_width, math.ceil(round(self.width * floor, 6)))
        return target_width(self.width, ratio, round_to=spec.round_to, min_width=least, blocks=len(self.rows))

    def worst(self, surplus: int) -> list[int]:
        """The ``surplus`` channels with the least scores."""
        columns = torch.argsort(self.scores, stable=True)[: surplus // len(self.rows)]
        return self.rows[:, columns].flatten().tolist()


def _ranked_parts(
    graph: Any, group: Any, dense: nn.Module, names: dict[nn.Module, str], scores: Importance
) -> list[_Part]:
    """The parts of a group, ranked; none where it must stay whole."""
    width, blocks = len(group[0].idxs), _blocks(graph, group)
    if blocks is None:
        return []
    total, layers, sizes = torch.zeros(width, dtype=torch.float64), 0, torch.zeros(width, dtype=torch.float64)
    for item in group:
        layer = item.dep.target.module
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if not out or not is_filter_layer(layer) or isinstance(layer, OptionAShortcut):
            continue
        score = scores(dense, names[layer]).detach().cpu().double()
        if score.shape != (_width(layer),):
            raise ModelError(
                f"importance of layer {names[layer]!r}: expected shape ({_width(layer)},), got {tuple(score.shape)}"
            )
        if not bool(score.isfinite().all()):
            raise ModelError(
                f"layer {names[layer]!r}: expected finite weights, got NaN or infinity; load other weights"
            )
        for values, of in ((total, score), (sizes, _SIZE(dense, names[layer]))):
            values.index_add_(0, torch.tensor(item.root_idxs), of[torch.tensor(item.idxs)])
        layers += 1
    if not bool(total.any()):  # no BatchNorm behind any of them, or no gradient: nothing tells them apart
        total = sizes
    # The blocks of a grouped convolution all lose the same positions, so they are one part.
    parts = _parts(group, width) if blocks == 1 else [list(range(width))]
    rows = [torch.tensor(part).view(blocks, -1) for part in parts]
    return [_Part(row, total[row].mean(0), layers) for row in rows]


def _surplus(parts: Sequence[_Part], spec: PruneSpec) -> list[int]:
    """How many channels each part loses: all the same share, or those that matter least wherever they are."""
    if spec.scope == "uniform":
        return [part.width - part.kept(spec.ratio, spec) for part in parts]
    # scores of different layers are compared in units of the layer's mean (as torch-pruning's "mean" normalizer)
    relative = [part.scores / part.scores.mean().clamp_min(1e-300) for part in parts]
    wanted = spec.ratio * sum(part.width * part.layers for part in parts)

    def lost(threshold: float) -> list[int]:
        ratios = [float((score < threshold).double().mean()) for score in relative]
        return [part.width - part.kept(r, spec, floor=spec.floor) for part, r in zip(parts, ratios, strict=True)]

    def excess(threshold: float) -> float:
        removed = sum(count * part.layers for count, part in zip(lost(threshold), parts, strict=True))
        return abs(removed - wanted)

    thresholds = torch.cat(relative).unique().tolist()
    return lost(min([*thresholds, torch.inf], key=excess))


def _execute(graph: Any, model: nn.Module, steps: Sequence[tuple[str, bool, tuple[int, ...]]]) -> None:
    """Remove the channels of each step from ``model``, in place."""
    for name, out, indices in steps:
        try:
            layer = model.get_submodule(name)
            pruner = graph.get_pruner_of_module(layer)
            function = pruner.prune_out_channels if out else pruner.prune_in_channels
            if not set(indices) < set(range(_width(layer))):
                raise ValueError(f"expected channels below {_width(layer)}, not all of them, got {list(indices)}")
            graph.get_pruning_group(layer, function, list(indices)).prune(record_history=False)
        except Exception as error:
            raise ModelError(
                f"layer {name!r}: its channels could not be removed: {error}. Weights under a parametrization "
                "(weight_norm, spectral_norm) must be made plain first"
            ) from error
