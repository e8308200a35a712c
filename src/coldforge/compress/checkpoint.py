"""A checkpoint is weights and a description, never code: ``model.safetensors`` and ``structure.json``.

The description replays what was done to the architecture: build it, remove the planned channels, insert the
quantizers, then fill in the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from coldforge.compress.prune import PruningPlan, replay
from coldforge.compress.quantize import insert_quantizers
from coldforge.errors import ModelError
from coldforge.models import ModelSource, model_source, normalized
from coldforge.recipe import QuantizeSpec
from coldforge.sealed import write_atomic
from coldforge.spec import Spec, added

WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"


class Structure(Spec):
    """What a checkpoint is made of."""

    format_version: Literal[1] = 1
    source: str
    """Architecture, as in ``[model] source``."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    mean: tuple[float, ...]
    """Normalization of inputs in [0, 1], per channel."""
    std: tuple[float, ...]
    """Normalization of inputs in [0, 1], per channel."""
    pruning: PruningPlan | None = None
    """Channels removed; None: dense."""
    quantization: QuantizeSpec | None = None
    """Quantizers inserted; None: floating point."""
    last_input_at_edge: bool = added(False)
    """What the last layer reads has ``quantization.edge_bits``, too; False in checkpoints from before that was so."""
    sums_at_edge: bool = added(False)
    """So has what only sums, concatenations and poolings read; False in checkpoints from before that was so."""
    sums_apart: bool = added(False)
    """So have sums of what a layer reads, too; False in checkpoints from before that was so."""
    odd_codes: bool = added(False)
    """Weights of 2 bits have the codes -3, -1, 1 and 3; False in checkpoints from before that was so, which are
    ternary whatever ``quantization`` says."""

    def rounded(self, spec: QuantizeSpec) -> Structure:
        """The description after :func:`coldforge.compress.quantize` with that spec."""
        if not spec.enabled:
            return self.model_copy(update={"quantization": None})
        at_edge = {"last_input_at_edge": True, "sums_at_edge": True, "sums_apart": True}
        return self.model_copy(update={"quantization": spec, **at_edge, "odd_codes": spec.has_odd_codes})


def build(structure: Structure, source: ModelSource | None = None, *, seed: int = 0) -> nn.Module:
    """The described network with fresh weights, in evaluation mode.

    Args:
        structure: description.
        source: the architecture, where it is a live object and no name can rebuild it.
        seed: seed of the initial weights.
    """
    if source is None:
        source = model_source(structure.source, image_shape=structure.image_shape, num_classes=len(structure.classes))
    network: nn.Module = normalized(source.build(seed), structure.mean, structure.std)
    if structure.pruning is not None:
        network = replay(network, structure.pruning, image_shape=structure.image_shape)
    if structure.quantization is not None:
        # the weights to come bring their own steps: no search for good ones
        network = insert_quantizers(
            network,
            structure.quantization.model_copy(update={"calibration": "minmax", "ternary": not structure.odd_codes}),
            last_input_at_edge=structure.last_input_at_edge,
            sums_at_edge=structure.sums_at_edge,
            sums_apart=structure.sums_apart,
        )
    return network.eval()


def save_network(folder: Path, network: nn.Module, structure: Structure) -> None:
    """Write ``model.safetensors`` and ``structure.json`` into ``folder``, which must exist."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(tensors))
    write_atomic(folder / STRUCTURE, structure.model_dump_json(indent=1) + "\n")


def load_network(folder: str | Path, source: ModelSource | None = None) -> tuple[nn.Module, Structure]:
    """Read what :func:`save_network` wrote; the network is in evaluation mode.

    Raises:
        ModelError: a file is missing or damaged, or does not fit the architecture.
    """
    folder = Path(folder)
    structure = read_structure(folder)
    try:
        tensors = load(_read(folder, WEIGHTS))
    except SafetensorError as error:
        raise ModelError(f"the checkpoint in {folder} is damaged: {str(error).splitlines()[0]}") from None
    network = build(structure, source)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"the checkpoint in {folder} does not fit {structure.source!r}: {error}") from None
    return network, structure


def read_structure(folder: str | Path) -> Structure:
    """The description in a checkpoint's folder.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        return Structure.model_validate_json(_read(Path(folder), STRUCTURE))
    except ValidationError as error:
        raise ModelError(f"the checkpoint in {folder} is damaged: {STRUCTURE}: {error.errors()[0]['msg']}") from None


def _read(folder: Path, name: str) -> bytes:
    if not (folder / name).is_file():
        raise ModelError(f"expected a coldforge checkpoint in {folder}, found no {name}")
    return (folder / name).read_bytes()
