"""``coldforge evaluate`` below the command line: what a path names, and the folder that an evaluation leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coldforge.attacks import ThreatModel, predict
from coldforge.compress import Structure, quantize, save_network
from coldforge.data import DataSplits, load_data
from coldforge.deploy import export_onnx
from coldforge.errors import DataError, ModelError, RecipeError, UsageError
from coldforge.evaluate import Ledger
from coldforge.evaluate.crew import workers_of
from coldforge.evaluation import job
from coldforge.evaluation.job import evaluate_path
from coldforge.evaluation.request import Request, parse_duration, parse_numbers
from coldforge.evaluation.subject import load_subject
from coldforge.models import normalized
from coldforge.progress import Progress, Step
from coldforge.recipe import DataSpec, QuantizeSpec, Recipe, ThreatModelSpec, to_toml
from coldforge.records import EvaluationRecord, MaskingCheckRecord, MaskingRecord, Record, load_evaluation
from traces import draw_a_little, traces

DATA = DataSpec(train_n=600, test_n=60)
SETTINGS: dict[str, Any] = {"name": "tiny", "data": DATA, "threat_model": ThreatModelSpec(eps=0.05)}
MEAN, STD = (0.3,), (0.35,)
FACTORY = "a_users_networks:small"
OK = MaskingRecord(
    verdict="ok", checks=(MaskingCheckRecord(name="check", passed=True, value=0.0, threshold=0.1, meaning="fine"),)
)
QUICK: dict[str, Any] = {"attack": ("fgsm,pgd-3", "square-20"), "n": 12, "threads": 1, "precision": "exact"}
CHECKPOINT: dict[str, Any] = {
    "model": FACTORY, "mean": "0.3", "std": "0.35", "data": "fashion-mnist-mini", "eps": "8/255", **QUICK,
}  # fmt: skip


def small(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, num_classes)
    )  # fmt: skip


@dataclass(frozen=True)
class Files:
    """One trained network in every form that can be evaluated."""

    root: Path
    network: nn.Module
    data: DataSplits

    @property
    def folder(self) -> Path:
        return self.root / "run"

    @property
    def checkpoint(self) -> Path:
        return self.root / "network.safetensors"

    @property
    def onnx(self) -> Path:
        return self.root / "float.onnx"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = types.ModuleType("a_users_networks")
    module.small = small  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    data = load_data(DATA)
    torch.manual_seed(0)
    bare = small()
    network = normalized(bare, MEAN, STD)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    images, labels = data.train.pixels(), data.train.labels
    for start in range(0, 60 * 64, 64):
        rows = torch.arange(start, start + 64) % len(labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    made = Files(tmp_path_factory.mktemp("evaluated"), network.eval(), data)
    save_file(bare.state_dict(), made.checkpoint)
    export_onnx(network, made.onnx, image_shape=data.image_shape, classes=data.classes)
    write_run(made.folder, network, data)
    yield made
    del sys.modules[module.__name__]
    torch.set_num_threads(threads)


def changed_run(files: Files, folder: Path, **recipe: Any) -> Path:
    """A copy of the run with another recipe."""
    shutil.copytree(files.folder, folder)
    (folder / "recipe.toml").write_text(to_toml(Recipe(**SETTINGS | recipe)))
    return folder


def write_run(folder: Path, network: nn.Module, data: DataSplits) -> None:
    """What ``coldforge run`` leaves, as far as an evaluation reads it."""
    spec = QuantizeSpec()
    twin = quantize(network, spec, data.train.pixels(slice(0, 128)))
    (folder / "model").mkdir(parents=True)
    structure = Structure(source=FACTORY, image_shape=data.image_shape, classes=data.classes, mean=MEAN, std=STD)
    save_network(folder / "model", twin, structure.rounded(spec))
    export_onnx(twin, folder / "model.onnx", image_shape=data.image_shape, classes=data.classes)
    (folder / "recipe.toml").write_text(to_toml(Recipe(**SETTINGS)))
    stage = {
        "name": "artifact", "label": "artifact", "params": 1, "macs": 1, "size_bytes": 1, "packed_bytes": 1,
        "weight_bits": 8, "activation_bits": 8, "pruning_ratio": {"requested": 0, "achieved": 0}, "n": 1,
        "clean_accuracy": 1, "clean_ci95": [0, 1], "robust_accuracy": {}, "robust_n": {}, "robust_ci95": {},
        "per_class": {},
    }  # fmt: skip
    record = Record.model_validate(
        {
            "coldforge_version": "0.1.0",
            "recipe": {},
            "provenance": {"data": {"fingerprint": data.fingerprint}},
            "threat_model": {"norm": "linf", "eps": 0.05, "eps_255": 12.75, "box": True},
            "stages": [stage],
        }
    )
    (folder / "record.json").write_text(record.to_json())


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A masking panel that answers at once; what it was asked."""
    asked: list[dict[str, Any]] = []

    def fake(target: object, images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel, **more: Any) -> Any:
        asked.append({"target": target, "images": images, "labels": labels, "threat": threat, **more})
        return OK

    monkeypatch.setattr(job, "masking_panel", fake)
    return asked


