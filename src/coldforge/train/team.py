"""The processes of a run: rank 0 makes every stage, the others only help in trainings.

They are started here when the first training begins (``compute.devices`` on one machine), or torchrun or SLURM has
started the same command on every machine, and all but rank 0 call :func:`help_out`. Either way a helper waits until
rank 0 names a function and its arguments, calls it with the world, and waits again. So it reads no store and no data
set: network and images come with the arguments, from a process of the same user and the same run.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from torch import distributed

from coldforge.errors import ColdforgeError, ModelError, TrainingError, UsageError
from coldforge.models import torch_threads
from coldforge.recipe import ComputeSpec
from coldforge.train import world as worlds
from coldforge.train.world import LostError, World

T = TypeVar("T")

START_S = 600.0
"""How long a helper may take to start."""


@dataclass(frozen=True)
class Launch:
    """The world that torchrun or SLURM has started this process in."""

    by: str
    rank: int
    devices: int
    """Processes of each machine."""
    num_nodes: int


def launched() -> Launch | None:
    """What torchrun or ``srun`` says of this process; None where it was started alone."""
    known = os.environ
    if "TORCHELASTIC_RUN_ID" in known and int(known["WORLD_SIZE"]) > 1:
        devices = int(known["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(known["RANK"]), devices, int(known["WORLD_SIZE"]) // devices)
    if int(known.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # of srun; without it the job is one process
        if "SLURM_NTASKS_PER_NODE" not in known:
            raise UsageError("SLURM: expected --ntasks-per-node=N, the processes of each machine, got only --ntasks")
        devices = int(known["SLURM_NTASKS_PER_NODE"])
        return Launch("SLURM", int(known["SLURM_PROCID"]), devices, int(known["SLURM_STEP_NUM_TASKS"]) // devices)
    return None


def placed(compute: ComputeSpec) -> ComputeSpec:
    """The settings with the devices that there are: those of torchrun or SLURM, if this process is theirs.

    Raises:
        UsageError: the settings want others than these, or more than this machine has.
    """
    found, asked = launched(), (compute.devices, compute.num_nodes)
    if found is not None:
        if asked not in ((1, 1), (found.devices, found.num_nodes)):
            raise UsageError(
                f"expected {asked[0]} devices on each of {asked[1]} machines, as --devices and --num-nodes or the "
                f"recipe say; {found.by} has started {found.devices} on each of {found.num_nodes}"
            )
        return compute.model_copy(update={"devices": found.devices, "num_nodes": found.num_nodes})
    if compute.num_nodes > 1:
        raise UsageError(
            f"--num-nodes {compute.num_nodes}: expected to be started by torchrun or srun on every machine, such as "
            f"`torchrun --nnodes {compute.num_nodes} --nproc-per-node {compute.devices} ... -m coldforge run ...`; see "
            "docs/training-on-several-machines.md"
        )
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if compute.devices > processors:
        raise UsageError(f"--devices: expected at most {processors}, the processors here, got {compute.devices}")
    return compute


@dataclass(frozen=True)
class _Task:
    function: Callable[..., object]
    arguments: tuple[object, ...]
    keywords: Mapping[str, object]
    threads: int


class Team:
    """This process as rank 0 of a run; alone, unless the settings want more devices.

    Args:
        compute: settings, as :func:`placed` gives them.
    """

    def __init__(self, compute: ComputeSpec | None = None) -> None:
        compute = compute or ComputeSpec()
        several = compute.devices * compute.num_nodes > 1
        if several:
            compute = placed(compute)
        self._devices, self._nodes = compute.devices, compute.num_nodes
        self._world = World()
        self._helpers: list[Any] = []  # multiprocessing.context.SpawnProcess
        self.used = False
        """Whether there was anything to do for more than one process."""
        where = launched() if several else None
        if where is not None and where.rank:
            raise UsageError(
                f"rank {where.rank} of {where.by}: expected `coldforge run`, whose other ranks help rank 0"
            )
        if where is not None:  # the others wait already
            self._world = _join(self._devices, self._nodes)

    def call(self, function: Callable[..., T], *arguments: object, here: Mapping[str, object], **keywords: object) -> T:
        """``function(*arguments, **keywords, world=...)`` in every process at once; the threads are shared by those of
        a machine.

        Args:
            function: found by its name in every process.
            *arguments: the same everywhere.
            here: further keyword arguments, of this process only.
            **keywords: the same everywhere.

        Raises:
            ModelError: an argument cannot be sent.
            TrainingError: a helper cannot be started, or cannot read what it was sent.
            LostError: a helper ended or fell silent.
        """
        if self._devices * self._nodes == 1:
            return function(*arguments, **keywords, **here, world=self._world)
        threads = max(1, torch.get_num_threads() // self._devices)
        task = _packed(_Task(function, arguments, keywords, threads))
        if self._world.size == 1:
            self._start()
        self.used = True
        self._world.from_first(task)
        if problems := [problem for problem in self._world.from_all("") if problem]:
            raise TrainingError(f"a helping process cannot read what it was sent: {problems[0]}")
        with torch_threads(threads):
            return function(*arguments, **keywords, **here, world=self._world)

    def close(self, *, done: bool) -> None:
        """Let the helpers go; those of this process end at once unless all is ``done``."""
        if self._world.size == 1:
            return
        if done:
            with contextlib.suppress(LostError):
                self._world.from_first(None)
        for helper in self._helpers:
            if not done:
                helper.kill()
            helper.join(10)
            if helper.is_alive():
                helper.kill()
        if done or self._helpers:  # else the others end with this process
            distributed.destroy_process_group()
        self._helpers.clear()
        self._world = World()

    def _start(self) -> None:
        """Start the helpers on this machine, and join them."""
        from lightning_fabric.plugins.environments.lightning import find_free_network_port

        port = find_free_network_port()
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self._devices):
            ours, theirs = context.Pipe()
            helper = context.Process(target=_help, args=(rank, self._devices, port, theirs), daemon=True)
            helper.start()
            theirs.close()
            self._helpers.append(helper)
            if not wait([ours], START_S) or not _says_ready(ours):
                helper.join(5)
                raise TrainingError(
                    f"--devices: a helping process did not start (exit code {helper.exitcode}). A script that asks for "
                    'several devices must keep its work below `if __name__ == "__main__":`'
                )
        self._world = _join(self._devices, 1, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@contextlib.contextmanager
def gathered(compute: ComputeSpec) -> Iterator[Team]:
    """The team of one run; its helpers end with it."""
    team = Team(compute)
    done = False
    try:
        yield team
        done = True
    finally:
        team.close(done=done)


def help_out(compute: ComputeSpec) -> None:
    """Help rank 0 until it is done: the whole life of the other processes that torchrun or SLURM has started.

    Raises:
        LostError: rank 0 ended before it was done.
    """
    compute = placed(compute)
    _serve(_join(compute.devices, compute.num_nodes))


def _help(rank: int, size: int, port: int, pipe: Connection) -> None:
    """The life of a helper that was started here. Ctrl-C is rank 0's business, and so is every message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import lightning_fabric  # noqa: F401 - takes long, so before the others wait

    pipe.send("ready")
    try:
        _serve(_join(size, 1, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
    except LostError:
        raise SystemExit(1) from None


def _says_ready(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv() == "ready")
    except (EOFError, OSError):
        return False
    finally:
        pipe.close()


def _serve(world: World) -> None:
    while True:
        packed: bytes | None = world.from_first(None)
        if packed is None:
            break
        task, problem = None, ""
        try:
            task = _unpacked(packed)
        except Exception as error:  # whatever the user's module raises when it is imported
            problem = f"{type(error).__name__}: {error}"
        if any(world.from_all(problem)):
            continue
        assert task is not None
        with torch_threads(task.threads):
            try:
                task.function(*task.arguments, **task.keywords, world=world)
            except LostError:
                raise
            except ColdforgeError:  # rank 0 has met it, too, and says so
                continue
    distributed.destroy_process_group()


def _packed(task: _Task) -> bytes:
    try:
        return pickle.dumps(task)
    except Exception as error:  # pickle raises what it likes
        raise ModelError(
            "--devices: expected a network that can be sent to another process, as those of a module's own classes "
            f"can; got one that cannot: {type(error).__name__}: {error}"
        ) from error


def _unpacked(packed: bytes) -> _Task:
    """What rank 0 has sent; classes of the user are looked for in the current folder, too."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        task = pickle.loads(packed)
    finally:
        if added:
            sys.path.remove(folder)
    assert isinstance(task, _Task)
    return task


def _join(devices: int, nodes: int, **variables: str) -> World:
    """Meet the other processes, where the environment or ``variables`` say; blocks until all are there."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    if distributed.is_initialized():
        raise UsageError("devices: expected a process of its own, got one that is in another torch.distributed world")
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=worlds.PATIENCE_S))
    outside = None if variables else launched()
    kinds = {"torchrun": TorchElasticEnvironment, "SLURM": SLURMEnvironment}
    # OMP_NUM_THREADS: Fabric chooses a number of threads where there is none.
    with warnings.catch_warnings(), _environment(OMP_NUM_THREADS=str(torch.get_num_threads()), **variables):
        warnings.simplefilter("ignore")
        try:
            plugin = kinds[outside.by]() if outside else LightningEnvironment()
            fabric = Fabric(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=strategy, plugins=[plugin])
            fabric.launch()
            return World(fabric)
        except (RuntimeError, ValueError) as error:
            raise LostError(
                f"expected {devices * nodes} processes to meet within {worlds.PATIENCE_S:.0f} s, got: {error}"
            ) from error


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Inside, environment variables have these values."""
    before = {name: os.environ.get(name) for name in [*variables, "MASTER_ADDR", "MASTER_PORT"]}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
