"""One attack on many images by several threads, each with images of its own.

An image's result depends on nothing but the image, so who attacks it does not matter. Small networks do not keep several
threads busy inside one operator; several operators at a time do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields, replace

import torch
from torch import Tensor

from coldforge.attacks import TILE, Attack, AttackResult, Classifier, Judge, ThreatModel, untouched

_PIXELS = 2**21
"""Values of the images that all workers together attack at a time, so that large images do not fill the memory."""
_FEWEST = 8
"""Images that are worth a worker."""
_LOOK_SECONDS = 0.5


def workers_of(threads: int, values: int) -> int:
    """How many workers share ``threads``, for images of so many values. The number of images has no say in it: what an
    operator computes may depend, in its last bit, on how many threads compute it.
    """
    return max(min(threads, _PIXELS // (TILE * values)), 1)


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
    """As :meth:`Attack.__call__`, with the threads that torch has; the model and the judge are asked by several at a
    time. The callbacks are called by one at a time.
    """
    threads = torch.get_num_threads()
    workers = workers_of(threads, max(images[0].numel(), 1)) if len(images) else 1
    if workers == 1:
        return attack(
            model,
            images,
            labels,
            threat_model,
            seed=seed,
            indices=indices,
            judge=judge,
            on_progress=on_progress,
            on_done=on_done,
            stop=stop,
        )
    count = min(workers, -(-len(images) // _FEWEST))
    shares = [torch.arange(len(images))[worker::count] for worker in range(count)]
    done = [0.0] * count
    lock, over = threading.Lock(), threading.Event()
    whole: AttackResult | None = None

    def enter(found: AttackResult, rows: Tensor, at: Tensor) -> AttackResult:
        """Rows ``at`` of a worker's result are ``rows`` of the whole."""
        nonlocal whole
        whole = whole or _blank(found, len(images))
        for entry in fields(AttackResult):
            values = getattr(found, entry.name)
            if len(values):
                getattr(whole, entry.name)[rows[at]] = values[at]
        return whole

    def work(number: int) -> None:
        torch.set_num_threads(threads // workers)  # of this thread; what begins later, too, which is put right below
        rows = shares[number]

        def progress(fraction: float) -> None:
            with lock:
                done[number] = fraction * len(rows)
                if on_progress is not None:
                    on_progress(sum(done) / len(images))

        def finished(found: AttackResult, positions: list[int]) -> None:
            with lock:
                at = torch.tensor(positions)
                result = enter(found, rows, at)
                if on_done is not None:
                    on_done(result, rows[at].tolist())

        found = attack(
            model,
            images[rows],
            labels[rows],
            threat_model,
            seed=seed,
            indices=indices[rows],
            judge=judge,
            on_progress=progress,
            on_done=finished,
            stop=lambda: over.is_set() or (stop is not None and stop()),
        )
        with lock:
            enter(found, rows, torch.arange(len(rows)))

    try:
        with untouched(model), ThreadPoolExecutor(count) as pool:
            jobs = [pool.submit(work, number) for number in range(count)]
            try:
                left = set(jobs)
                while left:  # looking up now and then, so that Ctrl-C is heard
                    ended, left = wait(left, timeout=_LOOK_SECONDS)
                    for job in ended:
                        job.result()
            finally:
                over.set()
    finally:
        torch.set_num_threads(threads)
    assert whole is not None
    return whole


def _blank(like: AttackResult, count: int) -> AttackResult:
    tensors = {entry.name: getattr(like, entry.name) for entry in fields(AttackResult)}
    blank = {name: tensor.new_zeros(count, *tensor.shape[1:]) for name, tensor in tensors.items() if len(tensor)}
    return replace(like, **blank)
