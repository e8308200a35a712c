"""Adapters: one attack, as coldforge and as the other libraries have it, on the same images of the same network.

    compare("torchattacks", "pgd-20", load_task("fashion-mnist-cnn8", 1000), seed=0)

Everybody gets a copy of the network that counts the images it forwards and the images whose gradient is taken, and
returns adversarial images. What they are worth is decided here, in fp32, in the same way for all: inside ball and box
to 1e-6, and misclassified. The libraries are installed with ``pip install --no-deps -r
benchmarks/requirements-peers.txt``; they are imported only when they are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coldforge.attacks import ThreatModel, as_parts, parse_attack, predict
from coldforge.compress import load_network
from coldforge.data import load_data
from coldforge.evaluate import Precision, Target, fast_copy, find_adversarial
from coldforge.models import channels_last
from coldforge.provenance import git_state, has_bf16
from coldforge.recipe import DataSpec
from coldforge.sealed import sha256_of

TOLERANCE = 1e-6
NETWORKS = {"fashion-mnist-cnn8": ("fashion-mnist", 0.1), "cifar10-resnet20": ("cifar10", 8 / 255)}
"""Network: data set, eps (linf)."""
ATTACKS = ("pgd-20", "apgd-ce", "apgd-t", "fab-t", "square", "autoattack")
OFFERS = {
    "ours": ATTACKS,
    "reference": ATTACKS[1:],
    "torchattacks": ATTACKS,
    "art": ("pgd-20", "apgd-ce", "square", "autoattack"),
    "foolbox": ("pgd-20",),
}
"""Who has which attack. ART has neither FAB nor the targeted DLR loss."""
PACKAGES = {
    "reference": "pyautoattack",
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "foolbox": "foolbox",
}
NOTES = {
    ("torchattacks", "pgd-20"): "judges the last iterate only; batch 128",
    ("art", "pgd-20"): "judges the last iterate only; batch 32 (its default)",
    ("foolbox", "pgd-20"): "judges the last iterate only; batch 128",
    ("art", "apgd-ce"): "one start, first step 2 eps, as in the paper (its defaults: 5 starts, 0.1)",
    ("torchattacks", "autoattack"): "its AutoAttack: 10 steps, not 100, in APGD-CE, APGD-T and FAB-T",
    ("art", "autoattack"): "its AutoAttack: APGD-CE and -DLR with 5 starts, DeepFool for FAB-T, Square with 5 starts",
}
"""What a reader of the numbers must know."""


@dataclass(frozen=True)
class Task:
    """A network and the first test images of its data set."""

    name: str
    network: nn.Module
    images: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    threat_model: ThreatModel
    digest: str  # of the weights

    @functools.cached_property
    def right(self) -> Tensor:
        """(N,) bool: classified correctly when clean."""
        return predict(self.network, self.images).argmax(1) == self.labels

    def only_right(self, n: int) -> Task:
        """The first ``n`` images that are right when clean."""
        rows = self.right.nonzero()[:n, 0]
        return Task(self.name, self.network, self.images[rows], self.labels[rows], self.threat_model, self.digest)


@dataclass(frozen=True)
class Outcome:
    """What one attack did."""

    fooled: Tensor  # (N,) bool, as verified here
    outside: int  # misclassified images that left ball or box and do not count
    seconds: float
    forward: int  # images that passed the network
    backward: int  # images whose gradient was taken
    batch: int


@dataclass(frozen=True)
class Job:
    """What an adapter needs."""

    model: nn.Module  # counts; in bf16 where it is helped
    exact: nn.Module  # counts too; always fp32
    images: Tensor
    labels: Tensor
    threat_model: ThreatModel
    classes: int
    seed: int
    batch: int
    reference: str

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in turns of ``batch``."""
        return zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)


def load_task(name: str, n: int, folder: Path = Path("results/networks")) -> Task:
    """One of :data:`NETWORKS` with the first ``n`` test images."""
    source, eps = NETWORKS[name]
    network, _ = load_network(folder / name)
    test = load_data(DataSpec(source=source, test_n=n)).test
    digest = sha256_of(folder / name / "model.safetensors")[:12]
    return Task(name, network, test.pixels(), test.labels, ThreatModel("linf", eps), digest)


