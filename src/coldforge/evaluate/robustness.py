"""Clean and robust accuracy of a network or a deployed file, with a ledger of every image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coldforge.attacks import Attack, AttackResult, Ensemble, ThreatModel, as_parts, predict, untouched
from coldforge.attacks.ensemble import merge
from coldforge.compress import attacking, network_digest
from coldforge.data import ImageSet
from coldforge.errors import AttackError
from coldforge.evaluate.crew import attack_all
from coldforge.evaluate.fast import Precision
from coldforge.evaluate.ledger import Journal, Ledger, Row
from coldforge.evaluate.target import TRANSFER, Target, Way, Ways
from coldforge.models.checks import refuse_probabilities
from coldforge.spec import spec_hash

_ALIKE_IMAGES = 128
_FLUSH_SECONDS = 1.0

Try = tuple[str, Attack, Way]
"""Column of the ledger, attack, and how it is run."""


def evaluate(
    target: Target,
    data: ImageSet,
    attacks: Sequence[Attack | Ensemble],
    threat_model: ThreatModel,
    *,
    n: int = 0,
    seed: int = 0,
    precision: Precision = "exact",
    transfer: bool = True,
    budget_s: float = 0.0,
    refuse: bool = True,
    checkpoint: Path | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Ledger:
    """Clean verdicts on all of ``data``, and every attack on its first ``n`` images.

    An image draws the same random numbers wherever it stands: they are named by its pixels (:func:`names_of`).

    Each attack gets a column of its own, so that accuracies under single attacks can be compared; the parts of an
    ensemble share one and are run on what the parts before them left. On a quantized network each is tried with both
    kinds of gradients (:data:`BACKWARDS`); images that fool its float twin, or a surrogate, are a further column.

    Args:
        target: network or file; with a file every verdict is the file's, and searching goes on until it falls.
        data: test images.
        attacks: each is run on every attacked image that is right when clean.
        threat_model: ball and box.
        n: how many images to attack; 0: all.
        seed: seed of the random draws.
        precision: how attacks search; whatever it is, every success is verified in float32 or on the file.
        transfer: also try the images that fool the float twin and the surrogates.
        budget_s: stop attacking after so many seconds, those that ``checkpoint`` knows of included; 0: never. What was
            not finished counts as standing, and ``Ledger.unfinished`` says how much that is.
        refuse: refuse probabilities; False: whatever the network answers, its answers are taken for logits.
        checkpoint: a file in which an evaluation that was killed finds what it knew; the caller deletes it.
        on_progress: called with the finished fraction and the name of the attack.

    Returns:
        The ledger. The networks are left as they were.

    Raises:
        AttackError: no images, or an attack that this target or threat model does not allow.
        ModelError: the network, the file or a surrogate returns probabilities, and ``refuse`` is set.
    """
    if len(data) == 0:
        raise AttackError("expected test images, got none")
    images, labels = data.pixels(), data.labels
    count = min(n, len(data)) if n else len(data)
    some, names = _some(images), names_of(images[:count])
    if refuse:
        _refuse_probabilities(target, some)
    ledger = Ledger(labels, target.answers(images), seed=seed)
    cheapest_first = sorted(attacks, key=lambda attack: attack.passes(len(data.classes)))  # a budget misses the dearest
    tries = _plan(Ways(target, some, precision), cheapest_first, threat_model, transfer)
    key = "" if checkpoint is None else _key(target, some, [data.fingerprint, ledger.answers, count, seed, precision])
    journal = Journal(checkpoint, spec_hash(key, str(threat_model), [(c, a.describe(), w.label) for c, a, w in tries]))
    deadline = time.monotonic() + budget_s - journal.spent if budget_s else float("inf")
    for number, (column, attack, way) in enumerate(tries):
        if column not in ledger.fooled:
            ledger.open(column, count)

        def report(fraction: float, number: int = number, name: str = column) -> None:
            if on_progress is not None:
                on_progress((number + fraction) / len(tries), name)

        rest = [later for name, _, later in tries[number + 1 :] if name == column]
        _run(ledger, column, attack, way, images, names, threat_model, journal, report, deadline, rest)
        report(1.0)
    journal.flush()
    return ledger


def find_adversarial(
    target: Target,
    attack: Attack | Ensemble,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    indices: Tensor | None = None,
    precision: Precision = "exact",
) -> AttackResult:
    """The adversarial images themselves: one attack in all the ways in which :func:`evaluate` runs it.

    Args:
        target: network or file.
        attack: what to run.
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)``.
        threat_model: ball and box.
        seed: seed of the random draws.
        indices: what the images are called, ``(N,)``; default: as in :func:`evaluate`, :func:`names_of` them.
        precision: how to search; successes are verified.

    Returns:
        As of :meth:`Attack.__call__`; ``part`` counts the tries.
    """
    names = names_of(images) if indices is None else indices
    result: AttackResult | None = None
    tries = _plan(Ways(target, _some(images), precision), [attack], threat_model, transfer=False)
    for number, (_, part, way) in enumerate(tries):
        rows = torch.arange(len(images))
        if result is not None:
            rows = (~result.fooled & way.is_worth_it(result.margin)).nonzero()[:, 0]
        with way.context():
            found = attack_all(
                part,
                way.model,
                images[rows],
                labels[rows],
                threat_model,
                seed=seed,
                indices=names[rows],
                judge=way.judge,
            )
        result = found if result is None else merge(result, found, rows, number)
    assert result is not None
    return result


def names_of(images: Tensor) -> Tensor:
    """What images ``(N, C, H, W)`` in [0, 1] are called, int64 ``(N,)``: a hash of their 8-bit pixels, below 2**60."""
    rows = (images * 255).round().to(torch.uint8).flatten(1).numpy()
    return torch.tensor([int(hashlib.sha256(row.tobytes()).hexdigest()[:15], 16) for row in rows], dtype=torch.int64)


def _refuse_probabilities(target: Target, some: Tensor) -> None:
    for network in (target.network, *target.surrogates.values()):
        if network is not None:
            with torch.random.fork_rng(devices=[]), attacking(network), untouched(network):
                refuse_probabilities(predict(network, some))
    if target.file is not None:
        refuse_probabilities(predict(target.file.logits, some))


def _key(target: Target, some: Tensor, rest: list[object]) -> str:
    """Names an evaluation, so that what is known of another is never taken for its own: data, settings, and what is
    attacked. A file, of which only its answers are known, is named by its logits on ``some`` images.
    """
    networks = [target.network, *target.surrogates.values()]
    digests = [network_digest(network) for network in networks if network is not None]
    answers = [] if target.file is None else target.file.logits(some).tolist()
    rest = [value.tolist() if isinstance(value, Tensor) else value for value in rest]
    return spec_hash(digests, answers, list(target.surrogates), rest)


def _some(images: Tensor) -> Tensor:
    """Some of the images, the same ones in whatever order they come."""
    key = 255 * images.double().sum((1, 2, 3)) % 97
    chosen = images[key <= key.sort().values[:_ALIKE_IMAGES][-1:]]  # more, where several are as bright as the last
    return chosen[names_of(chosen).argsort()[:_ALIKE_IMAGES]]


def _plan(ways: Ways, attacks: Sequence[Attack | Ensemble], threat_model: ThreatModel, transfer: bool) -> list[Try]:
    for attack in attacks:
        attack.check(threat_model)
    plan = [(whole.name, part, way) for whole in attacks for part in as_parts(whole) for way in ways.of(part)]
    if transfer and attacks:
        attack, sources = ways.transfer()
        plan += [(TRANSFER, attack, way) for way in sources]
    return plan


def _run(
    ledger: Ledger,
    column: str,
    attack: Attack,
    way: Way,
    images: Tensor,
    names: Tensor,
    threat_model: ThreatModel,
    journal: Journal,
    report: Callable[[float], None],
    deadline: float,
    rest: Sequence[Way],
) -> None:
    """One try on the images that still stand; ``rest`` are the tries of the same attack that follow."""
    what = f"{column}/{attack.name}/{way.label}"
    by = " ".join(filter(None, [attack.name if attack.name != column else "", way.label])) or attack.name
    standing = (~ledger.fooled[column] & way.is_worth_it(ledger.margin[column])).nonzero()[:, 0]
    known = journal.found(what)

    def enter(image: int, row: Row) -> None:
        margin = ledger.least_margin(column, image, row)
        last = not any(bool(later.is_worth_it(margin)) for later in rest)
        ledger.enter(column, image, row, by, last=last)

    for image in standing.tolist():
        if image in known:
            enter(image, known[image])
    left = standing[[image not in known for image in standing.tolist()]] if known else standing
    if not len(left):
        return
    clean = images[left]
    flushed = time.monotonic()

    def enter_all(result: AttackResult, positions: list[int], fooled_8bit: list[bool]) -> None:
        norms = threat_model.size(result.adversarial[positions] - clean[positions]).tolist()
        for position, norm, in_8_bits in zip(positions, norms, fooled_8bit, strict=True):
            row, image = Row.of(result, position, norm, in_8_bits), int(left[position])
            enter(image, row)
            journal.add(what, image, row)

    def keep(result: AttackResult, positions: list[int]) -> None:
        """What stands took longest, and is kept at once."""
        nonlocal flushed
        standing = [position for position in positions if not result.fooled[position]]
        enter_all(result, standing, [False] * len(standing))
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            flushed = time.monotonic()
            journal.flush()

    with way.context():
        result = attack_all(
            attack,
            way.model,
            clean,
            ledger.labels[left],
            threat_model,
            seed=ledger.seed,
            indices=names[left],
            judge=way.judge,
            on_progress=report,
            on_done=keep,
            stop=lambda: time.monotonic() > deadline,
        )
        fooled = result.fooled.nonzero()[:, 0].tolist()
        threat_model.verify(result.adversarial[fooled], clean[fooled])  # apart from the code that found them
        enter_all(result, fooled, _fools_in_8_bits(result, fooled, clean, ledger.labels[left], way, threat_model))
    journal.flush()


def _fools_in_8_bits(
    result: AttackResult, rows: list[int], clean: Tensor, labels: Tensor, way: Way, threat_model: ThreatModel
) -> list[bool]:
    """Whether what was found still fools with 8-bit pixels. Asked when the search is over: nothing else may ask the
    network, and what it draws must not be moved by the clock.
    """
    if not rows:
        return []
    points = threat_model.rounded(result.adversarial[rows], clean[rows])
    with torch.random.fork_rng(devices=[]):
        wrong = way.labels(points) != labels[rows]
    inside: list[bool] = (wrong & threat_model.contains(points, clean[rows])).tolist()
    return inside