class Spy(Progress):
    """Remembers, and interrupts where it is told to."""

    def __init__(self, interrupt_at: str = "") -> None:
        self.steps: list[Step] = []
        self.begun: list[str] = []
        self.attacks: list[str] = []
        self.interrupt_at = interrupt_at

    def plan(self, steps: Any) -> None:
        self.steps = list(steps)

    def begin(self, label: str) -> None:
        self.begun.append(label)

    def advance(self, fraction: float, detail: str = "") -> None:
        assert 0 <= fraction <= 1
        if detail not in self.attacks:
            self.attacks.append(detail)
        if self.interrupt_at and detail == self.interrupt_at:
            raise KeyboardInterrupt


# --- what a path names -----------------------------------------------------------------------------------------------


def test_a_folder_of_a_run_is_its_file_judged_with_gradients_of_its_twin(files: Files) -> None:
    subject = load_subject(files.folder, Request(), threads=4)
    assert subject.record.kind == "folder"
    assert subject.record.sha256 == hashlib.sha256((files.folder / "model.onnx").read_bytes()).hexdigest()
    assert (subject.record.weight_bits, subject.record.activation_bits) == (8, 8)
    assert subject.threat_model == ThreatModel("linf", 0.05)
    assert [attack.name for attack in subject.attacks] == ["fgsm", "pgd-20", "autoattack-lite"]
    assert len(subject.data) == 60, "the recipe's test_n"
    images = subject.data.pixels()
    assert subject.target.file is not None
    assert subject.target.network is not None
    assert subject.target.quantized
    assert subject.target.file.threads == 1, "threads of a second runtime would spin beside the search"  # type: ignore[attr-defined]
    same = subject.target.file.labels(images) == predict(subject.target.network, images).argmax(1)
    assert same.double().mean() > 0.95
    assert subject.target.surrogates == {}


def test_an_onnx_file_may_take_normalized_pixels(files: Files, tmp_path: Path) -> None:
    _, bare = files.network.children()
    path = tmp_path / "bare.onnx"
    export_onnx(bare, path, image_shape=files.data.image_shape, classes=files.data.classes)
    request = Request(data=DATA.source, eps="0.05", mean=str(MEAN[0]), std=str(STD[0]))
    subject = load_subject(path, request, threads=1)
    assert f"the file was asked about normalized pixels: mean {MEAN[0]}, std {STD[0]}" in subject.notes
    images = files.data.test.pixels()
    assert subject.target.file is not None
    expected = predict(files.network, images)
    assert torch.allclose(subject.target.file.logits(images), expected, atol=1e-4)
    assert torch.equal(subject.target.file.labels(images), expected.argmax(1))
    plain = load_subject(path, Request(data=DATA.source, eps="0.05"), threads=1)
    assert not torch.allclose(plain.target.file.logits(images), expected, atol=1e-1)  # type: ignore[union-attr]
    beside = Request(data=DATA.source, eps="0.05", mean="0.3", std="0.35", surrogate=files.checkpoint, model=FACTORY)
    with_surrogate = load_subject(files.onnx, beside, threads=1)
    assert not with_surrogate.notes, "there they are the checkpoint's"


def test_options_go_before_the_recipe_of_the_folder(files: Files) -> None:
    request = Request(eps="8/255", data="fashion-mnist-mini", attack=("pgd-5", "fgsm, pgd-5"))
    subject = load_subject(files.folder, request, threads=1)
    assert subject.threat_model == ThreatModel("linf", 8 / 255)
    assert len(subject.data) == 2000
    assert [attack.name for attack in subject.attacks] == ["pgd-5", "fgsm"]


