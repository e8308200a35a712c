"""Stages that find out about a network or a file: export, evaluate, agree, gallery, measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from coldforge.attacks import parse_attack, parse_pgd, predict
from coldforge.compress import load_network, weight_bit_widths
from coldforge.deploy import OnnxSession, export_onnx, int8_saturates, open_session, write_probe
from coldforge.evaluate import Precision, Target, ask_both, find_adversarial, masking_panel, summarize
from coldforge.evaluate import evaluate as evaluate_network
from coldforge.measure import count_macs, count_params, energy_per_image, measure_latency, packed_bytes
from coldforge.provenance import hardware_fingerprint, versions
from coldforge.sealed import sha256_of, write_atomic
from coldforge.stages.shop import Report, Shop, Stage, write_json

ONNX_FILE = "model.onnx"
GALLERY_IMAGES = 8
PROBE_IMAGES = 256
LATENCY_BATCHES = (1, 64)
LATENCY_SECONDS = 1.0
_PGD20 = parse_pgd("pgd-20")
_SEARCH = 3
"""Raised when attacks of the same settings find other points."""
_PANEL_PASSES = 1500
"""Forward passes that the masking panel takes for an image, roughly."""
_PANEL_VERSION = 5
"""Raise it when the panel may judge otherwise: its entries in the store are then not found any more, all others are."""


def export(shop: Shop, network: Stage, what: str) -> Stage:
    """Write a network as ONNX and count its cost."""
    recipe = shop.recipe

    def build(folder: Path, report: Report) -> None:
        model, structure = shop.network(network)
        threat_model = shop.threat_model
        path = folder / ONNX_FILE
        metadata = {
            "recipe": recipe.name,
            "architecture": structure.source,
            "normalization": json.dumps({"mean": structure.mean, "std": structure.std}),
            "threat_model": f"{threat_model.norm} {threat_model.eps:g}",
            "box": "[0, 1]",
        }
        export_onnx(model, path, image_shape=structure.image_shape, classes=structure.classes, metadata=metadata)
        plan, quantization = structure.pruning, structure.quantization
        cost = {
            "params": count_params(model),
            "macs": count_macs(model, structure.image_shape),
            "size_bytes": path.stat().st_size,
            "packed_bytes": packed_bytes(weight_bit_widths(model)),
            "weight_bits": quantization.weight_bits if quantization else 32,
            "activation_bits": quantization.activation_bits if quantization else 32,
            "pruning_ratio": {
                "requested": plan.requested if plan else 0.0,
                "achieved": plan.achieved if plan else 0.0,
            },
            "sha256": sha256_of(path),
        }
        write_json(folder / "result.json", cost)

    spec = [recipe.name, recipe.threat_model, versions().get("onnx", "")]
    return shop.declare("export", f"export: {what}", spec, [network], build, reads="nothing", seconds=2.0)


def evaluate(shop: Shop, network: Stage, what: str, *, parent: Stage, file: Stage | None = None) -> Stage:
    """Accuracy and robustness of a network; with ``file``, of the file that was exported from it.

    The attacks search on the network, which has gradients; with ``file`` every verdict is the file's, an image counts
    as broken only when the file is wrong too, and attacks that need no gradients are run on the file itself. A
    quantized network is also shown the images that fool its float twin and its float ``parent``.
    """
    recipe = shop.recipe
    attacks = [parse_attack(name) for name in recipe.evaluate.attacks]
    transfers = recipe.quantize.enabled and what not in ("baseline", "reference")

    def build(folder: Path, report: Report) -> None:
        model, structure = shop.network(network)
        ledger = evaluate_network(
            Target(model, _session(shop, file), {"its float parent": shop.network(parent)[0]} if transfers else {}),
            shop.evaluated,
            attacks,
            shop.threat_model,
            n=recipe.evaluate.n,
            seed=recipe.seed,
            precision=_precision(shop),
            checkpoint=folder / "checkpoint-ledger.jsonl",
            on_progress=report,
        )
        ledger.write(folder / "ledger.parquet")
        disputed = sum(int(column.sum()) for column in ledger.disputed.values())
        write_json(folder / "result.json", {**summarize(ledger, structure.classes).__dict__, "disputed": disputed})

    inputs = [network] + ([parent] if transfers else []) + ([file] if file is not None else [])
    images = recipe.evaluate.n or len(shop.evaluated)
    macs = shop.dense_macs() if what in ("baseline", "reference") else shop.small_macs()
    broken = 0.3 if "adversarial" not in what and what not in ("artifact", "reference", "control") else 1.0
    classes = len(shop.evaluated.classes)
    passes = sum(attack.passes(classes) for attack in attacks)
    spec: list[object] = [
        [attack.describe() for attack in attacks],
        recipe.threat_model,
        recipe.evaluate.n,
        recipe.seed,
        _SEARCH,
    ]
    if file is not None:
        spec.append(versions().get("onnxruntime", ""))
    return shop.declare(
        "evaluate",
        f"evaluate: {what}",
        spec,
        inputs,
        build,
        reads="evaluated",
        macs=broken * images * macs * passes,
    )


def masking(shop: Shop, network: Stage, what: str, *, parent: Stage, file: Stage) -> Stage:
    """Does the robust accuracy hold: the masking panel on the file and its twin, with images from their ``parent``."""
    recipe = shop.recipe

    def build(folder: Path, report: Report) -> None:
        model, _ = shop.network(network)
        test = shop.evaluated.take(slice(0, recipe.evaluate.masking_n))
        found = masking_panel(
            Target(model, _session(shop, file), {"its float parent": shop.network(parent)[0]}),
            test.pixels(),
            test.labels,
            shop.threat_model,
            seed=recipe.seed,
            on_progress=report,
        )
        write_atomic(folder / "result.json", found.model_dump_json(indent=1) + "\n")

    runtime = versions().get("onnxruntime", "")
    spec = [recipe.threat_model, recipe.evaluate.masking_n, recipe.seed, _SEARCH, runtime, _PANEL_VERSION]
    macs = 4.0 * _PANEL_PASSES * recipe.evaluate.masking_n * shop.small_macs()
    return shop.declare(
        "masking", f"masking panel: {what}", spec, [network, parent, file], build, reads="evaluated", macs=macs
    )


def _session(shop: Shop, file: Stage | None) -> OnnxSession | None:
    """One thread: the threads of a second runtime would spin between its calls and slow the search."""
    return None if file is None else OnnxSession(shop.folder(file) / ONNX_FILE, threads=1)


def _precision(shop: Shop) -> Precision:
    return "bf16" if shop.recipe.compute.precision == "bf16" else "fp32"


def agree(shop: Shop, network: Stage, file: Stage) -> Stage:
    """How often the file answers like its twin: on clean test images, and on the last PGD-20 iterate of each."""
    recipe = shop.recipe

    def build(folder: Path, report: Report) -> None:
        twin, _ = shop.network(network)
        session = OnnxSession(shop.folder(file) / ONNX_FILE, threads=1)
        test, n = shop.evaluated, recipe.evaluate.n or len(shop.evaluated)
        found = ask_both(twin, session, test, shop.threat_model, n=n, seed=recipe.seed, on_progress=report)
        part = slice(0, min(PROBE_IMAGES, len(found.last)))
        write_probe(
            folder / "probe.safetensors",
            images=test.images[part],
            adversarial=found.last[part],
            labels=test.labels[part],
            clean_answer=found.clean_file[part],
            adversarial_answer=found.adversarial_file[part],
        )
        result = found.agreement.model_dump() | {
            "integer_kernels": session.uses_integer_kernels(),
            "saturates": int8_saturates(),
        }
        write_json(folder / "result.json", result)

    images = recipe.evaluate.n or len(shop.evaluated)
    spec = [recipe.threat_model, recipe.evaluate.n, recipe.seed, _SEARCH, versions().get("onnxruntime", "")]
    return shop.declare(
        "agree",
        "agreement of file and twin",
        spec,
        [network, file],
        build,
        reads="evaluated",
        macs=84.0 * images * shop.small_macs(),
    )


def gallery(shop: Shop, networks: Mapping[str, Stage]) -> Stage:
    """A few test images, one a class, attacked on each of ``networks`` (label to stage), to be seen."""

    def build(folder: Path, report: Report) -> None:
        test = shop.evaluated
        firsts = [int((test.labels == label).nonzero()[0, 0]) for label in test.labels.unique().tolist()]
        chosen = torch.tensor(firsts[:GALLERY_IMAGES])
        images, labels = test.pixels(chosen), test.labels[chosen]
        tensors = {"clean": images, "labels": labels}
        for label, stage in networks.items():
            network, _ = shop.network(stage)
            found = find_adversarial(Target(network), _PGD20, images, labels, shop.threat_model, seed=shop.recipe.seed)
            tensors[f"{label}/adversarial"] = found.adversarial
            tensors[f"{label}/clean_answer"] = predict(network, images).argmax(1)
            tensors[f"{label}/adversarial_answer"] = predict(network, found.adversarial).argmax(1)
        write_atomic(folder / "gallery.safetensors", save({name: part.contiguous() for name, part in tensors.items()}))

    spec = [list(networks), shop.recipe.threat_model, shop.recipe.seed, _SEARCH]
    shown = list(networks.values())
    return shop.declare("gallery", "adversarial examples", spec, shown, build, reads="evaluated", seconds=1.0)


def measure(shop: Shop, dense: Stage, files: Mapping[str, Stage]) -> Stage:
    """Latency of the files (label to export stage) and of the dense network in eager PyTorch, in turns in one run, so
    that the ratios hold on a noisy machine; then, one after the other, the energy of the files in the first runtime.
    """
    recipe = shop.recipe
    threads = recipe.compute.threads

    def build(folder: Path, report: Report) -> None:
        sessions = {
            (label, runtime): open_session(shop.folder(stage) / ONNX_FILE, runtime, threads=threads)
            for label, stage in files.items()
            for runtime in recipe.deploy.runtimes
        }
        images = shop.evaluated.pixels(torch.arange(max(LATENCY_BATCHES)) % len(shop.evaluated))
        rows: dict[str, list[dict[str, Any]]] = {label: [] for label in files}
        eager, _ = load_network(shop.folder(dense), shop.live_source)  # contiguous and fp32, as its users run it
        with torch.inference_mode():
            for batch in LATENCY_BATCHES:
                part = images[:batch].contiguous()
                calls = {
                    f"{label}|{runtime}": partial(session.run, part) for (label, runtime), session in sessions.items()
                }
                calls["baseline|pytorch"] = partial(eager, part)
                for name, timing in measure_latency(calls, seconds=LATENCY_SECONDS).items():
                    label, runtime = name.split("|")
                    row = {"runtime": runtime, "batch": batch, "threads": threads}
                    row |= {"median": timing.median, "p10": timing.p10, "p90": timing.p90}
                    rows[label].append(row)
                report(0.4 * (1 + LATENCY_BATCHES.index(batch)), f"batch {batch}")
            energy = {}
            for label in files:
                session = sessions[label, recipe.deploy.runtimes[0]]
                joules, method = energy_per_image(partial(session.run, images), len(images))
                where = f", batches of {len(images)} in {session.runtime}"
                energy[label] = {"joules_per_image": joules, "method": method + where}
        write_json(folder / "result.json", {"latency": rows, "energy": energy})

    spec = [list(files), recipe.deploy.runtimes, hardware_fingerprint(), versions()]
    seconds = len(LATENCY_BATCHES) * LATENCY_SECONDS * 2.2 * (len(files) * len(recipe.deploy.runtimes) + 1) + 4
    inputs = [dense, *files.values()]
    return shop.declare("measure", "latency and energy", spec, inputs, build, reads="evaluated", seconds=seconds)
