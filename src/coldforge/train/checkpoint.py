"""Everything a killed training needs to continue to the same bits, in one pickle-free file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coldforge.records import CurvePoint
from coldforge.store import write_atomic

_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainState:
    """Where a training stands."""

    attempt: int = 0
    """How often it collapsed."""
    stronger: int = 0
    """How many of these were answered by a stronger inner attack; the others by a lower learning rate."""
    step: int = 0
    epoch_loss: float = 0.0
    """Sum of the losses of the current epoch so far."""
    seconds: float = 0.0
    macs: float = 0.0
    """Spent so far, like the seconds: by attempts that collapsed, too."""
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    model: dict[str, Tensor] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)

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


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_state(folder: Path, state: TrainState) -> None:
    """Write the state into ``folder``, whole or not at all."""
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in state.model.items()}
    tensors |= {f"momentum.{name}": tensor.contiguous() for name, tensor in state.momentum.items()}
    numbers = {
        "attempt": state.attempt,
        "stronger": state.stronger,
        "step": state.step,
        "epoch_loss": state.epoch_loss,
        "seconds": state.seconds,
        "macs": state.macs,
        "curve": [point.model_dump() for point in state.curve],
        "notes": state.notes,
    }
    write_atomic(folder / _FILE, save(tensors, metadata={"state": json.dumps(numbers)}))


def load_state(folder: Path) -> TrainState | None:
    """The state in ``folder``; None where there is none, or it cannot be read (training then starts anew)."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        return TrainState(
            attempt=numbers["attempt"],
            stronger=numbers["stronger"],
            step=numbers["step"],
            epoch_loss=numbers["epoch_loss"],
            seconds=numbers["seconds"],
            macs=numbers["macs"],
            curve=tuple(CurvePoint(**point) for point in numbers["curve"]),
            notes=tuple(numbers["notes"]),
            model=part("model."),
            momentum=part("momentum."),
        )
    except (SafetensorError, KeyError, TypeError, ValueError):  # ValueError: JSON, and numbers of another version
        return None
