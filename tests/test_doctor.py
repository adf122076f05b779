"""The doctor against what this machine is known to have, and against machines where something is missing."""

import importlib.metadata
import multiprocessing
import shutil
import sys
from collections import namedtuple

import pytest
import torch

from nanopatho import doctor


def test_this_machine(capsys):
    """The test run itself proves that training works here: nothing may be called missing."""
    before = multiprocessing.active_children()
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in out and "everything that is needed is there" in out
    assert "two processes met over gloo" in out and multiprocessing.active_children() == before
    assert ("no GPU" in out) != torch.cuda.is_available()


def test_missing_packages(monkeypatch, capsys):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in ("einops", "pytest") else find(name))
    monkeypatch.setattr(doctor, "check_processes", lambda: [])
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "missing  einops: pip install einops" in lines and "note     pytest is not installed: no make test" in lines
    assert lines[-1] == "1 thing(s) missing"


@pytest.mark.parametrize("version, state", [((3, 10, 12), "missing"), ((3, 11, 0), "ok")])
def test_python(version, state, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert doctor.check_packages()[0][0] == state


@pytest.mark.parametrize("version, state, muon", [("2.5.1+cu121", "missing", True), ("2.6.0", "ok", True), ("2.13.0+cpu", "ok", False)])
def test_torch(version, state, muon, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    found = doctor.check_torch()
    assert found[0][0] == state and any("muon" in text for _, text in found) == muon


def test_places(tmp_path, monkeypatch):
    size = namedtuple("size", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: size(0, 0, 64e6 if "shm" in str(path) else 5e9))
    monkeypatch.setattr(doctor.Path, "is_dir", lambda self: True)
    (state, text), *notes = doctor.check_places(tmp_path / "not" / "there")
    assert state == "ok" and f"{tmp_path}: 5 GB free" in text
    assert [s for s, _ in notes] == ["note", "note"] and "--shm-size" in notes[1][1]


@pytest.mark.skipif(sys.platform != "linux", reason="children must see the change: they are forked")
def test_processes_that_cannot_meet(monkeypatch):
    """One process never comes: the other is ended after the time given, and the fault is told."""
    monkeypatch.setattr(doctor, "join", stay_away)
    state, text = doctor.check_processes(0.5)[0]
    assert state == "missing" and "GLOO_SOCKET_IFNAME" in text and not multiprocessing.active_children()


def stay_away(rank, port, results):
    multiprocessing.Event().wait(30) if rank else sys.exit(3)
