"""Weights from files that other people wrote, without running any code that hides in them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coldforge.errors import ModelError
from coldforge.models.zoo import OptionAShortcut

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".tar", ".bin")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the weights."""
RAW_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files of Python's own pickle begin (torch writes protocol 2)."""


def load_weights(network: nn.Module, path: str | Path, *, key_prefix: str = "") -> None:
    """Load a checkpoint into a network that was just built; nothing is loaded where anything is wrong.

    The fixed weights of :class:`~coldforge.models.zoo.OptionAShortcut` and BatchNorm's batch counters (which change no
    output) may be missing; every other key must fit.

    Args:
        network: changed in place.
        path: ``.safetensors``, or another of :data:`SUFFIXES` (a bare state dict or one under :data:`CONTAINERS`),
            read with ``weights_only=True``. Environment variables and ``~`` are expanded.
        key_prefix: removed from the keys that have it, such as "module."; keys that do not have it are left out where
            those that do are the whole network.

    Raises:
        ModelError: for a file that is missing, damaged or would execute code; keys that are missing or unexpected;
            shapes that do not fit; weights that are NaN or infinite.
    """
    file = checkpoint_file(path)
    expected, optional = network.state_dict(), _optional_keys(network)
    state = _strip(_read(file), key_prefix, file, expected.keys() - optional)
    _check_keys(state, expected, optional, file, key_prefix)
    _check_shapes(state, expected, file)
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{file}: expected finite weights, found NaN or infinity in {key!r}; train it again")
    network.load_state_dict(state, strict=False)


def checkpoint_file(path: str | Path) -> Path:
    """The file; environment variables and ``~`` are expanded.

    Raises:
        ModelError: there is none, or it has another ending.
    """
    file = Path(os.path.expandvars(str(path))).expanduser()
    if not file.is_file():
        unset = "; an environment variable in it is not set" if "$" in str(file) else ""
        raise ModelError(f"expected a checkpoint at {file}, found nothing{unset}")
    if file.suffix not in SUFFIXES:
        raise ModelError(f"{file}: expected a checkpoint that ends in {', '.join(SUFFIXES)}, got {file.suffix!r}")
    return file


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise ModelError(f"{file}: the checkpoint cannot be read: {error.strerror}") from None
    try:
        if file.suffix == ".safetensors":
            return _state(load_file(file), file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols: what matters ends in an error below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None and start not in RAW_PICKLES:
            raise _damaged(file, "it is no checkpoint of torch") from None
        raise ModelError(
            f"{file}: refused, because loading it could execute code: it holds "
            f"{wanted[1] if wanted else 'pickled objects'} and not only tensors, which weights_only=True refuses. "
            "The safe way: where you trust the file, load it in its own project and save the weights with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from None
    except ModelError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        if "TorchScript" in str(error):
            raise ModelError(
                f"{file}: expected weights, got a TorchScript archive, which holds code; in the project that made it, "
                "save them with torch.save(model.state_dict(), 'model.pt')"
            ) from None
        raise _damaged(file, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    return _state(content, file)


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file}: the checkpoint is truncated or damaged ({reason}); copy or download it again")


def _state(content: Any, file: Path) -> dict[str, Tensor]:
    found = next((content[key] for key in CONTAINERS if isinstance(content, Mapping) and key in content), content)
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{file}: expected a dict of tensors, got {type(found).__name__}; save model.state_dict()")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{file}: expected a dict of tensors, bare or under {', '.join(map(repr, CONTAINERS))}, "
                f"got {type(value).__name__} at {key!r}; save model.state_dict()"
            )
    return {str(key): value for key, value in found.items()}


def _strip(state: dict[str, Tensor], prefix: str, file: Path, needed: Set[str]) -> dict[str, Tensor]:
    if not prefix:
        return state
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if needed <= inside.keys():  # what is outside belongs to others, such as a loss function
        return inside
    if not inside:
        raise ModelError(f"{file}: expected keys that begin with key_prefix {prefix!r}, got {_some(state)}")
    stripped = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if len(stripped) < len(state):
        raise ModelError(f"{file}: some keys occur with and without key_prefix {prefix!r}; leave it empty")
    return stripped


def _optional_keys(network: nn.Module) -> set[str]:
    """Keys that a foreign checkpoint need not hold: fixed shortcuts, and BatchNorm's counters (new in torch 0.4.1)."""
    shortcuts = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, OptionAShortcut)}
    return shortcuts | {name for name, _ in network.named_buffers() if name.endswith("num_batches_tracked")}


def _check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: set[str], file: Path, key_prefix: str
) -> None:
    missing = [key for key in expected if key not in state and key not in optional]
    unexpected = [key for key in state if key not in expected]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    prefix = _common_prefix(unexpected, missing)
    hint = f'set key_prefix = "{key_prefix}{prefix}"' if prefix else "is it the checkpoint of another architecture?"
    raise ModelError(
        f"{file}: expected the {len(expected)} keys of the network, got {len(state)}: {', '.join(parts)}; {hint}"
    )


def _common_prefix(unexpected: Iterable[str], missing: Iterable[str]) -> str:
    """The prefix that turns unexpected keys into all the missing ones, or nothing."""
    found, wanted = set(unexpected), list(missing)
    if not wanted:
        return ""
    prefixes = sorted({key.removesuffix(wanted[0]) for key in found if key.endswith(wanted[0])} - {""}, key=len)
    return next((prefix for prefix in prefixes if all(prefix + key in found for key in wanted)), "")


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    matrices = [key for key, tensor in expected.items() if tensor.ndim >= 2]
    for key, tensor in state.items():
        want, got = tuple(expected[key].shape), tuple(tensor.shape)
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise ModelError(f"{file}: {key!r}: expected {expected[key].dtype}, got {tensor.dtype}")
        if want == got:
            continue
        hint = "is it the checkpoint of another architecture?"
        if len(want) == len(got) >= 2 and want[:1] + want[2:] == got[:1] + got[2:] and key == matrices[0]:
            hint = f"it was trained on images with {got[1]} channels, not {want[1]}"
        elif (
            len(want) == len(got) and want[1:] == got[1:] and key.rpartition(".")[0] == matrices[-1].rpartition(".")[0]
        ):
            hint = f"it was trained for {got[0]} classes, not {want[0]}"
        raise ModelError(f"{file}: {key!r}: expected shape {want}, got {got}; {hint}")


def _some(keys: Iterable[str]) -> str:
    listed = list(keys)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
