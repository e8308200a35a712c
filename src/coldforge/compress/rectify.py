"""Quantizers that do the work of the ReLU before them, while a network is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from coldforge.compress.fakequant import ActivationQuantizer
from coldforge.compress.graph import set_module


@contextmanager
def rectified(network: nn.Module) -> Iterator[None]:
    """Inside, a quantizer that alone reads a ReLU does its work: one pass over memory each way instead of two.

    Rounding to codes from 0 upwards cuts off what is below 0 anyway. The network computes the same, and its gradients
    are the same; for training. A network that was not traced is left as it is.
    """
    pairs = list(_relus_before_quantizers(network)) if isinstance(network, fx.GraphModule) else []
    relus = {name: network.get_submodule(name) for name, _ in pairs}
    try:
        for name, quantizer in pairs:
            set_module(network, name, nn.Identity())
            quantizer.rectifies = True
        yield
    finally:
        for name, quantizer in pairs:
            set_module(network, name, relus[name])
            quantizer.rectifies = False


def _relus_before_quantizers(network: fx.GraphModule) -> Iterator[tuple[str, ActivationQuantizer]]:
    modules = dict(network.named_modules())
    calls = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    for node in network.graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.ReLU or len(node.users) != 1:
            continue
        (reader,) = node.users
        quantizer = modules.get(str(reader.target)) if reader.op == "call_module" else None
        once = calls[str(node.target)] == 1 and calls[str(reader.target)] == 1
        if isinstance(quantizer, ActivationQuantizer) and once and quantizer.zero == quantizer.qmin:
            yield str(node.target), quantizer