def compare(
    who: str,
    attack: str,
    task: Task,
    *,
    seed: int = 0,
    batch: int = 0,
    helped: bool = False,
    folded: bool = False,
    mixed: bool = False,
    reference: str = "",
) -> Outcome:
    """Run one attack and verify what it found.

    Args:
        who: a key of :data:`OFFERS`.
        attack: one of its attacks.
        task: network and images.
        seed: of all random numbers.
        batch: images in one call; 0: the peer's default. Ours has none: it queries tiles of 64.
        helped: channels-last and bf16 autocast around the model. For ours that is a search whose successes are
            confirmed in fp32 while it searches; the others only hear what holds in fp32 from the verification.
        folded: give a peer the network with BatchNorm folded, channels-last: the same function in fp32, less time.
        mixed: and in bf16 far from the decision boundary (:class:`Mixed`).
        reference: folder with a clone of fra31/auto-attack to be used instead of the package.
    """
    batch = batch or default_batch(who, attack)
    network = copy.deepcopy(task.network)
    if folded and who != "ours":
        network = fast_copy(network, "fp32")
        network = Mixed(network, fast_copy(task.network, "bf16")) if mixed and has_bf16() else network
    exact = Counted(network)
    model = Counted(Helped(channels_last(copy.deepcopy(task.network)))) if helped else exact
    classes = predict(task.network, task.images[:1]).shape[1]
    job = Job(model, exact, task.images, task.labels, task.threat_model, classes, seed, batch, reference)
    for module in _MODULES.get(who, ()):
        importlib.import_module(module)  # off the clock
    with seeded(seed):
        started = time.perf_counter()
        adversarial = _ADAPTERS[who](job, attack)
        seconds = time.perf_counter() - started
    allowed, wrong = verify(task, adversarial.detach())
    counters = {model, exact}
    return Outcome(
        fooled=allowed & wrong,
        outside=int((wrong & ~allowed).sum()),
        seconds=seconds,
        forward=sum(counter.forwards for counter in counters),
        backward=sum(counter.backwards for counter in counters),
        batch=batch,
    )