def test_the_literal_threat_model_of_a_recipe_stays_literal(files: Files, tmp_path: Path) -> None:
    run = changed_run(files, tmp_path / "run", threat_model=ThreatModelSpec(eps=0.05, literal=True))
    assert load_subject(run, Request(), threads=1).threat_model == ThreatModel("linf", 0.05, box=False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_is_the_network_with_its_normalization(files: Files, tmp_path: Path, suffix: str) -> None:
    path = files.checkpoint
    if suffix == ".pt":
        path = tmp_path / "network.pt"
        state = files.network.get_submodule("network").state_dict()
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    request = Request(**CHECKPOINT, key_prefix="module." if suffix == ".pt" else "")
    subject = load_subject(path, request, threads=1)
    assert subject.record.kind == "checkpoint"
    assert subject.record.architecture == FACTORY
    assert (subject.record.weight_bits, subject.record.sha256) == (32, hashlib.sha256(path.read_bytes()).hexdigest())
    assert subject.target.file is None
    assert subject.target.network is not None
    images = subject.data.pixels(slice(0, 8))
    torch.testing.assert_close(predict(subject.target.network, images), predict(files.network, images))


def test_a_checkpoint_of_coldforge_brings_its_normalization(files: Files) -> None:
    subject = load_subject(files.folder / "model", Request(data="fashion-mnist-mini", eps="0.05"), threads=1)
    assert (subject.record.kind, subject.record.weight_bits) == ("checkpoint", 8)
    assert subject.target.file is None
    assert subject.target.quantized


def test_a_file_alone_is_a_black_box(files: Files) -> None:
    for path, bits in ((files.onnx, 32), (files.folder / "model.onnx", 8)):
        subject = load_subject(path, Request(data="fashion-mnist-mini", eps="0.05"), threads=2)
        assert subject.target.network is None
        assert [attack.name for attack in subject.attacks] == ["square"]
        assert (subject.record.kind, subject.record.weight_bits) == ("onnx", bits)
        assert subject.target.file is not None
        assert subject.target.file.threads * workers_of(2, 28 * 28) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("surrogate", ["folder", "checkpoint"])
def test_a_surrogate_gives_a_black_box_gradients_and_never_verdicts(files: Files, surrogate: str) -> None:
    options = CHECKPOINT if surrogate == "checkpoint" else {"data": "fashion-mnist-mini", "eps": "0.05"}
    subject = load_subject(files.onnx, Request(**options, surrogate=getattr(files, surrogate)), threads=1)
    assert subject.target.network is None
    assert list(subject.target.surrogates) == ["the surrogate"]
    weights = files.folder / "model" / "model.safetensors" if surrogate == "folder" else files.checkpoint
    assert subject.record.surrogate_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    if surrogate == "folder":
        assert "autoattack-lite" in [attack.name for attack in subject.attacks]


def test_an_architecture_in_memory_must_be_named(files: Files, tmp_path: Path) -> None:
    run = changed_run(files, tmp_path / "run")
    structure = run / "model" / "structure.json"
    structure.write_text(json.dumps(json.loads(structure.read_text()) | {"source": "Sequential"}))
    with pytest.raises(UsageError, match=r"network in memory \(Sequential\).*--model package.module:factory"):
        load_subject(run, Request(), threads=1)
    assert load_subject(run, Request(model=FACTORY), threads=1).record.architecture == FACTORY


def test_other_images_than_those_of_the_run_are_refused(files: Files, tmp_path: Path) -> None:
    run = changed_run(files, tmp_path / "run", data=DataSpec(train_n=600, test_n=59))
    with pytest.raises(DataError, match=r"was made with other images than fashion-mnist-mini gives here.*--data"):
        load_subject(run, Request(), threads=1)


def test_names_of_classes_that_differ_are_noted(files: Files, tmp_path: Path) -> None:
    classes = tuple("abcdefghij")
    export_onnx(files.network, tmp_path / "other.onnx", image_shape=files.data.image_shape, classes=classes)
    subject = load_subject(tmp_path / "other.onnx", Request(data="fashion-mnist-mini", eps="0.1"), threads=1)
    assert "matched by their order" in " ".join(subject.notes)


# --- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nothing", {}, r"found nothing at .*nothing"),
        ("empty", {}, r"found nothing of the kind in the folder .*empty"),
        ("half", {}, r"expected the whole folder that `coldforge run` wrote, missing record.json, model.onnx, model"),
        ("words.txt", {}, r"expected a folder that `coldforge run` wrote, an .onnx file, .*; got .*words.txt"),
        ("float.onnx", {"data": "fashion-mnist-mini"}, "--eps: expected the radius"),
        ("float.onnx", {"eps": "0.1"}, "--data: expected test images, got none"),
        ("float.onnx", {"eps": "8"}, r"--eps: .*did you mean 8/255\?"),
        ("float.onnx", {"eps": "wide"}, "--eps: .*got 'wide'"),
        ("float.onnx", {"eps": "0"}, "--eps: expected a number above 0, got 0"),
        ("float.onnx", {"eps": "0.1", "model": FACTORY}, "holds its own architecture"),
        (
            "float.onnx",
            {"eps": "0.1", "mean": "0", "data": "fashion-mnist-mini"},
            "--mean and --std: expected both or none of them, got one",
        ),
        ("float.onnx", {"eps": "0.1", "key_prefix": "a."}, "--key-prefix is for checkpoint files.*, got a onnx"),
        ("run", {"std": "1"}, "--std is for checkpoint files"),
        ("run", {"norm": "l2"}, r"--eps: expected the radius of the attacks \(l2"),
        ("run", {"surrogate": "float.onnx"}, "--surrogate: expected a network with gradients, got the file"),
        ("network.safetensors", {**CHECKPOINT, "model": None}, "--model: expected the architecture"),
        ("network.safetensors", {**CHECKPOINT, "mean": None}, "--mean and --std: expected the normalization"),
        ("network.safetensors", {**CHECKPOINT, "mean": "0,0,0"}, "--mean: expected 1 numbers, one a channel"),
        ("network.safetensors", {**CHECKPOINT, "std": "one"}, "--std: expected numbers .* got 'one'"),
    ],
)
def test_a_wrong_call_says_what_to_do(files: Files, path: str, options: dict[str, Any], message: str) -> None:
    (files.root / "empty").mkdir(exist_ok=True)
    (files.root / "half").mkdir(exist_ok=True)
    (files.root / "half" / "recipe.toml").write_text("")
    (files.root / "words.txt").write_text("")
    if "surrogate" in options:
        options = {"surrogate": files.root / options["surrogate"]}
    with pytest.raises(UsageError, match=message):
        load_subject(files.root / path, Request(**options), threads=1)


