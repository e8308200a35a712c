"""What living processes use."""

from __future__ import annotations

import os

import pytest

from coldforge.lease import Lease, Leases


def test_names_are_seen_by_others_and_not_by_their_owner(tmp_path):
    lease = Lease(tmp_path)
    lease.add(["a-1"])
    seen = Leases(tmp_path)
    assert "a-1" in seen
    assert "a-2" not in seen
    lease.add(["a-2"])
    assert "a-2" in seen
    assert "a-1" not in Leases(tmp_path, besides=lease)


def test_a_name_is_written_once_and_read_once(tmp_path):
    lease, seen = Lease(tmp_path), Leases(tmp_path)
    names = [f"a-{number:02}" for number in range(50)]
    for name in names * 2:
        lease.add([name])
        assert name in seen
    assert lease.file.read_text(encoding="utf-8").splitlines() == names
    lease.file.write_text("b-00\n" * 50 + "b-1\n", encoding="utf-8")  # what was read is not looked at again
    assert "b-1" in seen
    assert "b-00" not in seen


def test_half_a_line_is_read_when_it_is_whole(tmp_path):
    lease, seen = Lease(tmp_path), Leases(tmp_path)
    lease.add(["a-1"])
    with lease.file.open("a", encoding="utf-8") as file:
        file.write("a-")
        file.flush()
        assert "a-" not in seen
        file.write("2\n")
    assert "a-2" in seen


def test_nothing_is_waited_for_and_a_dead_lease_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("a lease need not outlive the machine"))
    lease = Lease(tmp_path)
    lease.add(["a-1"])
    lease._lock.release()
    assert "a-1" not in Leases(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    Lease(tmp_path / "file" / "running").add(["a-1"])
    assert "a-1" not in Leases(tmp_path / "file" / "running")
