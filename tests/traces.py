"""What an attack or an evaluation could leave behind: in networks, and in what a process shares."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))


def draw_a_little() -> None:
    """Bring the random states to where no seed brings them."""
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002


def unsettle(network: nn.Module) -> None:
    """Bring a network into a state that no evaluation chooses: mixed modes, a frozen parameter, a kept gradient."""
    first, *_, last = network.parameters()
    network.train()
    next(network.children()).eval()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)


def traces(*parts: nn.Module | Tensor) -> str:
    """A digest of networks and tensors, and of the state that all of a process shares.

    Of a network: parameters, buffers, gradients, what needs some, modes, hooks, and whatever its modules keep as plain
    attributes, such as how a quantizer rounds. Of the process: the random states of torch, NumPy and Python, and
    torch's own settings.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.numpy().tobytes())
            continue
        for name, tensor in part.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        for parameter in part.parameters():
            gradient = b"none" if parameter.grad is None else parameter.grad.numpy().tobytes()
            digest.update(repr(parameter.requires_grad).encode() + gradient)
        for name, module in part.named_modules():
            kept = [
                (key, value if isinstance(value, PLAIN) else type(value)) for key, value in sorted(vars(module).items())
            ]
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            digest.update(repr((name, kept, hooks)).encode())
    digest.update(torch.random.get_rng_state().numpy().tobytes())
    _, words, *position = np.random.get_state()  # noqa: NPY002
    digest.update(repr((words.tolist(), position, random.getstate())).encode())
    settings = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()]
    digest.update(repr((settings, torch.get_num_threads())).encode())
    return digest.hexdigest()
