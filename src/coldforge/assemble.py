"""From finished stages to the record, and to the folder that a user takes away."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from coldforge._version import __version__
from coldforge.attacks import as_parts, parse_attack
from coldforge.errors import StoreError, UsageError
from coldforge.evaluate import BACKWARDS, TRANSFER, TRANSFER_ATTACK, Ledger, ledger_check
from coldforge.models import channels_last
from coldforge.provenance import provenance
from coldforge.recipe import to_toml
from coldforge.records import (
    LEAST_AGREEMENT,
    AgreementRecord,
    CurvePoint,
    LatencyRecord,
    MaskingRecord,
    PruningRatioRecord,
    Record,
    StageName,
    StageRecord,
    ThreatModelRecord,
    load_record,
)
from coldforge.sealed import write_atomic
from coldforge.stages import ONNX_FILE, Arrow, Shop, Stage, joined_outcomes

UNFINISHED = ".unfinished"
"""In the folder of a run until it is finished."""

UNASKED = "no attack searched on the file itself (evaluate.attacks holds no square): its worst case is without one"
"""Of an artifact that was only shown what attacks with gradients found elsewhere."""

LABELS: dict[str, tuple[StageName, str]] = {
    "baseline": ("baseline", "baseline"),
    "compressed": ("compressed", "compressed, not tuned"),
    "tuned: natural": ("tuned", "naturally tuned"),
    "tuned: adversarial": ("tuned", "adversarially tuned"),
    "artifact": ("artifact", "artifact (model.onnx)"),
    "control": ("control", "control: small network from scratch, adversarial"),
    "reference": ("reference", "reference: dense network, adversarial"),
}
"""Row to name and label in the record, in the order of the table."""


def record(shop: Shop, made: Arrow, command: str = "") -> Record:
    """Put together what the stages found."""
    recipe, threat = shop.recipe, shop.recipe.threat_model
    file = made.files[made.artifact]
    origin = provenance(
        recipe.seed,
        command,
        data={
            "name": shop.evaluated.name,
            "fingerprint": shop.data.fingerprint,
            "train": len(shop.data.train),
            "validation": len(shop.data.validation),
            "test": len(shop.data.test),
        },
        classes=list(shop.data.classes),
        stage_keys={f"{stage.kind} {stage.label}": stage.key for stage in made},
        attacks={
            name: parse_attack(name).describe() | {"gradients_of_quantized_networks": list(BACKWARDS)}
            for name in recipe.evaluate.attacks
        }
        | ({TRANSFER: parse_attack(TRANSFER_ATTACK).describe()} if recipe.quantize.enabled else {}),
        artifact_sha256=shop.result(file)["sha256"],
        integer_kernels=shop.result(made.evidence["agree"])["integer_kernels"],
        parent_size_bytes=shop.result(made.files["parent"])["size_bytes"],
    )
    return Record(
        coldforge_version=__version__,
        recipe=recipe.model_dump(mode="json"),
        provenance=origin,
        threat_model=ThreatModelRecord(
            norm=threat.norm, eps=threat.eps, eps_255=threat.eps * 255, box=not threat.literal
        ),
        stages=tuple(_row(shop, made, row) for row in LABELS if f"evaluate: {row}" in made.evidence),
    )


def _row(shop: Shop, made: Arrow, row: str) -> StageRecord:
    name, label = LABELS[row]
    cost = shop.result(made.files[made.artifact if row == "artifact" else row])
    cost = {key: value for key, value in cost.items() if key != "sha256"}
    way = _trained(shop, made, row)
    told = {  # by rows of their own
        name
        for each in way
        if each != row and f"evaluate: {each}" in made.evidence
        for name in _trained(shop, made, each)
    }
    outcomes = {each: shop.result(network) for each, network in way.items()}
    if row != "reference" and "reference" in outcomes:  # a teacher: its cost, and not its curve
        outcomes["reference"] |= {"curve": [], "notes": []}
    trained = joined_outcomes([outcome for each, outcome in outcomes.items() if outcome and each not in told])
    timed = made.evidence.get("measure")
    measured = {"latency": {}, "energy": {}} if timed is None else shop.result(timed)
    energy = measured["energy"].get(row, {})
    # what a reader must know of a network, he must know of what was made from it
    notes = [note for outcome in outcomes.values() for note in outcome.get("notes", [])]
    attacks = [parse_attack(name) for name in shop.recipe.evaluate.attacks]
    agreed: AgreementRecord | None = None
    if row == "artifact":
        found = shop.result(made.evidence["agree"])
        agreed = AgreementRecord(clean=found["clean"], adversarial=found["adversarial"])
        if all(part.uses_gradients for attack in attacks for part in as_parts(attack)):
            notes.append(UNASKED)
        notes += _warnings(cost, found, reduced=shop.recipe.deploy.reduce_range)
    evaluated = made.evidence[f"evaluate: {row}"]
    checked = made.evidence.get(f"masking: {row}")
    masking = MaskingRecord() if checked is None else MaskingRecord.model_validate(shop.result(checked))
    ledger = Ledger.read(shop.folder(evaluated) / "ledger.parquet")
    masking = masking.and_also(ledger_check(ledger, attacks))
    return StageRecord(
        name=name,
        label=label,
        **{**cost, "pruning_ratio": PruningRatioRecord(**cost["pruning_ratio"])},
        **shop.result(evaluated),
        masking=masking,
        latency_s=tuple(LatencyRecord(**timing) for timing in measured["latency"].get(row, [])),
        energy_j_per_image=energy.get("joules_per_image"),
        energy_method=energy.get("method", ""),
        train_seconds=trained["train_seconds"],
        train_macs=trained["train_macs"],
        curve=tuple(CurvePoint(**point) for point in trained["curve"]),
        agreement=agreed,
        notes=tuple(notes),
    )


def _trained(shop: Shop, made: Arrow, row: str) -> dict[str, Stage]:
    """Row to the network whose training it tells of: of this one, and of those before it on the way from the baseline
    (the parent may have been trained, hardened or between steps of pruning), and of a teacher that was trained for it.
    """
    source = made.artifact if row == "artifact" else row
    if row in ("baseline", "reference", "control"):
        return {row: made.networks[row]}
    finetune = shop.recipe.finetune
    taught = source == "tuned: adversarial" and (finetune.objective, finetune.teacher) == ("distill", "reference")
    before = {"compressed": made.networks["parent"]} | ({"reference": made.networks["reference"]} if taught else {})
    return before if source == "compressed" else before | {source: made.networks[source]}


def _warnings(cost: dict[str, Any], agreed: dict[str, Any], *, reduced: bool) -> list[str]:
    notes = []
    for part in ("clean", "adversarial"):
        if agreed[part] < LEAST_AGREEMENT:
            notes.append(
                f"the file and its twin agree on only {agreed[part]:.2%} of the {part} labels "
                f"(expected at least {LEAST_AGREEMENT:.1%})"
            )
    if cost["weight_bits"] <= 8 and not agreed["integer_kernels"]:
        notes.append("the runtime computes part of this file in floating point: it will be slower than it could be")
    if agreed["saturates"] and cost["weight_bits"] <= 8 and not reduced:
        notes.append(
            "this CPU's 8-bit kernels saturate (no VNNI): the file may answer differently here; "
            "deploy.reduce_range = true trains and exports 7-bit weights, which cannot"
        )
    if cost["weight_bits"] < 8 or cost["activation_bits"] < 8:
        notes.append("bits below 8 are stored as clipped 8-bit values: no speed is claimed for them")
    return notes


def check_writable(out: Path) -> None:
    """Make the folder now, so that a run of an hour does not fail at its end.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(f"expected a folder to write results into, cannot write {out}: {error.strerror}") from None