def verify(task: Task, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """Which images are inside ball and box to 1e-6, and which are misclassified in fp32; each ``(N,)`` bool."""
    sizes = task.threat_model.size(adversarial.double() - task.images.double())
    pixels = adversarial.flatten(1)
    allowed = (sizes <= task.threat_model.eps + TOLERANCE) & torch.isfinite(pixels).all(1)
    allowed &= (pixels.amin(1) >= -TOLERANCE) & (pixels.amax(1) <= 1 + TOLERANCE)
    return allowed, predict(task.network, adversarial).argmax(1) != task.labels


def default_batch(who: str, attack: str) -> int:
    """Batch size of the peer's own defaults; 128 for libraries that attack whatever batch they are given."""
    if who == "reference":
        return 250
    return 32 if who == "art" and attack != "square" else 128


def version(who: str, reference: str = "") -> str:
    """Name and version of a peer."""
    if who == "ours":
        return f"coldforge {metadata.version('coldforge')}"
    if who == "reference" and reference:
        return f"fra31/auto-attack {git_state(Path(reference))[0][:7]}".rstrip()
    return f"{PACKAGES[who]} {metadata.version(PACKAGES[who])}"


class Counted(nn.Module):
    """Counts images that are forwarded, and images whose gradient is taken."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits: Tensor = self.network(images)
        if images.requires_grad and logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Helped(nn.Module):
    """What a user can do from outside: channels-last images, and bf16 autocast where the CPU has bf16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits.float()


class Mixed(nn.Module):
    """The bf16 copy where its two largest logits are clearly apart, else the fp32 one: every decision is fp32's."""

    CLEARLY = 0.3
    """Three times the largest difference of the two copies' logits on these networks (0.05 and 0.11)."""

    def __init__(self, exact: nn.Module, quick: nn.Module) -> None:
        super().__init__()
        self.exact, self.quick = exact, quick

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.quick(images).float()
        top = logits.detach().topk(2, 1).values
        doubtful = (top[:, 0] - top[:, 1] < self.CLEARLY).nonzero()[:, 0]
        return logits.index_copy(0, doubtful, self.exact(images[doubtful])) if len(doubtful) else logits


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators that peers draw from start at ``seed``; after, they are as before."""
    state = np.random.get_state()  # noqa: NPY002 (ART draws from the global one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


# --- adapters: adversarial images, wherever an attack ended ----------------------------------------------------------


def _ours(job: Job, attack: str) -> Tensor:
    """As ``coldforge evaluate`` does it: images that are wrong when clean are not attacked, the search runs on a fast
    copy (in bf16 where it is helped, which is what coldforge does on such a CPU), and every success is verified.
    """
    target = Target(job.exact.network)
    precision: Precision = "bf16" if job.model is not job.exact and has_bf16() else "fp32"
    standing = (target.answers(job.images) == job.labels).nonzero()[:, 0]
    job.exact.forwards += len(job.images)
    adversarial = job.images.clone()
    for part in as_parts(parse_attack(attack)):
        images, labels = job.images[standing], job.labels[standing]
        found = find_adversarial(target, part, images, labels, job.threat_model, seed=job.seed, precision=precision)
        adversarial[standing] = found.adversarial
        standing = standing[~found.fooled]
        queries = int(found.queries.sum())
        job.exact.forwards += queries
        job.exact.backwards += queries if part.uses_gradients else 0
    return adversarial


@functools.cache
def reference_module(clone: str = "") -> ModuleType:
    """``pyautoattack``, or ``autoattack`` from a clone's folder."""
    if not clone:
        return importlib.import_module("pyautoattack")
    if not Path(clone, "autoattack", "__init__.py").is_file():
        raise SystemExit(f"--reference: expected a checkout of fra31/auto-attack, found no autoattack/ in {clone}")
    sys.path.insert(0, str(Path(clone).resolve()))  # it imports itself by its absolute name
    return importlib.import_module("autoattack")


def _reference(job: Job, attack: str) -> Tensor:
    """As the standard ensemble calls its parts: without gradients around them, one start, 9 targets."""
    package = reference_module(job.reference).__name__
    parts = {part: importlib.import_module(f"{package}.{part}") for part in ("autopgd_base", "fab_pt", "square")}
    common = {"norm": "Linf", "eps": job.threat_model.eps, "seed": job.seed, "device": "cpu"}
    runs = {"n_iter": 100, "n_restarts": 1}
    targets = min(9, job.classes - 1)
    silent = SimpleNamespace(log=lambda _: None, warning=lambda _: None)
    peer: Any
    match attack:
        case "apgd-ce":
            peer = parts["autopgd_base"].APGDAttack(job.model, loss="ce", logger=silent, **runs, **common)
        case "apgd-t":
            peer = parts["autopgd_base"].APGDAttack_targeted(
                job.model, n_target_classes=targets, logger=silent, **runs, **common
            )
        case "fab-t":
            peer = parts["fab_pt"].FABAttack_PT(job.model, targeted=True, n_target_classes=targets, **runs, **common)
        case "square":
            peer = parts["square"].SquareAttack(job.model, n_queries=5000, resc_schedule=False, **common)
        case _:
            return _reference_ensemble(job, package, common)
    with torch.no_grad():
        return torch.cat([peer.perturb(images, labels) for images, labels in job.batches()])


def _reference_ensemble(job: Job, package: str, common: dict[str, Any]) -> Tensor:
    ensemble = importlib.import_module(package).AutoAttack
    if package == "autoattack":
        found: Tensor = ensemble(job.model, verbose=False, **common).run_standard_evaluation(
            job.images, job.labels, bs=job.batch
        )
        return found
    found, _ = ensemble(job.model, **common).run_standard_evaluation(job.images, job.labels, batch_size=job.batch)
    return found


def _torchattacks(job: Job, attack: str) -> Tensor:
    import torchattacks

    eps, classes = job.threat_model.eps, {"n_classes": job.classes}
    common = {"eps": eps, "seed": job.seed}
    match attack:
        case "pgd-20":
            peer = torchattacks.PGD(job.model, eps=eps, alpha=2.5 * eps / 20, steps=20)
        case "apgd-ce":
            peer = torchattacks.APGD(job.model, steps=100, **common)
        case "apgd-t":
            peer = torchattacks.APGDT(job.model, steps=100, **classes, **common)
        case "fab-t":
            peer = torchattacks.FAB(job.model, steps=100, multi_targeted=True, **classes, **common)
        case "square":
            peer = torchattacks.Square(job.model, n_queries=5000, **common)
        case _:
            peer = torchattacks.AutoAttack(job.model, **classes, **common)
    return torch.cat([peer(images, labels) for images, labels in job.batches()])


def _art(job: Job, attack: str) -> Tensor:
    from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, ProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    eps, batch = job.threat_model.eps, {"batch_size": job.batch}
    classifier = PyTorchClassifier(
        job.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(job.images.shape[1:]),
        nb_classes=job.classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    peer: Any
    match attack:
        case "pgd-20":
            peer = ProjectedGradientDescent(
                classifier, eps=eps, eps_step=2.5 * eps / 20, max_iter=20, num_random_init=1, verbose=False, **batch
            )
        case "apgd-ce":
            peer = AutoProjectedGradientDescent(
                classifier,
                eps=eps,
                eps_step=2 * eps,
                max_iter=100,
                nb_random_init=1,
                loss_type="cross_entropy",
                verbose=False,
                **batch,
            )
        case "square":
            peer = SquareAttack(classifier, eps=eps, max_iter=5000, verbose=False, **batch)
        case _:
            peer = AutoAttack(classifier, eps=eps, **batch)
            for part in peer.attacks:
                part.verbose = False
    return torch.from_numpy(peer.generate(job.images.numpy().copy(), job.labels.numpy()))


def _foolbox(job: Job, attack: str) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(job.model.eval(), bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 20, steps=20, random_start=True)
    return torch.cat(
        [peer(model, images, labels, epsilons=job.threat_model.eps)[1] for images, labels in job.batches()]
    )


_MODULES = {
    "torchattacks": ("torchattacks",),
    "art": ("art.attacks.evasion", "art.estimators.classification"),
    "foolbox": ("foolbox",),
}
_ADAPTERS = {"ours": _ours, "reference": _reference, "torchattacks": _torchattacks, "art": _art, "foolbox": _foolbox}
