"""Bad input, one test each with its message, through the surface that users touch. The details have their own tests."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import coldforge
from coldforge import cli, load_recipe
from coldforge.assemble import UNFINISHED
from coldforge.compress import load_network
from coldforge.data import from_arrays
from coldforge.errors import DataError, ModelError, RecipeError, StoreError
from coldforge.pipeline import run
from coldforge.store import Store


@pytest.fixture
def start(splits, model, recipe, tmp_path):
    """A function that starts a run with something wrong in it; its store must stay without a finished stage."""

    def begin(changes=None, *, out=None, store=None, **others):
        chosen = {"model": model, "data": splits} | others
        run(recipe(changes), out=out or tmp_path / "out", store=store or Store(tmp_path / "store"), **chosen)

    return begin


# --- recipes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.epoch=3", r"unknown key 'finetune\.epoch'; did you mean 'epochs'\?"),
        ("finetunes.epochs=3", r"unknown key 'finetunes'; did you mean 'finetune'\?"),
        ("threat_model.eps=8", r"expected a fraction of the pixel range \[0, 1\], got 8; did you mean 8/255\?"),
        ("prune.ratio=1", r"prune\.ratio: expected .* 0 <= ratio < 1, got 1; 1 would remove every channel"),
        ("quantize.weight_bits=3.5", r"quantize\.weight_bits: expected a whole number of bits, one of 1, .*, got 3\.5"),
        ("deploy.arm=none", r"deploy\.arm: expected one of finetune\.arms \['natural', 'adversarial'\], got 'none'"),
    ],
)
def test_recipes(setting, message, capsys):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", overrides=[setting])
    assert cli.main(["run", "--set", setting]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_attack_that_is_not_known(start):
    with pytest.raises(RecipeError, match=r"unknown attack 'pgdd-20'; .*pgd-K"):
        start({"evaluate.attacks": ["pgdd-20"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"finetune.objective": "trades", "finetune.attack": "fgsm"},
            r"finetune\.attack: fgsm starts at the image, where the gradient",
        ),
        ({"finetune.float_attack": "pgd"}, r"finetune\.float_attack: unknown inner attack 'pgd'"),
        ({"harden.attack": "pgd"}, r"harden\.attack: unknown inner attack 'pgd'"),
        ({"finetune.attack": "fgsm-reuse"}, r"fgsm-reuse starts where .*; expected data\.augment = \"none\""),
    ],
)
def test_an_inner_attack_that_would_do_nothing_is_refused_before_anything_is_trained(
    settings, message, start, splits, tmp_path
):
    """The baseline is trained first, which may take hours."""
    with pytest.raises(RecipeError, match=message):
        start(settings, data=dataclasses.replace(splits, augment="crop-flip"))
    assert Store(tmp_path / "store").entries() == []


def test_a_checkpoint_that_is_not_there_is_said_when_planning(tmp_path, capsys):
    words = ["run", "--plan", "--set", f"model.checkpoint={tmp_path}/net.pt", "model.mean=0.5", "model.std=0.5"]
    assert cli.main(words) == 1
    assert f"expected a checkpoint at {tmp_path}/net.pt, found nothing" in capsys.readouterr().err


# --- networks


@pytest.mark.parametrize("what", ["reference", "control"])
def test_a_trained_network_has_no_fresh_weights(what, start, tmp_path):
    with pytest.raises(RecipeError, match=rf"{what}\.train: expected an architecture .*package\.module:factory"):
        start({f"{what}.train": True})
    assert Store(tmp_path / "store").entries() == []


class Softmax(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return self.network(inputs).softmax(1)


@pytest.mark.parametrize("trained_here", [False, True], ids=["a live network", "a factory to train"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("channels", r"the network expects images with 3 channels, got images with 1"),
        ("classes", r"expected 3 classes, as the data have, got logits for 7"),
        ("probabilities", r"the network returns probabilities; expected logits; remove the softmax"),
        ("nan", r"expected finite weights, found NaN or infinity in '.*weight'"),
    ],
)
def test_networks(wrong, message, trained_here, start, bare, tmp_path, monkeypatch):
    arguments = {"channels": {"channels": 3}, "classes": {"classes": 7}}.get(wrong, {})
    network = bare(**arguments)
    if wrong == "nan":
        network[0].weight.data[0] = float("nan")
    if wrong == "probabilities":
        network = Softmax(network)
    changes, others = {}, {"model": network}
    if trained_here:
        module = type(sys)("a_users_module")
        module.factory = lambda: network
        monkeypatch.setitem(sys.modules, "a_users_module", module)
        changes, others = {"model.source": "a_users_module:factory"}, {"model": None}
    with pytest.raises(ModelError, match=message):
        start(changes, **others)
    assert Store(tmp_path / "store").entries() == []


# --- data


def test_inputs_outside_the_box(splits):
    images = splits.train.pixels() * 2 - 1
    with pytest.raises(
        DataError, match=r"inputs outside \[0, 1\]: found -.* \.\.\. .*give pixels before normalization"
    ):
        from_arrays(images, splits.train.labels, images, splits.train.labels)


def test_labels_out_of_range(splits):
    images, labels = splits.train.images, splits.train.labels
    with pytest.raises(DataError, match=r"labels out of range: expected 0 \.\.\. 1, found 0 \.\.\. 2"):
        from_arrays(images, labels, images, labels, classes=("cat", "dog"))


@pytest.mark.parametrize(
    ("source", "ways"),
    [
        ("fashion-mnist:/nowhere", [r"expected a folder, found none at /nowhere"]),
        ("parquet:/nowhere", [r"expected a folder, found none at /nowhere"]),
        ("cifar100", [r"unknown data set 'cifar100'; did you mean 'cifar10'\?"]),
        (
            "cifar10",
            ["train.parquet and test.parquet", "huggingface.co/datasets/uoft-cs/cifar10", r"\$COLDFORGE_CIFAR10"],
        ),
    ],
)
def test_missing_data_sets_name_the_way_to_get_them(source, ways, start, monkeypatch):
    monkeypatch.delenv("COLDFORGE_CIFAR10", raising=False)
    with pytest.raises(DataError) as raised:
        start({"data.source": source}, data=None)
    for way in ways:
        assert raised.match(way)


# --- checkpoints


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def start_from(start, factory):
    """A function that starts from a checkpoint."""

    def begin(file, **changes):
        given = {"model.source": factory, "model.checkpoint": str(file), "model.mean": [0.0], "model.std": [1.0]}
        start(given | changes, model=None)

    return begin


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint(suffix, start_from, bare, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / f"weights{suffix}"
    state = bare().state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ModelError, match=rf"weights\{suffix}: the checkpoint is truncated or damaged .* again"):
        start_from(file)


def test_a_checkpoint_that_would_execute_code(start_from, tmp_path):
    torch.save({"weight": Bomb(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"refused, because loading it could execute code.*save_file"):
        start_from(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_is_not_there(start_from, tmp_path):
    with pytest.raises(ModelError, match=r"expected a checkpoint at .*nothing\.pt, found nothing"):
        start_from(tmp_path / "nothing.pt")


@pytest.mark.parametrize("missing", ["mean", "std"])
def test_a_checkpoint_without_its_normalization(missing, start_from, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.mean and model\.std: expected the normalization .*checkpoint"):
        start_from(tmp_path / "weights.pt", **{f"model.{missing}": []})
    assert Store(tmp_path / "store").entries() == []


def test_a_truncated_result(made, tmp_path):
    for name in ("model.safetensors", "structure.json"):
        (tmp_path / name).write_bytes((made.out / "model" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"the checkpoint in .* is damaged"):
        load_network(tmp_path)
    (tmp_path / "structure.json").write_text('{"source": ')
    with pytest.raises(ModelError, match=r"the checkpoint in .* is damaged: structure\.json"):
        load_network(tmp_path)
    with pytest.raises(ModelError, match=r"expected a coldforge checkpoint in .*, found no structure\.json"):
        load_network(tmp_path / "elsewhere")


# --- the disk


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_a_disk_that_cannot_be_written(number, words, start, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("coldforge.compress.checkpoint.write_atomic", refuse)
    with pytest.raises(StoreError, match=rf"cannot write to the store at .*store: {words}") as raised:
        start()
    assert raised.match(r"Set \$COLDFORGE_HOME to a folder on a disk with room.*run the same command again")
    monkeypatch.undo()
    assert Store(tmp_path / "store").entries() == []


def test_a_file_in_place_of_the_folder_for_results(start, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StoreError, match=r"expected a folder to write results into, cannot write .*taken: "):
        start(out=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    assert Store(tmp_path / "store").entries() == []  # said before the work, not after it


def test_what_an_interrupted_run_needs_is_not_pruned(start, tmp_path, monkeypatch):
    """`coldforge store prune` is what the message about a full disk advises."""
    store = Store(tmp_path / "store")

    def refuse(*_, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.root))

    monkeypatch.setattr("coldforge.stages.networks.prune_channels", refuse)
    with pytest.raises(StoreError):
        start(store=store)
    monkeypatch.undo()
    idle = Store(store.root)  # as in another process, after this one has ended
    for lease in (store.root / "running").iterdir():
        lease.unlink()
    assert [entry.kind for entry in idle.entries()] == ["baseline"]
    assert "baseline" not in [entry.kind for entry in idle.prune(dry_run=True).entries]
    assert (tmp_path / "out" / UNFINISHED).exists()
    start(store=store)
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_full_disk_at_the_very_end(made, start, tmp_path, monkeypatch):
    def refuse(path, *_):
        if path.name != UNFINISHED:  # which is written first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "out").mkdir()
    stale = [tmp_path / "out" / name for name in ("record.json", "report.html")]
    for file in stale:
        file.write_text("of an earlier run")
    monkeypatch.setattr("coldforge.assemble.write_atomic", refuse)
    with pytest.raises(StoreError, match=r"cannot write the results into .*out: No space left on device"):
        start(store=made.store)
    assert not any(file.exists() for file in stale)  # they would stand beside another run's model


# --- a store that was damaged


def test_a_damaged_entry_is_found_said_and_rebuilt(copied, recipe, forge_again, made, tmp_path):
    for folder in (copied.root / "stages" / "quantize").iterdir():
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    (problem,) = [entry.problem for entry in copied.verify() if entry.problem]
    assert problem == "file model.safetensors: checksum differs"
    again = forge_again(recipe(), copied, tmp_path / "out")
    assert "was damaged (file model.safetensors: checksum differs); rebuilding" in again.spy.notes[0]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (made.out / "model.onnx").read_bytes()


# --- the user


def test_ctrl_c_says_how_to_continue(tmp_path):
    """A real one, in the middle of a training; the same command then goes on behind it."""
    settings = ["data.train_n=1500", "data.test_n=10", "model.train.epochs=50", "compute.threads=1"]
    words = [sys.executable, "-m", "coldforge", "run", "--out", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(coldforge.__file__).parents[1]),
        "COLDFORGE_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*words, *(word for text in settings for word in ("--set", text))],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        try:
            deadline = time.monotonic() + 60
            while "baseline: train …" not in (tmp_path / "said").read_text():
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last == "coldforge: interrupted; finished stages are kept; run the same command again to continue"
    assert not (tmp_path / "out" / "record.json").exists()
    assert Store(tmp_path / "home").entries() == []