def begin_folder(shop: Shop, made: Arrow, out: Path) -> None:
    """Make the folder; from now on the store keeps what this run needs, so that it can go on after an interruption.

    Raises:
        StoreError: the folder cannot be written.
    """
    check_writable(out)
    if (out / "record.json").is_file():
        with contextlib.suppress(UsageError):  # of an older coldforge
            if load_record(out).recipe != shop.recipe.model_dump(mode="json"):
                shop.progress.note(f"{out} holds a run with other settings, which this one replaces; --out keeps both")
    try:
        write_atomic(out / UNFINISHED, "The run that writes into this folder is not finished; start it again.\n")
    except OSError as error:
        raise StoreError(f"cannot write into {out}: {error.strerror or error}") from error
    shop.store.register(out / UNFINISHED, [stage.key for stage in made])


def write_folder(shop: Shop, made: Arrow, record: Record, out: Path) -> None:
    """Write record.json, recipe.toml, model.onnx, model/ and what the report and ``verify`` need; the record last."""
    network = shop.folder(made.networks[made.artifact])
    try:
        for stale in ("record.json", "report.html"):  # a kill must not leave them beside a new model
            (out / stale).unlink(missing_ok=True)
        (out / "model").mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "structure.json"):
            _copy(network / name, out / "model" / name)
        _copy(shop.folder(made.files[made.artifact]) / ONNX_FILE, out / ONNX_FILE)
        _copy(shop.folder(made.evidence["agree"]) / "probe.safetensors", out / "probe.safetensors")
        _copy(shop.folder(made.evidence["gallery"]) / "gallery.safetensors", out / "gallery.safetensors")
        _copy(shop.folder(made.evidence["evaluate: artifact"]) / "ledger.parquet", out / "ledger.parquet")
        write_atomic(out / "recipe.toml", to_toml(shop.recipe))
        write_atomic(out / "record.json", record.to_json())
    except OSError as error:
        raise StoreError(f"cannot write the results into {out}: {error.strerror or error}") from error
    shop.store.register(out / "record.json", [stage.key for stage in made])
    (out / UNFINISHED).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def macs_per_second(shop: Shop) -> float:
    """Multiply-adds a second of training on this machine, from a moment of forward and backward passes."""
    network = channels_last(shop.source.build(0))
    images = torch.zeros(64, *shop.data.image_shape)
    begin, passes = time.monotonic(), 0
    while passes < 2 or time.monotonic() - begin < 0.3:
        if passes == 1:
            begin = time.monotonic()  # the first pass warms up
        with torch.autocast("cpu", enabled=shop.recipe.compute.precision == "bf16"):
            network(images).sum().backward()
        passes += 1
    return (passes - 1) * len(images) * 3 * shop.dense_macs() / (time.monotonic() - begin)
