"""The processes that train one network together, as the training loop sees them.

Every process walks through the same global batches and draws the same random numbers for all of their images, then
computes on its share. Losses are weighted by the sizes of the shares and gradients are added up, so a step is that of
one process up to the rounding of sums. Weights, momenta and averages follow from these sums and so are equal
everywhere; what is decided (is the network good? has it collapsed?) rank 0 decides for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from coldforge.errors import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long a process may be silent within a step before the others give it up. One that ends is noticed at once."""
_FOREVER = timedelta(days=30)
"""How long helpers wait for rank 0, which may be evaluating. If its process ends, they notice at once."""


class LostError(TrainingError):
    """A process of the world ended or fell silent."""


class World:
    """This process alone, or several that train together.

    Args:
        fabric: launched with a strategy for several processes; None: this process alone.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank: int = fabric.global_rank if fabric else 0
        self.size: int = fabric.world_size if fabric else 1
        self._patient: Any = distributed.new_group(timeout=_FOREVER, backend="gloo") if fabric else None

    @property
    def apart(self) -> tuple[int, ...]:
        """What keeps random numbers that are drawn for a share only apart from those of other processes."""
        return (self.rank,) if self.rank else ()

    def share(self, n: int) -> slice:
        """Which of the ``n`` images of a batch are this process's; shares differ by at most one image."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float tensor by its sum over all processes, in one message."""
        if self._fabric is None:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with answering():
            distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """All ``n`` rows of a batch, from the rows of each process's share."""
        if self._fabric is None:
            return rows
        everything = rows.new_zeros(n, *rows.shape[1:])
        everything[self.share(n)] = rows
        with answering():
            distributed.all_reduce(everything)
        return everything

    def from_first(self, value: T) -> T:
        """The value that rank 0 gives, everywhere. The others wait for it as long as it takes."""
        if self._fabric is None:
            return value
        box: list[Any] = [value]
        with answering():
            distributed.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]  # type: ignore[no-any-return]

    def agree(self, decide: Callable[[], T], refusal: type[Exception]) -> T:
        """What rank 0 decides, everywhere; if it raises ``refusal``, all do."""
        if self._fabric is None:
            return decide()
        answer: tuple[T | None, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                answer = decide(), None
            except refusal as error:
                answer = None, error
        value, refused = self.from_first(answer)
        if refused is not None:
            raise refused
        return value  # type: ignore[return-value]  # None only where decide() returns it

    def from_all(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self._fabric is None:
            return [value]
        values: list[Any] = [None] * self.size
        with answering():
            distributed.all_gather_object(values, value)
        return values


@contextmanager
def answering() -> Iterator[None]:
    """Inside, processes talk; one that does not answer is a :class:`LostError`."""
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises
        reason = re.sub(r"\[/\S+\] *", "", str(error)).strip().split(". ")[0]  # without the path of gloo's source
        raise LostError(
            f"one of the processes that train this network together has ended, or was silent for {PATIENCE_S:.0f} s "
            f"({reason}). Its own message, if it left one, says why; often it is out of memory. "
            "Run the same command again: finished stages are kept and the training continues from its checkpoint"
        ) from error
