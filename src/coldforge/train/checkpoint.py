"""Everything a killed training needs to continue to the same bits, in one pickle-free file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coldforge.records import CurvePoint
from coldforge.sealed import write_atomic
from coldforge.train.weights import copies

_NOW, _GOOD = "checkpoint.safetensors", "checkpoint-good.safetensors"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TrainState:
    """Where a training stands."""

    attempt: int = 0
    """How often it collapsed."""
    stronger: int = 0
    """How many of these were answered by a stronger inner attack."""
    slower: int = 0
    """How many were answered by an eps that rises more slowly."""
    step: int = 0
    epoch_loss: float = 0.0
    """Sum of the losses of the current epoch so far."""
    seconds: float = 0.0
    macs: float = 0.0
    """Spent so far, like the seconds: by epochs that were rolled back, too."""
    score: float = -1.0
    """Accuracy of ``best`` on the validation part."""
    chosen: str = ""
    """What ``best`` is, such as "epoch 3, averaged"."""
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    model: Tensors = field(default_factory=dict)
    momentum: Tensors = field(default_factory=dict)
    averaged: Tensors = field(default_factory=dict)
    """Averaged weights, if there are any."""
    best: Tensors = field(default_factory=dict)
    """Weights of the epoch that is kept so far."""
    steps: Tensors = field(default_factory=dict)
    """Quantizer steps as calibrated, around which the trained ones stay."""
    perturbations: Tensors = field(default_factory=dict)
    """Of the last epoch, for inner attacks that start there."""

    def holding(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        """The same state with the weights and momenta of now."""
        momenta = {
            str(index): optimizer.state[parameter]["momentum_buffer"]
            for index, parameter in enumerate(_parameters(optimizer))
            if "momentum_buffer" in optimizer.state[parameter]
        }
        return replace(self, model=dict(network.state_dict()), momentum=momenta)

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and momenta back."""
        network.load_state_dict(self.model)
        for index, parameter in enumerate(_parameters(optimizer)):
            if str(index) in self.momentum:
                buffer = torch.empty_like(parameter)  # keeps the memory format
                optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(self.momentum[str(index)])


_GROUPS = tuple(each.name for each in fields(TrainState) if each.type == "Tensors")
_NUMBERS = tuple(each.name for each in fields(TrainState) if each.name not in (*_GROUPS, "curve"))


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Shelf:
    """Where the states of one training are kept: the last one, and that of the last good epoch, to roll back to.

    Args:
        folder: files survive a kill; None: the good state is kept in memory, the last one nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._good: TrainState | None = None

    @property
    def lasts(self) -> bool:
        """Whether states survive a kill."""
        return self._folder is not None

    def put(self, state: TrainState) -> None:
        """Keep the state to continue from."""
        if self._folder is not None:
            save_state(self._folder / _NOW, state)

    def put_good(self, state: TrainState) -> None:
        """Keep the state to roll back to."""
        if self._folder is not None:
            save_state(self._folder / _GOOD, state)
        else:
            kept = {name: copies(getattr(state, name)) for name in _GROUPS}
            self._good = replace(state, **kept)  # type: ignore[arg-type]

    def last(self) -> TrainState | None:
        """The state to continue from; None where there is none, or it cannot be read."""
        return load_state(self._folder / _NOW) if self._folder is not None else None

    def good(self) -> TrainState | None:
        """The state of the last good epoch; None where there was none."""
        return load_state(self._folder / _GOOD) if self._folder is not None else self._good

    def clear(self) -> None:
        """Forget everything: who tries the training once more begins it."""
        self._good = None
        if self._folder is not None:
            for name in (_NOW, _GOOD):
                (self._folder / name).unlink(missing_ok=True)

    def before(self, collapsed: TrainState) -> TrainState:
        """Where to go on after a collapse: at the last good epoch, or at the start, where there is none, or where the
        training went on from there already and came no further: what ruined it was in it by then.
        """
        good = self.good()
        return TrainState() if good is None or collapsed.attempt > good.attempt else good


def save_state(path: Path, state: TrainState) -> None:
    """Write the state, whole or not at all."""
    tensors = {
        f"{group}.{name}": tensor.detach().contiguous()
        for group in _GROUPS
        for name, tensor in getattr(state, group).items()
    }
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    numbers["curve"] = [point.model_dump() for point in state.curve]
    write_atomic(path, save(tensors, metadata={"state": json.dumps(numbers)}))


def load_state(path: Path) -> TrainState | None:
    """The state in a file; None where there is none, or it cannot be read (training then starts anew)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        groups = {
            group: {
                name.removeprefix(f"{group}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{group}.")
            }
            for group in _GROUPS
        }
        curve = tuple(CurvePoint(**point) for point in numbers["curve"])
        plain = {name: numbers[name] for name in _NUMBERS}
        everything: dict[str, Any] = {**plain, "notes": tuple(plain["notes"]), "curve": curve, **groups}
        return TrainState(**everything)
    except (SafetensorError, KeyError, TypeError, ValueError):  # ValueError: JSON, and numbers of another version
        return None
