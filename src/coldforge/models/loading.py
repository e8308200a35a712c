"""Where a network comes from: the zoo, timm, torchvision, a user's factory, or a live module."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from coldforge.errors import ModelError, nearest
from coldforge.models.zoo import ZOO, OptionAShortcut

KINDS = ("zoo", "timm", "torchvision")
MEMORY = "memory"
"""Kind of a source that no other process can build: an object that was passed to a function."""
FORMS = "zoo:NAME, timm:NAME, torchvision:NAME or package.module:factory"


@dataclass(frozen=True)
class ModelSource:
    """How to get a fresh network, without normalization."""

    name: str
    """Readable, e.g. "zoo:cnn8"."""
    make: Callable[[int], nn.Module]
    """``make(seed)`` returns a new network as its maker left it; the same seed gives the same weights, and torch's
    global random state stays as it was."""
    rebuildable: bool
    """False for a live module: other processes cannot build it from its name, and the seed changes nothing."""

    def build(self, seed: int) -> nn.Module:
        """A new network, all of whose weights learn: parts that were frozen for the training before, too.

        Only the fixed weights of an :class:`~coldforge.models.zoo.OptionAShortcut` stay frozen.
        """
        network = self.make(seed)
        for _, parameter in _frozen(network):
            parameter.requires_grad_(True)
        return network

    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that :meth:`build` thaws."""
        return tuple(name for name, _ in _frozen(self.make(0)))


def model_source(source: str | nn.Module, *, image_shape: tuple[int, int, int], num_classes: int) -> ModelSource:
    """Find a network by name, or wrap a live one.

    A factory ``package.module:factory`` is imported from the Python path or the current folder. It is called with
    those of the keyword arguments ``in_channels``, ``num_classes`` and ``image_size`` (a side in pixels, or (H, W)
    where the images are not square) that it accepts. A live module is copied, now and at each build, and keeps its
    weights.

    Args:
        source: zoo:NAME, timm:NAME, torchvision:NAME, package.module:factory, or a module.
        image_shape: (C, H, W) of the images.
        num_classes: K.

    Raises:
        ModelError: for a name that is unknown (says the nearest), a package that is missing, or, when built, a
            factory that fails or returns something else than a module.
    """
    if isinstance(source, nn.Module):
        original = copy.deepcopy(source)
        return ModelSource(type(source).__name__, lambda seed: copy.deepcopy(original), rebuildable=False)
    kind, colon, name = source.partition(":")
    if kind == MEMORY:
        raise ModelError(f"model.source: {name} was an object in memory, which no name can build; pass it to forge()")
    if not colon or not name or not kind:
        hint = f"did you mean 'zoo:{source}'?" if source in ZOO else nearest(source, [f"zoo:{key}" for key in ZOO])
        raise ModelError(f"model.source: expected {FORMS}, got {source!r}; {hint}")
    channels, height, width = image_shape
    size = height if height == width else (height, width)
    arguments: dict[str, object] = {"in_channels": channels, "num_classes": num_classes, "image_size": size}
    build: Callable[[], Any]
    match kind:
        case "zoo":
            if name not in ZOO:
                raise ModelError(f"model.source: unknown network {source!r}; {nearest(name, ZOO)}")
            build = partial(ZOO[name], **_accepted(ZOO[name], arguments))
        case "timm":
            build = _timm(name, channels, num_classes)
        case "torchvision":
            build = _torchvision(name, channels, num_classes)
        case _:
            build = _user_factory(kind, name, arguments)
    return ModelSource(source, lambda seed: _seeded(build, seed, source), rebuildable=True)


def _frozen(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    fixed = {id(layer.weight) for layer in network.modules() if isinstance(layer, OptionAShortcut)}
    return [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in fixed
    ]


def _seeded(build: Callable[[], Any], seed: int, source: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build()
    if not isinstance(network, nn.Module):
        raise ModelError(f"{source}: expected a torch.nn.Module, got {type(network).__name__}")
    return network


def _accepted(factory: Callable[..., Any], arguments: dict[str, object]) -> dict[str, object]:
    """Those of the keyword arguments that a factory takes."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    accepted = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {key: value for key, value in arguments.items() if key in accepted}


def _user_factory(module_name: str, name: str, arguments: dict[str, object]) -> Callable[[], Any]:
    source = f"{module_name}:{name}"
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise ModelError(f"{source}: importing {module_name} failed: {error}") from error
            kind = nearest(module_name, KINDS)
            hint = f"; {kind}" if kind.startswith("did") else ""
            raise ModelError(
                f"{source}: no module named {error.name!r} in {os.getcwd()} or on the Python path; "
                f"expected {FORMS}{hint}"
            ) from None
        except Exception as error:  # the user's module may raise anything
            raise ModelError(f"{source}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if factory is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"{source}: {module_name} has no {name!r}; {nearest(name, names)}")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ModelError(
            f"{source}: expected a function or class that returns a network, got a {type(factory).__name__} object; "
            "name a function that returns it"
        )
    given = _accepted(factory, arguments)

    def build() -> Any:
        with _current_folder_importable():
            try:
                return factory(**given)
            except Exception as error:  # the user's factory may raise anything
                call = ", ".join(f"{key}={value!r}" for key, value in given.items())
                raise ModelError(
                    f"{source}: the factory failed: {type(error).__name__}: {error}; it was called with ({call})"
                ) from error

    return build


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    if added := folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _timm(name: str, channels: int, num_classes: int) -> Callable[[], Any]:
    timm = _optional("timm")
    if not timm.is_model(name):
        raise ModelError(f"model.source: timm has no network {name!r}; {_close(name, timm.list_models())}")
    return lambda: timm.create_model(name, pretrained=False, in_chans=channels, num_classes=num_classes)


def _torchvision(name: str, channels: int, num_classes: int) -> Callable[[], Any]:
    models = _optional("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"model.source: torchvision has no classifier {name!r}; {_close(name, known)}")
    if channels != 3:
        raise ModelError(f"torchvision:{name}: expected images with 3 channels, got {channels}; use zoo: or timm:")
    return lambda: models.get_model(name, weights=None, num_classes=num_classes)


def _optional(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"{package}: expected the optional package {package}, which cannot be imported ({error}); "
            "install it with `pip install 'coldforge[timm]'`"
        ) from None


def _close(name: str, valid: list[str]) -> str:
    hint = nearest(name, valid)  # hundreds of names are not listed
    return hint if hint.startswith("did") else f"it knows {len(valid)} others"