@pytest.mark.parametrize("attack", ["fgsm", "autoattack-lite", "square-10,pgd-3"])
def test_gradients_of_a_black_box_are_an_error_that_says_what_to_do(files: Files, attack: str) -> None:
    request = Request(data="fashion-mnist-mini", eps="0.1", attack=(attack,))
    with pytest.raises(UsageError, match=r"needs gradients.*--surrogate.*--attack square"):
        load_subject(files.onnx, request, threads=1)


def test_an_unknown_attack_names_the_nearest(files: Files) -> None:
    with pytest.raises(RecipeError, match="did you mean 'autoattack'"):
        load_subject(files.folder, Request(attack=("autoatack",)), threads=1)


def with_softmax(source: Path, target: Path, *, in_8_bits: bool = False) -> None:
    """The same file, but it returns probabilities; ``in_8_bits``: rounded, as tools write them that quantize it all."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    nodes = [helper.make_node("Softmax", [model.graph.output[0].name], ["probabilities"], axis=1)]
    if in_8_bits:
        grid = [("step", np.float32(1 / 256)), ("zero", np.uint8(0))]
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in grid)
        nodes.append(helper.make_node("QuantizeLinear", ["probabilities", "step", "zero"], ["codes"]))
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["rounded"]))
    model.graph.node.extend(nodes)
    model.graph.output[0].name = nodes[-1].output[0]
    onnx.save(model, str(target))


@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("beside", ["alone", "a surrogate", "its twin"])
def test_pitfall_14_a_file_that_returns_probabilities_is_refused(
    files: Files, tmp_path: Path, beside: str, in_8_bits: bool
) -> None:
    options: dict[str, Any] = {"data": "fashion-mnist-mini", "eps": "0.1", "n": 12, "threads": 1}
    if beside == "its twin":
        path = shutil.copytree(files.folder, tmp_path / "run")
        with_softmax(files.folder / "model.onnx", path / "model.onnx", in_8_bits=in_8_bits)
        options = QUICK
    else:
        path = tmp_path / "softmax.onnx"
        with_softmax(files.onnx, path, in_8_bits=in_8_bits)
        options |= {"surrogate": files.folder, "attack": ("fgsm",)} if beside == "a surrogate" else {}
    with pytest.raises(ModelError, match=f"{path.name} on the images of .*returns probabilities; expected logits"):
        load_subject(path, Request(**options), threads=1)


@pytest.mark.parametrize("what", ["checkpoint", "twin of a file", "surrogate of a file"])
def test_pitfall_14_a_network_that_returns_probabilities_is_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(sys.modules["a_users_networks"], "soft", lambda: small().append(nn.Softmax(1)), raising=False)
    path, options = {
        "checkpoint": (files.checkpoint, CHECKPOINT),
        "twin of a file": (files.folder, QUICK),
        "surrogate of a file": (files.onnx, CHECKPOINT | {"surrogate": files.checkpoint}),
    }[what]
    with pytest.raises(ModelError, match=r"on the images of .*returns probabilities; expected logits"):
        load_subject(path, Request(**options | {"model": "a_users_networks:soft"}), threads=1)
    load_subject(path, Request(**options | {"model": FACTORY}), threads=1)


def test_images_of_another_size_are_refused(files: Files, tmp_path: Path) -> None:
    small_images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    export_onnx(small_images, tmp_path / "8x8.onnx", image_shape=(1, 8, 8), classes=files.data.classes)
    with pytest.raises(ModelError, match=r"8x8.onnx on the images of fashion-mnist-mini test: .*expected shape"):
        load_subject(tmp_path / "8x8.onnx", Request(data="fashion-mnist-mini", eps="0.1"), threads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "--n: expected 0 or more, got -1"),
        ({"threads": -1}, "--threads"),
        ({"masking_n": 0}, "--no-masking skips the checks"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(**options)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("20min", 1200.0), ("90s", 90.0), ("1h", 3600.0), ("1h30min", 5400.0), ("0.5 s", 0.5), ("2m", 120.0)],
)
def test_durations(written: str, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize("written", ["20", "min", "-3s", "1h!", "0s", "1d"])
def test_what_is_no_duration_says_what_is_one(written: str) -> None:
    with pytest.raises(UsageError, match="--budget: expected a time"):
        parse_duration(written)


def test_numbers_of_channels() -> None:
    assert parse_numbers("0.5", 3, "--mean") == (0.5, 0.5, 0.5)
    assert parse_numbers("1/2, 0.25,0", 3, "--mean") == (0.5, 0.25, 0.0)


# --- the evaluation --------------------------------------------------------------------------------------------------


def comparable(record: EvaluationRecord) -> dict[str, Any]:
    """Without what may differ between two runs of the same evaluation."""
    return record.model_dump(exclude={"seconds", "provenance", "budget_s"})


@pytest.mark.parametrize("what", ["folder", "checkpoint", "onnx"])
def test_an_evaluation_leaves_a_record_that_is_its_ledger(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], what: str
) -> None:
    options: dict[str, Any] = CHECKPOINT if what == "checkpoint" else QUICK
    if what == "onnx":
        options = {"data": "fashion-mnist-mini", "eps": "0.1", "n": 12, "threads": 1, "attack": ("square-50",)}
    spy, out = Spy(), tmp_path / "out"
    record = evaluate_path(getattr(files, what), Request(**options), out=out, progress=spy, command="the command")
    assert load_evaluation(out) == record
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "ledger.parquet"]
    assert record.target.kind == what
    assert record.provenance["command"] == "the command"
    assert record.data["fingerprint"] == (files.data if what == "folder" else load_data(DataSpec())).test.fingerprint
    assert (record.n, record.attacked.n) == (60 if what == "folder" else 2000, 12)
    assert record.clean_accuracy > 0.6, "a trained network"
    ledger = pq.read_table(out / "ledger.parquet").to_pydict()
    right = ledger["clean_right"]
    assert record.clean_accuracy == sum(right) / record.n
    assert record.attacked.clean_accuracy == sum(right[:12]) / 12
    standing = list(right[:12])
    assert set(record.attacks) <= set(record.robust_accuracy) - {"worst_case"}
    for name in set(record.robust_accuracy) - {"worst_case"}:
        fooled = ledger[f"{name}:fooled"][:12]
        assert record.robust_accuracy[name] == fooled.count(False) / 12
        assert record.broken[name] == sum(r and f for r, f in zip(right, fooled, strict=False))
        assert sum(record.broken_by[name].values()) == record.broken[name]
        standing = [stands and not wrong for stands, wrong in zip(standing, fooled, strict=True)]
        low, high = record.robust_ci95[name]
        assert low <= record.robust_accuracy[name] <= high
    assert record.robust_accuracy["worst_case"] == sum(standing) / 12
    assert record.broken["worst_case"] == sum(right[:12]) - sum(standing) > 0
    assert (record.unfinished, record.budget_s) == ({}, 0.0)
    comparing = ["file and twin"] if what == "folder" else []
    if comparing:
        assert record.agreement is not None
        assert min(record.agreement.clean, record.agreement.adversarial) > 0.9
    else:
        assert record.agreement is None
    assert [step.label for step in spy.steps] == spy.begun == ["attack", *comparing, "masking checks"]
    assert record.masking == OK
    assert len(panel[0]["images"]) == (60 if what == "folder" else 200)


@pytest.mark.parametrize("what", ["onnx", pytest.param("folder", marks=pytest.mark.slow)])
def test_the_masking_panel_has_the_last_word(files: Files, tmp_path: Path, what: str) -> None:
    options: dict[str, Any] = {"attack": ("square-20",), "n": 12, "threads": 1, "masking_n": 40}
    options |= {"data": "fashion-mnist-mini", "eps": "0.1"} if what == "onnx" else {}
    record = evaluate_path(getattr(files, what), Request(**options), out=tmp_path)
    assert record.masking.verdict in ("ok", "suspect")
    assert len(record.masking.checks) >= (4 if what == "onnx" else 10)
    assert all(check.meaning for check in record.masking.checks)


def test_attacks_are_described_with_version_and_settings(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]]
) -> None:
    record = evaluate_path(files.folder, Request(**QUICK | {"n": 2}), out=tmp_path)
    assert record.attacks["pgd-3"]["steps"] == 3
    assert all(found["version"] >= 1 for found in record.attacks.values())


def test_masking_checks_can_be_skipped_and_the_record_says_so(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]]
) -> None:
    record = evaluate_path(files.folder, Request(**QUICK, no_masking=True), out=tmp_path)
    assert record.masking.verdict == "not_run"
    assert panel == []


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_the_same_call_after_a_kill_continues_and_gives_the_same(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    request = Request(**QUICK | {"precision": precision})
    whole = evaluate_path(files.folder, request, out=tmp_path / "whole")
    spy = Spy(interrupt_at="square-20")
    with pytest.raises(KeyboardInterrupt):
        evaluate_path(files.folder, request, out=tmp_path / "killed", progress=spy)
    (checkpoint,) = (tmp_path / "killed").iterdir()
    known = checkpoint.read_text()
    assert checkpoint.name.startswith("unfinished-")
    assert known.count("pgd-3") >= 12 - round(12 * 0.4), "what was finished is kept"
    seen: list[Path] = []
    evaluate = job.evaluate

    def watched(*arguments: Any, checkpoint: Path, **more: Any) -> Ledger:
        seen.append(checkpoint)
        assert checkpoint.read_text() == known
        return evaluate(*arguments, checkpoint=checkpoint, **more)

    monkeypatch.setattr(job, "evaluate", watched)
    again = evaluate_path(files.folder, request, out=tmp_path / "killed")
    assert seen == [checkpoint]
    assert comparable(again) == comparable(whole)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["evaluation.json", "ledger.parquet"]


def test_another_evaluation_never_continues_a_checkpoint(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    ledger = Ledger(torch.zeros(60, dtype=torch.int64), torch.zeros(60, dtype=torch.int64))
    ledger.open("fgsm", 12)

    def fake(*arguments: Any, checkpoint: Path, **more: Any) -> Ledger:
        seen.append(checkpoint.name)
        return ledger

    monkeypatch.setattr(job, "evaluate", fake)
    first = Request(attack=("fgsm",), n=12, threads=1, precision="exact")
    changes = [
        {}, {"seed": 1}, {"n": 13}, {"eps": "0.04"}, {"attack": ("pgd-3",)}, {"data": "fashion-mnist-mini"},
        {"threads": 2}, {"surrogate": files.folder}, {"precision": "bf16"},
    ]  # fmt: skip
    for change in changes:
        evaluate_path(files.folder, replace(first, **change), out=tmp_path / "out")
    evaluate_path(files.folder / "model", replace(first, eps="0.05", data="fashion-mnist-mini"), out=tmp_path / "out")
    assert len(set(seen)) == len(changes) + 1
    evaluate_path(files.folder, replace(first, budget="1h", no_masking=True), out=tmp_path / "out")
    assert seen[-1] == seen[0], "a longer budget continues"


def test_what_the_budget_did_not_reach_is_counted_and_never_called_broken(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]]
) -> None:
    record = evaluate_path(files.folder, Request(**QUICK, budget="0.0001s"), out=tmp_path)
    right = round(12 * record.attacked.clean_accuracy)
    assert record.budget_s == 0.0001
    assert record.unfinished["pgd-3"] == record.unfinished["fgsm"] == right
    assert set(record.broken.values()) == {0}
    assert record.robust_accuracy["worst_case"] == record.attacked.clean_accuracy


def test_all_images_are_attacked_where_there_are_fewer_or_n_is_0(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]]
) -> None:
    for n in (0, 1000):
        record = evaluate_path(files.folder, Request(attack=("fgsm",), n=n, threads=1), out=tmp_path)
        assert record.attacked.n == record.n == 60


def test_a_clean_accuracy_near_chance_raises_a_doubt(files: Files, tmp_path: Path, panel: list[dict[str, Any]]) -> None:
    torch.manual_seed(1)
    save_file(small().state_dict(), tmp_path / "untrained.safetensors")
    record = evaluate_path(
        tmp_path / "untrained.safetensors", Request(**CHECKPOINT | {"attack": ("fgsm",)}), out=tmp_path / "out"
    )
    assert "hardly above chance" in " ".join(record.notes)


def test_images_that_fooled_only_the_twin_are_counted() -> None:
    ledger = Ledger(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    ledger.open("pgd-3", 4)
    ledger.fooled["pgd-3"][1] = True
    ledger.disputed["pgd-3"][:2] = True
    ledger.open("fgsm", 4)
    assert job._disputed(ledger) == {"pgd-3": 1}


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_pitfall_19_what_a_process_shares_is_left_alone(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], precision: str
) -> None:
    draw_a_little()
    before = traces()
    evaluate_path(files.folder, Request(**QUICK | {"n": 2, "precision": precision}), out=tmp_path)
    assert traces() == before


def test_threads_are_set_for_the_evaluation_only(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(*arguments: Any, **more: Any) -> Ledger:
        assert torch.get_num_threads() == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "evaluate", fake)
    with pytest.raises(KeyboardInterrupt):
        evaluate_path(files.onnx, Request(data="fashion-mnist-mini", eps="0.1", threads=2), out=tmp_path)
    assert torch.get_num_threads() == 1


def test_results_do_not_overwrite_those_of_a_run(files: Files) -> None:
    with pytest.raises(UsageError, match="--out: expected a folder of its own"):
        evaluate_path(files.folder, Request(**QUICK), out=files.folder)


def test_file_and_twin_are_compared_on_the_attacked_images_at_the_front(
    files: Files, tmp_path: Path, panel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    whole = job.ask_both

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return whole(*arguments, **options)

    monkeypatch.setattr(job, "ask_both", watched)
    request = Request(attack=("fgsm",), n=12, threads=1, seed=4, no_masking=True)
    evaluate_path(files.folder, request, out=tmp_path / "all")
    monkeypatch.setattr(job, "AGREEMENT_IMAGES", 5)
    evaluate_path(files.folder, request, out=tmp_path / "few")
    assert [(options["n"], options["seed"]) for options in asked] == [(12, 4), (5, 4)]


def test_the_plan_is_bounded_by_the_budget(files: Files, tmp_path: Path, panel: list[dict[str, Any]]) -> None:
    spy = Spy()
    evaluate_path(files.folder, Request(**QUICK, budget="0.0001s", no_masking=True), out=tmp_path, progress=spy)
    step, comparing = spy.steps
    assert (step.estimate_s, comparing.label) == (0.0001, "file and twin")


def test_load_evaluation_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected an evaluation at .*`coldforge evaluate` writes one"):
        load_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a coldforge evaluation"):
        load_evaluation(tmp_path)
