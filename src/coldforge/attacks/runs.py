"""Which run of which image is made when, and what each has shown.

An image's runs (restarts, target classes) are meant one after the other, until one succeeds. Where slots are free,
later ones begin before earlier ones have ended. What is reported does not depend on that: a run counts only where none
before it has succeeded, and is as if it had never begun otherwise.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Runs:
    """The runs of N images, R of each.

    Args:
        images: N.
        runs: R.
        all_of_them: every run of every image is made to its end, one after the other; successes end nothing.
    """

    def __init__(self, images: int, runs: int, *, all_of_them: bool) -> None:
        self.runs, self._all = runs, all_of_them
        self.margin = torch.full((images, runs), torch.inf)
        """Smallest margin seen inside ball and box, (N, R)."""
        self.nearly = torch.full((images, runs), torch.inf)
        """The same, up to a little outside the ball."""
        self.queries = torch.zeros(images, runs, dtype=torch.int64)
        self.disputed = torch.zeros(images, runs, dtype=torch.bool)
        self.ended = torch.zeros(images, runs, dtype=torch.bool)
        """Which were made to their end or to a success."""
        self.winner = torch.full((images,), runs)
        """The first run that is known to have succeeded, (N,); R: none is."""
        self._begun = [0] * images
        self._active = [0] * images
        self._waiting = deque(range(images))  # none of their runs is being made
        self._ahead: deque[int] = deque()  # one is, and there are more

    def next(self) -> tuple[int, int] | None:
        """The image and the run to begin in a free slot; None: there is nothing to begin now."""
        for queue in (self._waiting, self._ahead):
            while queue:
                image = queue.popleft()
                run = self._begun[image]
                if run == self.runs or (not self._all and int(self.winner[image]) < self.runs):
                    continue
                self._begun[image] += 1
                self._active[image] += 1
                if run + 1 < self.runs and not self._all:
                    self._ahead.append(image)
                return image, run
        return None

    def succeed(self, image: int, run: int) -> bool:
        """Enter a success; whether it is the earliest run of its image that is known to have one."""
        earlier = run < int(self.winner[image])
        if earlier:
            self.winner[image] = run
        return earlier

    def open(self, images: Tensor, runs: Tensor) -> Tensor:
        """Which of these runs can still be the first one to succeed, bool."""
        return runs < self.winner[images]

    def over(self, images: Tensor, runs: Tensor) -> Tensor:
        """Which of these runs need not go on, bool."""
        return self.ended[images, runs] | (runs > self.winner[images]) & (not self._all)

    def leave(self, images: list[int]) -> Tensor:
        """Runs of these images leave their slots, one for each time it is named; the images that are done with."""
        for image in images:
            self._active[image] -= 1
        touched = torch.tensor(sorted(set(images)), dtype=torch.int64)
        done = ~(self._counting(touched) & ~self.ended[touched]).any(1)
        for image in touched[~done].tolist():
            if not self._active[image]:
                self._waiting.append(image)
        return touched[done]

    def settled(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, smallest margin, and whether the judge ever contradicted, of these images' runs that count."""
        counting = self._counting(images)
        queries = self.queries[images].where(counting, 0).sum(1)
        margin = torch.minimum(self.margin[images], self.nearly[images]).where(counting, torch.inf).amin(1)
        return queries, margin, (self.disputed[images] & counting).any(1)

    def _counting(self, images: Tensor) -> Tensor:
        """Which runs of these images would be made one after the other, ``(n, R)`` bool."""
        last = self.winner[images] if not self._all else torch.full_like(images, self.runs)
        return torch.arange(self.runs) <= last[:, None]
