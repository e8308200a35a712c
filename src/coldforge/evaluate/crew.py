"""One attack on many images by several threads, each with images of its own.

An image's result depends on nothing but the image, so who attacks it does not matter. Small networks do not keep
several threads busy inside one operator; several operators at a time do.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from coldforge.attacks import TILE, Attack, AttackResult, Classifier, Judge, ThreatModel, predict
from coldforge.attacks.base import empty_result

_VALUES = 2**21
"""Values of the images that all workers together attack at a time, so that large images do not fill the memory."""
_FEWEST = 8
"""Runs that are worth a worker: what the smallest tile holds."""
_LOOK = 32
"""Images that show whether a network answers them alike twice."""
_LOOK_SECONDS = 0.5


def workers_of(threads: int, values: int) -> int:
    """How many workers share ``threads``, for images of so many values. The number of images has no say in it: what an
    operator computes may depend, in its last bit, on how many threads compute it.
    """
    most = max(_VALUES // (TILE * values), 1)
    return threads // -(-threads // most)


def attack_all(
    attack: Attack,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    indices: Tensor,
    judge: Judge | None,
    on_progress: Callable[[float], None] | None = None,
    on_done: Callable[[AttackResult, list[int]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> AttackResult:
    """As :meth:`Attack.__call__`, with the threads that torch has.

    Each worker has a copy of a network. A classifier of another kind and the judge are asked by several at a time; the
    callbacks are called by one at a time, which may be any. Only one thread of a process calls this at a time, because
    torch's number of threads, which is lowered meanwhile, is one for all threads that begin.

    A network that answers the same images differently draws random numbers, and is attacked by one worker: with
    several, no seed would repeat it.
    """
    search = partial(attack, threat_model=threat_model, seed=seed, judge=judge)
    threads = torch.get_num_threads()
    workers = 1 if len(images) == 0 else workers_of(threads, images[0].numel())
    copies = _copies(model, workers, attack, images) if workers > 1 else None
    if copies is None:
        return search(model, images, labels, indices=indices, on_progress=on_progress, on_done=on_done, stop=stop)
    shares = [torch.arange(len(images))[number :: len(copies)] for number in range(len(copies))]
    done = [0.0] * len(copies)
    lock, over = threading.Lock(), threading.Event()
    whole = empty_result(images)

    def enter(found: AttackResult, rows: Tensor, at: Tensor) -> None:
        """Rows ``at`` of a worker's result are ``rows`` of the whole."""
        for entry in fields(AttackResult):
            values = getattr(found, entry.name)
            if len(values):
                getattr(whole, entry.name)[rows[at]] = values[at]

    def work(number: int) -> None:
        torch.set_num_threads(threads // workers)  # of this thread, and of those that begin later; put back below
        rows = shares[number]

        def progress(fraction: float) -> None:
            with lock:
                done[number] = fraction * len(rows)
                if on_progress is not None:
                    on_progress(sum(done) / len(images))

        def finished(found: AttackResult, positions: list[int]) -> None:
            with lock:
                at = torch.tensor(positions)
                enter(found, rows, at)
                if on_done is not None:
                    on_done(whole, rows[at].tolist())

        found = search(
            copies[number],
            images[rows],
            labels[rows],
            indices=indices[rows],
            on_progress=progress,
            on_done=finished,
            stop=lambda: over.is_set() or (stop is not None and stop()),
        )
        with lock:
            enter(found, rows, torch.arange(len(rows)))

    try:
        with ThreadPoolExecutor(len(copies)) as pool:
            try:
                left: set[Future[None]] = {pool.submit(work, number) for number in range(len(copies))}
                while left:  # looking up now and then, so that Ctrl-C is heard
                    ended, left = wait(left, timeout=_LOOK_SECONDS, return_when=FIRST_EXCEPTION)
                    for job in ended:
                        job.result()
            finally:
                over.set()
    finally:
        torch.set_num_threads(threads)
    return whole


def _copies(model: Classifier, workers: int, attack: Attack, images: Tensor) -> list[Classifier] | None:
    """One for each worker that there is work for; None: it cannot be asked by several."""
    few = images[:_LOOK]
    logits = predict(model, few)
    if not torch.equal(logits, predict(model, few)):
        return None
    runs = len(images) * attack.runs(logits.shape[1])
    count = min(workers, len(images), -(-runs // _FEWEST))
    if not isinstance(model, nn.Module):
        return [model] * count
    try:
        return [model, *(copy.deepcopy(model) for _ in range(count - 1))]
    except Exception:  # foreign code may refuse to be copied in any way it likes
        return None
