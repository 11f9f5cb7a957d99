"""Machines on which torch.compile cannot work."""

import argparse
import importlib.util
import shutil
import sysconfig

import pytest
import torch

from util.errors import UsageError
from util.run.compiler import missing_for_compile, settle_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend to be a machine with everything, less what is named."""

    def build(programs=("gcc", "g++"), triton=True, headers=True, capability=(9, 0), **env):
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton or None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if headers:
            (tmp_path / "Python.h").touch()

    return build


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_nothing_is_missing_on_a_machine_that_has_all(device, machine):
    machine()
    assert missing_for_compile(device) == ""


@pytest.mark.parametrize(
    ("device", "lacking", "phrase"),
    [
        (CUDA, {"triton": False}, "pip install triton"),
        (CUDA, {"capability": (6, 1)}, "compute capability 7.0 or newer"),
        (CUDA, {"programs": ["g++"]}, "a compiler (gcc or clang"),
        (CUDA, {"CC": "icc"}, "a compiler (icc"),
        (CPU, {"programs": ["gcc"]}, "a compiler (g++ or clang++"),
        (CUDA, {"headers": False}, "Python.h"),
        (CPU, {"headers": False}, "Python.h"),
    ],
)
def test_what_is_missing_is_named(device, lacking, phrase, machine):
    machine(**lacking)
    assert phrase in missing_for_compile(device)


def test_a_run_that_did_not_ask_goes_on_without_and_says_so(machine, capsys):
    machine(programs=[])
    args = argparse.Namespace(compile=True)
    settle_compile(args, None, CUDA)
    assert args.compile is False
    assert "not compiled, as torch.compile needs a compiler" in capsys.readouterr().err


def test_a_run_that_asked_for_it_is_refused(machine):
    machine(programs=[])
    with pytest.raises(UsageError, match=r"--compile: .* needs a compiler .* --no_compile"):
        settle_compile(argparse.Namespace(compile=True), True, CUDA)


def test_a_run_without_it_needs_nothing(machine, capsys):
    machine(programs=[])
    settle_compile(argparse.Namespace(compile=False), None, CUDA)
    assert capsys.readouterr().err == ""
