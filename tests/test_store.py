import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coldforge
from coldforge.errors import StoreError, UsageError
from coldforge.progress import Progress
from coldforge.recipe import PruneSpec
from coldforge.sealed import write_atomic
from coldforge.store import Store, default_root, key

KEY = key("baseline", 1, {"epochs": 3})
OTHER = key("baseline", 1, {"epochs": 4})


class Notes(Progress):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


class Builder:
    """Writes two files, and counts how often."""

    def __init__(self, content="weights"):
        self.calls, self.content = 0, content

    def __call__(self, folder):
        self.calls += 1
        (folder / "inner").mkdir()
        (folder / "a.bin").write_text(self.content)
        (folder / "inner" / "b.bin").write_text("b")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


# --- keys and the root


def test_key_depends_on_every_part():
    variants = [
        key("prune", 1, PruneSpec(), ["up"]),
        key("prune", 2, PruneSpec(), ["up"]),
        key("other", 1, PruneSpec(), ["up"]),
        key("prune", 1, PruneSpec(ratio=0.25), ["up"]),
        key("prune", 1, PruneSpec(), ["up2"]),
        key("prune", 1, PruneSpec()),
        key("prune", 1, [PruneSpec(), PruneSpec()]),
    ]
    assert len(set(variants)) == len(variants)
    assert key("prune", 1, PruneSpec(), ["up"]) == key("prune", 1, PruneSpec(), ("up",)) == variants[0]
    nested = [[{"a": (PruneSpec(), 1)}]]
    assert key("prune", 1, nested) == key("prune", 1, [[{"a": [PruneSpec().model_dump(mode="json"), 1]}]])
    assert len(KEY) == 64


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("COLDFORGE_HOME", str(tmp_path / "h"))
    assert default_root() == Store().root == tmp_path / "h"
    monkeypatch.delenv("COLDFORGE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "coldforge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "coldforge"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_root() == tmp_path / "Library" / "Caches" / "coldforge"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_root() == tmp_path / "local" / "coldforge"


def test_making_a_store_writes_nothing(store):
    assert not store.has("baseline", KEY)
    assert store.entries() == store.verify() == []
    assert store.prune().entries == ()
    assert store.size_bytes() == 0
    assert not store.root.exists()


# --- building


def test_a_stage_is_built_once(store):
    build, notes = Builder(), Notes()
    folder = store.stage("baseline", KEY, build, describe={"label": "the baseline", "where": Path("x")}, progress=notes)
    assert folder == store.path("baseline", KEY) == store.root / "stages" / "baseline" / KEY[:16]
    assert store.has("baseline", KEY)
    assert not store.has("baseline", OTHER)
    assert store.stage("baseline", KEY, build) == folder
    assert Store(store.root).stage("baseline", KEY, build) == folder
    assert build.calls == 1
    assert notes.texts == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["key"] == KEY
    assert manifest["kind"] == "baseline"
    assert manifest["coldforge_version"] == coldforge.__version__
    assert manifest["files"]["inner/b.bin"]["bytes"] == 1
    assert set(manifest["files"]) == {"a.bin", "inner/b.bin"}
    assert not list((store.root / "work").iterdir())
    (entry,) = store.entries()
    assert (entry.kind, entry.key, entry.describe["label"], entry.problem) == ("baseline", KEY, "the baseline", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc which file a handle is")
def test_a_stage_waits_for_the_disk_once_for_each_file_and_folder(store, monkeypatch):
    waits, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (waits.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    folder = store.stage("baseline", KEY, Builder())
    work = store.root / "work" / f"baseline-{KEY[:16]}"
    assert [Path(path) for path in waits if ".manifest" not in path] == [
        work / "a.bin",
        work / "inner" / "b.bin",
        work / "inner",
        work,
        folder.parent,
    ]
    assert len(waits) == 6, "and the manifest, before it has its name"


def test_a_failed_build_is_resumed_from_its_checkpoints_and_nothing_else(store):
    seen = []

    def build(folder):
        seen.append(sorted(path.name for path in folder.iterdir()))
        write_atomic(folder / "checkpoint-1.bin", b"1")
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "2.bin").write_text("2")
        (folder / ".left.bin.123.tmp").write_text("torn")
        (folder / "half.bin").write_text("torn")
        (folder / "inner").mkdir()
        if len(seen) == 1:
            raise KeyboardInterrupt
        (folder / ".left.bin.123.tmp").unlink()
        (folder / "half.bin").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        store.stage("baseline", KEY, build)
    assert not store.has("baseline", KEY)
    folder = store.stage("baseline", KEY, build)
    assert seen == [[], ["checkpoint-1.bin", "checkpoints"]]
    assert sorted(path.name for path in folder.iterdir()) == ["half.bin", "inner", "manifest.json"]


def test_errors_of_a_build_are_passed_on(store):
    for error in (ValueError("x"), FileNotFoundError(2, "no data", "/data/set"), PermissionError(13, "no", "/data/x")):

        def build(folder, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            store.stage("baseline", KEY, build)
        assert caught.value is error


def test_bad_arguments(store):
    with pytest.raises(UsageError, match=r"expected a stage kind of letters, digits, '-' and '_', got '\.\./x'"):
        store.stage("../x", KEY, Builder())
    with pytest.raises(UsageError, match=r"expected a stage 'baseline' without a file manifest\.json"):
        store.stage("baseline", KEY, lambda folder: (folder / "manifest.json").write_text("mine"))
    with pytest.raises(UsageError, match=r"expected keys of stages .* got 'baseline'"):
        store.register("record.json", ["baseline"])


# --- damage


def damage_size(folder):
    (folder / "a.bin").write_text("weight")
    return "file a.bin: expected 7 bytes, got 6"


def damage_bits(folder):
    (folder / "a.bin").write_text("weighTs")
    return "file a.bin: checksum differs"


def damage_missing(folder):
    (folder / "inner" / "b.bin").unlink()
    return "file inner/b.bin: missing"


def damage_truncated_manifest(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:50])
    return "file manifest.json: not readable"


def damage_edited_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"label": "b"', '"label": "c"'))
    return "file manifest.json: checksum differs"


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()
    return "file manifest.json: missing"


def damage_other_key(folder):
    shutil.rmtree(folder)
    other = Store(folder.parents[2]).stage("baseline", OTHER, Builder(), describe={"label": "b"})
    shutil.copytree(other, folder)
    return "file manifest.json: belongs to another key"


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        damage_bits,
        damage_missing,
        damage_truncated_manifest,
        damage_edited_manifest,
        damage_no_manifest,
        damage_other_key,
    ],
)
def test_damage_is_found_said_and_rebuilt(store, damage):
    build, notes = Builder(), Notes()
    folder = store.stage("baseline", KEY, build, describe={"label": "b"})
    problem = damage(folder)
    if damage is not damage_other_key:
        assert problem in [entry.problem for entry in store.verify()]
    assert store.stage("baseline", KEY, build, describe={"label": "b"}, progress=notes) == folder
    assert notes.texts == [f"stage 'b' in the store was damaged ({problem}); rebuilding"]
    assert build.calls == 2
    assert (folder / "a.bin").read_text() == "weights"
    assert all(not entry.problem for entry in store.verify())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found(tmp_path_factory, data):
    store = Store(tmp_path_factory.mktemp("s"))
    folder = store.stage("baseline", KEY, Builder("some longer content"), describe={"label": "b"})
    path = data.draw(st.sampled_from(sorted(item for item in folder.rglob("*") if item.is_file())))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    same = path.name == "manifest.json" and _same_json(bytes(content), path.read_bytes())
    path.write_bytes(bytes(content))
    assert bool(store.verify()[0].problem) != same


