"""The evaluation itself, and the folder it leaves: evaluation.json and ledger.parquet."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from coldforge._version import __version__
from coldforge.assemble import check_writable
from coldforge.attacks import TILE, WITH_GRADIENT, Classifier, parse_attack, parse_pgd, predict
from coldforge.data import ImageSet
from coldforge.errors import StoreError, UsageError
from coldforge.evaluate import (
    TRANSFER,
    TRANSFER_ATTACK,
    WORST_CASE,
    Ledger,
    Precision,
    ask_both,
    chance_doubt,
    evaluate,
    ledger_check,
    masking_panel,
    summarize,
    wilson_interval,
)
from coldforge.evaluation.request import Request
from coldforge.evaluation.subject import Subject, load_subject
from coldforge.models import torch_threads
from coldforge.progress import Progress, Step
from coldforge.provenance import has_bf16, physical_cores, provenance, versions
from coldforge.records import AgreementRecord, AttackedRecord, EvaluationRecord, MaskingRecord, ThreatModelRecord
from coldforge.sealed import write_atomic
from coldforge.spec import spec_hash

RECORD, LEDGER = "evaluation.json", "ledger.parquet"
ATTACKING, COMPARING, CHECKING = "attack", "file and twin", "masking checks"
AGREEMENT_IMAGES = 1000
"""Attacked images on which the file is compared with its twin."""


def evaluate_path(
    path: Path, request: Request, *, out: Path, progress: Progress | None = None, command: str = ""
) -> EvaluationRecord:
    """Evaluate what ``path`` names, and write the record and the ledger into ``out``.

    The same call again after a kill continues with the image where it stopped.

    Args:
        path: a folder of ``coldforge run``, a checkpoint, or an ONNX file.
        request: the options.
        out: a folder of its own; made if missing.
        progress: told of the stages: attack, comparison of file and twin, masking checks.
        command: the command line, for provenance.

    Returns:
        The record, as written.

    Raises:
        ColdforgeError: the message says what was expected, what was found and what to do.
    """
    progress = progress or Progress()
    begin = time.monotonic()
    threads = request.threads or min(physical_cores(), 8)
    precision: Precision = ("bf16" if has_bf16() else "fp32") if request.precision == "auto" else request.precision
    budget_s = request.budget_s
    with torch_threads(threads):
        subject = load_subject(path, request, threads=threads)
        _prepare(out)
        n = min(request.n, len(subject.data)) if request.n else len(subject.data)
        checkpoint = out / f"unfinished-{_key(subject, request, [n, threads, precision])[:16]}"
        progress.plan(_plan(subject, request, n, budget_s))

        progress.begin(ATTACKING)
        ledger = evaluate(
            subject.target,
            subject.data,
            subject.attacks,
            subject.threat_model,
            n=n,
            seed=request.seed,
            precision=precision,
            budget_s=budget_s,
            checkpoint=checkpoint,
            on_progress=progress.advance,
        )
        progress.end(ATTACKING)
        agreed = _agreement(subject, request, n, progress)
        masking = _masking(subject, request, progress)
        if subject.target.network is not None:
            masking = masking.and_also(ledger_check(ledger, subject.attacks))
    seconds = time.monotonic() - begin
    origin = provenance(request.seed, command, threads=threads, precision=precision)
    record = _record(subject, request, ledger, agreed, masking, origin, seconds)
    _write(out, record, ledger)
    if not ledger.unfinished:  # else a larger budget goes on from there
        for leftover in out.glob(f"{checkpoint.name}*"):
            leftover.unlink()
    return record


def _agreement(subject: Subject, request: Request, n: int, progress: Progress) -> AgreementRecord | None:
    """None: only a file, or only a network."""
    target = subject.target
    if target.file is None or target.network is None:
        return None
    progress.begin(COMPARING)
    found = ask_both(
        target.network,
        target.file,
        subject.data,
        subject.threat_model,
        n=min(n, AGREEMENT_IMAGES),
        seed=request.seed,
        on_progress=progress.advance,
    )
    progress.end(COMPARING)
    return found.agreement


def _masking(subject: Subject, request: Request, progress: Progress) -> MaskingRecord:
    if request.no_masking:
        return MaskingRecord()
    progress.begin(CHECKING)
    part = subject.data.take(slice(request.masking_n))
    masking = masking_panel(
        subject.target,
        part.pixels(),
        part.labels,
        subject.threat_model,
        seed=request.seed,
        on_progress=progress.advance,
    )
    progress.end(CHECKING)
    return masking


def _record(
    subject: Subject,
    request: Request,
    ledger: Ledger,
    agreed: AgreementRecord | None,
    masking: MaskingRecord,
    origin: dict[str, Any],
    seconds: float,
) -> EvaluationRecord:
    threat = subject.threat_model
    robustness = summarize(ledger, subject.data.classes)
    doubt = chance_doubt(robustness.clean_accuracy, len(subject.data.classes))
    return EvaluationRecord(
        coldforge_version=__version__,
        provenance=origin,
        target=subject.record,
        data=subject.data_record,
        threat_model=ThreatModelRecord(norm=threat.norm, eps=threat.eps, eps_255=threat.eps * 255, box=threat.box),
        **vars(robustness),
        attacked=_attacked(ledger),
        broken=_broken(ledger),
        broken_by={name: dict(Counter(filter(None, by))) for name, by in ledger.by.items()},
        disputed=_disputed(ledger),
        agreement=agreed,
        unfinished=ledger.unfinished,
        budget_s=request.budget_s,
        seconds=seconds,
        masking=masking,
        attacks=_described(subject, ledger),
        notes=(*subject.notes, doubt) if doubt else subject.notes,
    )


def _described(subject: Subject, ledger: Ledger) -> dict[str, dict[str, Any]]:
    attacks = {attack.name: attack.describe() for attack in subject.attacks}
    return attacks | ({TRANSFER: parse_attack(TRANSFER_ATTACK).describe()} if TRANSFER in ledger.fooled else {})


def _attacked(ledger: Ledger) -> AttackedRecord:
    n = len(ledger.survived(WORST_CASE))
    right = int(ledger.right[:n].sum())
    return AttackedRecord(n=n, clean_accuracy=right / n, clean_ci95=wilson_interval(right, n))


def _broken(ledger: Ledger) -> dict[str, int]:
    """Images that were right when clean and are wrong under the attack."""
    found = {}
    for name in [*ledger.fooled, WORST_CASE]:
        survived = ledger.survived(name)
        found[name] = int((ledger.right[: len(survived)] & ~survived).sum())
    return found


def _disputed(ledger: Ledger) -> dict[str, int]:
    """Images that fooled only the network on which was searched."""
    counts = {name: int((disputed & ledger.survived(name)).sum()) for name, disputed in ledger.disputed.items()}
    return {name: count for name, count in counts.items() if count}


# --- continuing ------------------------------------------------------------------------------------------------------


def _key(subject: Subject, request: Request, resolved: list[object]) -> str:
    """Names everything that decides the verdicts, so that a checkpoint of another evaluation is never continued."""
    return spec_hash(
        subject.record.model_dump(exclude={"path", "surrogate"}),
        subject.data.fingerprint,
        vars(subject.threat_model),
        {attack.name: attack.describe() for attack in subject.attacks},
        [*resolved, request.seed, request.mean, request.std, request.key_prefix],
        versions(),
    )


# --- the plan --------------------------------------------------------------------------------------------------------

_STANDING = 0.6
"""Part of the images that are attacked to the end, roughly."""
_PASSES_OF_PGD20 = parse_pgd("pgd-20").passes(0)
_PANEL_PASSES = (1500.0, 1100.0)
"""Forward passes of the masking panel for each tile of images, without and with gradients, at most."""


def _plan(subject: Subject, request: Request, n: int, budget_s: float) -> list[Step]:
    seconds = _pass_seconds(subject)
    ways = 2 if subject.target.quantized else 1
    classes = len(subject.data.classes)
    passes = sum(attack.passes(classes) for attack in subject.attacks)
    attacking = seconds * (len(subject.data) / TILE + ways * passes * max(_STANDING * n / TILE, 1.0))
    steps = [Step(ATTACKING, min(attacking, budget_s) if budget_s else attacking)]
    if subject.target.network is not None and subject.target.file is not None:
        compared = _PASSES_OF_PGD20 * min(n, AGREEMENT_IMAGES) + 2 * len(subject.data)
        steps.append(Step(COMPARING, seconds * compared / TILE))
    if not request.no_masking:
        tiles = max(min(request.masking_n, len(subject.data)) / TILE, 1.0)
        blind, seeing = _PANEL_PASSES
        seeing *= ways if subject.target.network is not None else 0
        steps.append(Step(CHECKING, _STANDING * seconds * tiles * (blind + WITH_GRADIENT * seeing)))
    return steps


def _pass_seconds(subject: Subject) -> float:
    target = subject.target
    model = target.network if target.network is not None else target.file.logits if target.file else None
    assert model is not None
    return pass_seconds(model, subject.data)


def pass_seconds(model: Classifier, data: ImageSet) -> float:
    """Time of one forward pass of a tile."""
    images = data.pixels(torch.arange(TILE) % len(data))
    spent = []
    for _ in range(2):  # the first one warms up
        begin = time.monotonic()
        predict(model, images)
        spent.append(time.monotonic() - begin)
    return min(spent)


# --- the folder ------------------------------------------------------------------------------------------------------


def _prepare(out: Path) -> None:
    if (out / "record.json").exists():
        raise UsageError(f"--out: expected a folder of its own, got {out}, which holds a run; leave --out away")
    check_writable(out)


def _write(out: Path, record: EvaluationRecord, ledger: Ledger) -> None:
    """The record last: where it is, the ledger is its own."""
    try:
        for stale in (RECORD, "evaluation.html"):  # a kill must not leave them beside another ledger
            (out / stale).unlink(missing_ok=True)
        write_atomic(out / LEDGER, ledger.write)
        write_atomic(out / RECORD, record.to_json())
    except OSError as error:
        raise StoreError(f"cannot write the results into {out}: {error.strerror or error}") from error
