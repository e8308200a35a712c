import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import coldforge
from coldforge import cli, doctor
from coldforge.cli import main
from coldforge.errors import ColdforgeError, CollapseError, DataError, StoreError
from coldforge.progress import Step
from coldforge.recipe import load_recipe
from coldforge.records import Record, load_record
from coldforge.store import Store, key


def stage(name, label):
    return {
        "name": name,
        "label": label,
        "params": 100,
        "macs": 1000,
        "size_bytes": 400_000,
        "packed_bytes": 100,
        "weight_bits": 8,
        "activation_bits": 8,
        "pruning_ratio": {"requested": 0.5, "achieved": 0.47},
        "n": 10,
        "clean_accuracy": 0.9,
        "clean_ci95": [0.6, 0.98],
        "robust_accuracy": {"pgd-20": 0.5, "worst_case": 0.5},
        "robust_n": {"pgd-20": 10, "worst_case": 10},
        "robust_ci95": {"pgd-20": [0.2, 0.8], "worst_case": [0.2, 0.8]},
        "per_class": {"Bag": {"n": 10, "clean": 0.9, "worst_case": 0.5}},
    }


RECORD = Record.model_validate(
    {
        "coldforge_version": "0.1.0",
        "recipe": {"name": "t"},
        "provenance": {"classes": ["a", "b"]},
        "threat_model": {"norm": "linf", "eps": 0.1, "eps_255": 25.5, "box": True},
        "stages": [stage("baseline", "baseline"), stage("artifact", "artifact")],
    }
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty store and an empty working folder."""
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COLDFORGE_DEBUG", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """Put a module of plain values in place of a heavy one."""

    def replace(name, **values):
        parent = name.rpartition(".")[0]
        if parent in ("coldforge.deploy", "coldforge.measure"):  # or else their __init__ imports torch
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    return replace


@pytest.fixture
def pipeline(fake):
    """A pipeline that writes a record at once; ``calls`` are what it was asked for."""
    calls = []

    def run(recipe, *, out, store, progress, command):
        calls.append(SimpleNamespace(recipe=recipe, out=out, store=store, command=command))
        progress.plan([Step("baseline", 60.0), Step("tune", 0.0, cached=True)])
        progress.begin("baseline")
        progress.end("baseline")
        out.mkdir()
        (out / "record.json").write_text(RECORD.to_json())
        return RECORD

    def plan(recipe, *, store, progress):
        return [Step("baseline", 60.0), Step("tune", 0.0, cached=True)]

    def write_report(record, out, examples=None):
        (out / "report.html").write_text(record.threat_model.norm)
        return out / "report.html"

    fake("coldforge.pipeline", run=run, plan=plan)

    def draw(folder):
        return write_report(load_record(folder), folder)

    fake("coldforge.report.folder", draw=draw, draw_any=draw)
    return calls


# --- help


COMMANDS = [
    "run",
    "report",
    "evaluate",
    "sensitivity",
    "verify",
    "bench",
    "recipes",
    "store",
    "store list",
    "store verify",
    "store prune",
    "doctor",
    "sweep",
    "pick",
    "compare",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"coldforge {command.split()[0]}" in out.split("Example")[1]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert {line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2] != " "} == {
        *(command for command in COMMANDS if " " not in command),
        "--help",
        "--version",
    }


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == coldforge.__version__


# --- run


def test_run_prints_table_headline_and_paths(pipeline, capsys):
    assert main(["run"]) == 0
    out, err = capsys.readouterr()
    (call,) = pipeline
    assert call.recipe == load_recipe("quickstart")
    assert call.out == Path("coldforge-quickstart")
    assert call.store.root == Path(os.environ["COLDFORGE_HOME"])
    assert call.command == "coldforge run quickstart"
    assert "artifact" in out
    assert "clean accuracy" in out.lower()
    assert "coldforge-quickstart/record.json" in out
    assert "coldforge-quickstart/report.html" in out
    assert Path("coldforge-quickstart/report.html").read_text() == "linf"
    assert "about 60 s of computing" in err
    assert "baseline" in err
    assert "of computing" not in out


def test_run_overrides_and_out(pipeline, tmp_path):
    (tmp_path / "r.toml").write_text('name = "mine/odd"\n')
    words = ["run", str(tmp_path / "r.toml"), "--set", "seed=3", "finetune.epochs=5", "--set", "threat_model.eps=8/255"]
    assert main([*words, "--quiet"]) == 0
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    first, second = pipeline
    assert (first.recipe.seed, first.recipe.finetune.epochs, first.recipe.threat_model.eps) == (3, 5, 8 / 255)
    assert first.out == Path("coldforge-mine-odd")
    assert second.out == tmp_path / "o"
    assert first.command.endswith("r.toml --set seed=3 --set finetune.epochs=5 --set threat_model.eps=8/255")


def test_devices_are_keys_of_the_recipe(pipeline, capsys):
    assert main(["run", "--devices", "1", "--num-nodes", "1"]) == 0
    (call,) = pipeline
    assert (call.recipe.compute.devices, call.recipe.compute.num_nodes) == (1, 1)
    assert call.command == "coldforge run quickstart --set compute.devices=1 --set compute.num_nodes=1"
    assert main(["run", "--devices", "2", "--num-nodes", "3"]) == 2
    assert "started by torchrun or srun on every machine" in capsys.readouterr().err
    assert main(["run", "--devices", "0"]) == 2
    assert "compute.devices" in capsys.readouterr().err


def test_run_json_and_quiet(pipeline, capsys):
    assert main(["run", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert Record.model_validate_json(out) == RECORD
    assert err == ""


def test_plan_computes_nothing(pipeline, capsys):
    assert main(["run", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "about 60 s" in out
    assert "in the store" in out
    assert main(["run", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"label": "baseline", "estimate_s": 60.0, "cached": False}
    assert pipeline == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quickstrat"], "did you mean 'quickstart'?"),
        (["run", "--set", "finetune.epoch=5"], "unknown key 'finetune.epoch'; did you mean 'epochs'?"),
        (["run", "--set", "threat_model.eps=8"], "did you mean 8/255?"),
        (["run", "--set", "seed=1", "quickstart"], "got 'quickstart'; write the recipe before --set"),
        (["run", "--sett", "seed=1"], "Did you mean --set?"),
        (["rnu"], 'Did you mean "run"?'),
        (["bench"], "expected at least one ONNX file or folder"),
        (["bench", "no.onnx"], "found nothing at no.onnx"),
        (["bench", "no.onnx", "--batch", "x"], "x"),
        (["report", "nowhere"], "expected a record at nowhere, found nothing"),
        (["verify"], "FOLDER"),
    ],
)
def test_wrong_usage_exits_with_2(words, message, capsys, pipeline):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert pipeline == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("no data; get it there"), 1, "coldforge: error: no data; get it there\n"),
        (CollapseError("it fell"), 1, "coldforge: error: it fell\n"),
        (StoreError("full"), 1, "coldforge: error: full\n"),
        (KeyboardInterrupt(), 130, f"coldforge: {cli.CONTINUE}\n"),
        (
            RuntimeError("bug"),
            1,
            "coldforge: unexpected error: RuntimeError: bug\nthis should not happen; run again with",
        ),
    ],
)
def test_failed_runs(error, code, message, fake, capsys, monkeypatch):
    def run(*_, **__):
        raise error

    fake("coldforge.pipeline", run=run)
    assert main(["run"]) == code
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err
    assert main(["run", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("COLDFORGE_DEBUG", "1")
    assert main(["run"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_the_way_to_continue_is_the_one_promised():
    assert cli.CONTINUE == "interrupted; finished stages are kept; run the same command again to continue"


@pytest.mark.parametrize("words", [["recipes", "--keys"], ["recipes"]], ids=["text", "a table"])
def test_a_reader_that_leaves_is_no_error(words):
    environment = {**os.environ, "PYTHONPATH": str(Path(coldforge.__file__).parents[1])}
    code = f"import sys, coldforge.cli as c; sys.exit(c.main({words}))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert err == b""


# --- report


def test_report_draws_again_with_the_gallery(monkeypatch, capsys):
    import numpy as np
    from safetensors.numpy import save_file

    seen = []

    def write_report(record, out, examples=None):
        seen.append((record, examples))
        return out / "report.html"

    monkeypatch.setattr("coldforge.report.folder.write_report", write_report)
    Path("o").mkdir()
    Path("o/record.json").write_text(RECORD.to_json())
    assert main(["report", "o"]) == 0
    assert capsys.readouterr().out == "o/report.html\n"
    images, labels = np.zeros((2, 1, 4, 4), np.float32), np.array([0, 1])
    save_file(
        {
            "clean": images,
            "labels": labels,
            "tuned: natural/adversarial": images + 0.1,
            "tuned: natural/clean_answer": labels,
            "tuned: natural/adversarial_answer": labels[::-1].copy(),
        },
        "o/gallery.safetensors",
    )
    assert main(["report", "o"]) == 0
    (_, none), (record, examples) = seen
    assert none is None
    assert record == RECORD
    assert examples.classes == ("a", "b")
    assert list(examples.adversarial) == ["tuned: natural"]
    assert examples.predictions["tuned: natural"][1].tolist() == [1, 0]
    assert (examples.eps, examples.norm) == (0.1, "linf")


# --- verify and bench


@dataclass
class Check:
    name: str
    passed: bool
    expected: str = "1.0"
    found: str = "0.9"
    meaning: str = "labels are equal"


@pytest.mark.parametrize("passed", [True, False])
def test_verify(passed, fake, capsys):
    checks = [Check("labels", passed), Check("latency", True)]
    verdict = SimpleNamespace(ok=passed, checks=checks, differences=("torch: 2.6 when recorded, 2.13 here",))
    fake("coldforge.deploy.verify", verify_folder=lambda folder: verdict)
    assert main(["verify", "folder"]) == (0 if passed else 1)
    out = capsys.readouterr().out
    assert "labels are equal" in out
    told = "all checks passed" if passed else "1 of 2 checks failed"
    assert out.endswith(f"{told}\n\nNot as where it was made:\n  torch: 2.6 when recorded, 2.13 here\n")
    assert ("FAILED" in out) != passed
    assert main(["verify", "folder", "--json"]) == (0 if passed else 1)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == passed
    assert found["differences"] == ["torch: 2.6 when recorded, 2.13 here"]
    assert found["checks"][1] == {
        "name": "latency", "passed": True, "expected": "1.0", "found": "0.9", "meaning": "labels are equal",
    }  # fmt: skip


@dataclass
class Row:
    name: str = "a.onnx"
    runtime: str = "onnxruntime"
    batch: int = 64
    threads: int = 2
    median: float = 0.0021
    p10: float = 0.002
    p90: float = 0.003
    images_per_s: float = 30476.0
    ratio: float = 12.68
    size_bytes: int = 163_000
    energy_j_per_image: float = 0.00042
    energy_method: str = "estimated (guess)"


def test_bench(fake, capsys):
    asked = []

    def bench(paths, **options):
        asked.append((paths, *options.values()))
        return [Row()]

    fake("coldforge.deploy.bench", bench=bench)
    Path("a.onnx").touch()
    words = "bench a.onnx --batch 64 --batch 8 --threads 2 --seconds 0.5 --runtime openvino"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    for text in ("a.onnx", "2.10 ms", "30,476", "12.7×", "163 KB", "420 µJ", "estimated (guess)"):
        assert text in out
    assert main(["bench", "a.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["median"] == 0.0021
    a = (Path("a.onnx"),)
    assert asked == [(a, (64, 8), 2, 0.5, ("openvino",)), (a, (1, 64), 0, 1.0, ("onnxruntime",))]


# --- recipes


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quickstart"] == load_recipe("quickstart").description
    assert main(["recipes", "quickstart"]) == 0
    assert load_recipe(tomllib.loads(capsys.readouterr().out)) == load_recipe("quickstart")
    assert main(["recipes", "--keys"]) == 0
    out = capsys.readouterr().out
    assert load_recipe(tomllib.loads(out)) == load_recipe("quickstart")
    assert "# Passes over the training images.\nepochs = " in out
    assert main(["recipes", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "quickstart"
    assert main(["recipes", "nope"]) == 2


def test_recipes_attacks(fake, capsys):
    fake("coldforge.attacks", ATTACK_FORMS={"pgd-K": "K steps"}, INNER_FORMS={"n-fgsm": "one step from noise"})
    assert main(["recipes", "--attacks"]) == 0
    shown = capsys.readouterr().out
    assert "K steps" in shown
    assert "one step from noise" in shown
    assert main(["recipes", "--attacks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == {"n-fgsm": "one step from noise"}


# --- store


def test_store_commands(capsys, home):
    store = Store()
    keys = [key("baseline", 1, {"epochs": n}) for n in range(2)]
    folders = [
        store.stage("baseline", item, lambda folder: (folder / "a").write_text("abc"), describe={"label": "base"})
        for item in keys
    ]
    (home / "record.json").write_text("{}")
    store.register(home / "record.json", keys[:1])
    del store

    assert main(["store", "list"]) == 0
    out = capsys.readouterr().out
    assert keys[0][:16] in out
    assert keys[1][:16] in out
    assert "no record" in out
    assert str(home / "home") in out
    assert main(["store", "verify"]) == 0
    assert "2 stages checked, 0 damaged" in capsys.readouterr().out
    (folders[0] / "a").write_text("abd")
    assert main(["store", "verify"]) == 1
    out = capsys.readouterr().out
    assert "file a: checksum differs" in out
    assert "2 stages checked, 1 damaged" in out

    assert main(["store", "prune", "--dry-run"]) == 0
    assert "1 would be deleted" in capsys.readouterr().out
    assert folders[1].exists()
    assert main(["store", "prune"]) == 0
    assert "1 deleted" in capsys.readouterr().out
    assert [folder.exists() for folder in folders] == [True, False]
    assert main(["store", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["key"], entry["describe"]["label"]) == (keys[0], "base")


# --- doctor


def test_doctor_says_what_it_finds_and_survives_a_broken_part(fake, capsys, monkeypatch):
    fake("coldforge.deploy.runtime", int8_saturates=lambda: True)
    fake("coldforge.measure.energy", energy_source=lambda: "estimated (guess)")

    def broken():
        raise ImportError("libfoo is missing")

    monkeypatch.setattr(doctor, "_data_sets", broken)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("deploy.reduce_range=true", "estimated (guess)", "libfoo is missing", os.environ["COLDFORGE_HOME"]):
        assert text in out
    assert main(["doctor", "--json"]) == 0
    found = {item["topic"]: item for item in json.loads(capsys.readouterr().out)}
    assert found["int8 saturates"]["found"] == "yes"
    assert found["coldforge"]["found"] == coldforge.__version__
    assert found["data sets"]["found"].startswith("could not be examined: ImportError")


@pytest.mark.parametrize(("bf16", "vnni"), [(True, True), (False, False)])
def test_doctor_advises_on_the_processor(bf16, vnni, fake, monkeypatch, home):
    fake("coldforge.deploy.runtime", int8_saturates=lambda: False)
    monkeypatch.setattr(doctor, "_data_sets", list)
    monkeypatch.setattr(doctor, "has_bf16", lambda: bf16)
    monkeypatch.setattr(doctor, "has_vnni", lambda: vnni)
    advice = {item.topic: item.advice for item in doctor.examine(Store(home / "s"))}
    assert ("fp32" in advice["bf16"]) != bf16
    assert ("without VNNI" in advice["int8 saturates"]) != vnni


def test_doctor_finds_data_sets_where_they_are_read_from(home, monkeypatch):
    def found():
        return {item.topic: item for item in doctor._data_sets()}

    monkeypatch.delenv("COLDFORGE_CIFAR10", raising=False)
    assert found()["cifar10"].found == "not on this machine"
    assert "train.parquet" in found()["cifar10"].advice
    (home / "c").mkdir()
    monkeypatch.setenv("COLDFORGE_CIFAR10", str(home / "c"))
    assert found()["cifar10"].found == "cannot be used"
    assert "expected train*.parquet" in found()["cifar10"].advice
    for part in ("train", "test"):
        (home / "c" / f"{part}-00000-of-00001.parquet").touch()
    assert found()["cifar10"].found == str(home / "c")
    monkeypatch.setenv("COLDFORGE_FASHION_MNIST", "/nowhere")
    assert found()["fashion-mnist"].found == "cannot be used"
    assert "$COLDFORGE_FASHION_MNIST: expected a folder, found none at /nowhere" in found()["fashion-mnist"].advice


def test_doctor_says_where_the_store_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    (found,) = doctor._store(Store(home / "s"))
    assert found.advice.startswith("cannot be written: set $COLDFORGE_HOME")


def test_every_error_of_the_tree_has_an_exit_code(fake, capsys):
    def errors(kind):
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in errors(child))]

    for kind in errors(ColdforgeError):

        def run(*_, kind=kind, **__):
            raise kind("why")

        fake("coldforge.pipeline", run=run)
        expected = 2 if issubclass(kind, ValueError) else 130 if issubclass(kind, KeyboardInterrupt) else 1
        assert main(["run"]) == expected
        assert "why" in capsys.readouterr().err