def _same_json(first, second):
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


# --- write_atomic


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_text("new")])
def test_write_atomic(tmp_path, content):
    (tmp_path / "f").write_text("old")
    write_atomic(tmp_path / "f", content)
    assert (tmp_path / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    (tmp_path / "f").write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_atomic(tmp_path / "f", half)
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# --- disks that cannot be written


ADVICE = r"cannot write to the store at .*: .* \([\d,]+ MB free there\).*\$COLDFORGE_HOME.*`coldforge store prune`"


def test_a_file_in_place_of_the_root(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises(StoreError, match=ADVICE) as caught:
        Store(tmp_path / "home").stage("baseline", KEY, Builder())
    assert "Not a directory" in str(caught.value) or "File exists" in str(caught.value)
    with pytest.raises(StoreError, match=ADVICE):
        Store(tmp_path / "home" / "deeper").stage("baseline", KEY, Builder())
    with pytest.raises(StoreError, match=ADVICE):
        Store(tmp_path / "home").register(tmp_path / "record.json", [KEY])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_building(store, error):
    def build(folder):
        write_atomic(folder / "checkpoint", b"1")
        raise error

    with pytest.raises(StoreError, match=ADVICE) as caught:
        store.stage("baseline", KEY, build)
    assert caught.value.__cause__ is error
    assert not store.has("baseline", KEY)
    assert [path.name for path in (store.root / "work").glob("*/*")] == ["checkpoint"]


def test_a_read_only_store_gives_what_it_has(store, monkeypatch):
    folder = store.stage("baseline", KEY, Builder())

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    fresh = Store(store.root)
    assert fresh.stage("baseline", KEY, Builder()) == folder
    with pytest.raises(StoreError, match="Read-only file system"):
        fresh.stage("baseline", OTHER, Builder())


# --- other processes


PRELUDE = """
import sys, time
from pathlib import Path
from coldforge.progress import Progress
from coldforge.sealed import write_atomic
from coldforge.store import Store
root, log, key = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
"""

SLOW = """
def build(folder):
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    (folder / "out").write_text("done")
"""

# thirty checkpointed steps whose sum is the result: any order of kills must end with the same file
STEPS = """
def build(folder):
    state = folder / "checkpoint"
    step, total = map(int, state.read_text().split()) if state.exists() else (0, 0)
    while step < 30:
        step, total = step + 1, total * 31 + step
        time.sleep(0.005)
        write_atomic(state, f"{step} {total}")
    for name in "abc":
        (folder / name).write_text(f"{total}" * 1000)
"""

RUN = "\nStore(root).stage('baseline', key, build)\n"


def start(store, log, code):
    environment = {**os.environ, "PYTHONPATH": str(Path(coldforge.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code, str(store.root), str(log), KEY], env=environment)


def test_two_processes_build_a_stage_once(store, tmp_path):
    processes = [start(store, tmp_path / "log", SLOW + RUN) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert store.has("baseline", KEY)


def test_waiting_for_another_thread_is_said(store, monkeypatch):
    monkeypatch.setattr("coldforge.store._PATIENCE_S", 0.05)
    started, notes = threading.Event(), Notes()

    def slow(folder):
        started.set()
        time.sleep(0.3)

    thread = threading.Thread(target=lambda: Store(store.root).stage("baseline", KEY, slow))
    thread.start()
    started.wait()
    build = Builder()
    store.stage("baseline", KEY, build, describe={"label": "b"}, progress=notes)
    thread.join()
    assert build.calls == 0
    assert notes.texts == ["stage 'b' is being built by another process; waiting for it"]


def test_sigkill_at_random_moments_ends_with_the_same_stage(store, tmp_path):
    dice, kills = random.Random(0), 0
    for last in [False] * 8 + [True]:
        process = start(store, tmp_path / "log", STEPS + "\nlog.touch()" + RUN)
        _wait_for(tmp_path / "log", "")
        time.sleep(dice.uniform(0, 0.06))
        if not last:
            process.send_signal(signal.SIGKILL)
        kills += process.wait(60) != 0
        (tmp_path / "log").unlink()
        assert all(not entry.problem for entry in store.verify())  # nothing, or the whole stage
    assert store.has("baseline", KEY)
    assert kills >= 3
    folder = store.stage("baseline", KEY, Builder())
    reference = Store(tmp_path / "undisturbed").stage("baseline", KEY, _steps)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["a", "b", "c", "manifest.json"]
    for name in "abc":
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert not list((store.root / "work").iterdir())


def _steps(folder):
    step, total = 0, 0
    while step < 30:
        step, total = step + 1, total * 31 + step
    for name in "abc":
        (folder / name).write_text(f"{total}" * 1000)


@pytest.mark.parametrize("place", ["coldforge.sealed.write_whole", "os.rename", "coldforge.store.fsync"])
def test_a_kill_between_building_and_publishing_builds_nothing_twice_or_again(store, monkeypatch, place):
    build = Builder()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(KeyboardInterrupt):
            store.stage("baseline", KEY, build)
    assert not store.has("baseline", KEY)
    store.stage("baseline", KEY, build)
    assert build.calls == (2 if "write_whole" in place else 1)  # once sealed, it is only published
    assert not store.verify()[0].problem


# --- registering and pruning


def test_prune_keeps_what_existing_records_need(store, tmp_path):
    for item in (KEY, OTHER):
        store.stage("baseline", item, Builder())
    record = tmp_path / "out" / "record.json"
    record.parent.mkdir()
    record.write_text("{}")
    store.register(record, [KEY])
    assert [entry.needed_by for entry in store.entries() if entry.key == KEY] == [(str(record),)]

    planned = store.prune(dry_run=True)
    assert [entry.key for entry in planned.entries] == [OTHER]
    assert planned.size_bytes > 0
    assert store.has("baseline", OTHER)
    assert store.prune() == planned
    assert store.has("baseline", KEY)
    assert not store.has("baseline", OTHER)

    store.register(record, [OTHER])  # the record was written again and needs something else
    assert [entry.key for entry in store.prune().entries] == [KEY]

    store.stage("baseline", KEY, Builder())
    store.register(record, [KEY])
    record.unlink()
    assert [entry.key for entry in store.prune().entries] == [KEY]
    assert store.entries() == []
    assert not list((store.root / "records").iterdir())


def test_prune_deletes_stale_work_and_leaves_other_files(store):
    def build(folder):
        write_atomic(folder / "checkpoint", b"123")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("baseline", KEY, build)
    (store.root / "data").mkdir()
    (store.root / "data" / "images").write_text("mine")
    (entry,) = store.prune().entries
    assert (entry.kind, entry.size_bytes) == ("unfinished", 3)
    assert not list((store.root / "work").iterdir())
    assert (store.root / "data" / "images").exists()


def test_prune_leaves_what_another_process_builds_or_uses(store, tmp_path):
    code = "\nStore_ = Store(root); Store_.stage('baseline', key, build); log.write_text('used'); time.sleep(60)"
    build = "\ndef build(folder):\n    log.write_text('building'); time.sleep(0.3)\n"
    process = start(store, tmp_path / "log", build + code)
    try:
        _wait_for(tmp_path / "log", "building")
        assert store.prune().entries == ()
        _wait_for(tmp_path / "log", "used")
        assert store.prune().entries == ()
        assert store.has("baseline", KEY)
    finally:
        process.kill()
        process.wait(60)
    assert [entry.key for entry in store.prune().entries] == [KEY]
    assert not list((store.root / "running").iterdir())


def _wait_for(path, text):
    end = time.monotonic() + 30
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < end, f"{path} never held {text!r}"
        time.sleep(0.01)


def test_a_store_can_be_sent_to_another_process(store):
    store.stage("baseline", KEY, Builder())
    assert pickle.loads(pickle.dumps(store)).has("baseline", KEY)
