"""Programs under torch.compile, and machines on which it cannot work."""

import argparse
import importlib.util
import shutil
import sysconfig
from functools import partial
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

import main_finetune
import main_linprobe
import main_pretrain
from tests.checks import command_line
from tests.pictures import write_pictures
from util.errors import UsageError
from util.layers.codegen import missing_for_compile
from util.run.compiler import settle_compile

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
    args = argparse.Namespace(compile=True, memory_budget=1)
    settle_compile(args, None, CUDA)
    assert args.compile is False
    assert "not compiled, as torch.compile needs a compiler" in capsys.readouterr().err


def test_a_run_that_asked_for_it_is_refused(machine):
    machine(programs=[])
    with pytest.raises(UsageError, match=r"--compile: .* needs a compiler .* --no_compile"):
        settle_compile(argparse.Namespace(compile=True, memory_budget=1), True, CUDA)


def test_a_run_without_it_needs_nothing(machine, capsys):
    machine(programs=[])
    settle_compile(argparse.Namespace(compile=False, memory_budget=1), None, CUDA)
    assert capsys.readouterr().err == ""


@functorch.patch(activation_memory_budget=1.0)
def test_a_memory_budget_holds_for_what_is_compiled(machine):
    machine()
    settle_compile(argparse.Namespace(compile=True, memory_budget=0.5), None, CUDA)
    assert functorch.activation_memory_budget == 0.5


@pytest.mark.parametrize("compiled", [False, True])
@functorch.patch(activation_memory_budget=1.0)
def test_a_memory_budget_of_steps_that_are_not_compiled_is_refused(compiled, machine):
    machine(programs=[])
    with pytest.raises(UsageError, match="--memory_budget is for compiled steps"):
        settle_compile(argparse.Namespace(compile=compiled, memory_budget=0.5), None, CUDA)


# --- one graph -----------------------------------------------------------------------------------

# Two epochs of two steps of two micro-batches; an evaluation ends with a batch of one.
RUN = {
    "input_size": 32, "batch_size": 2, "accum_iter": 2, "epochs": 2, "warmup_epochs": 0,
    "lr": 1e-3, "num_workers": 0, "device": "cpu",
}  # fmt: skip
IMAGES = {"patch_size": (2, 2, 1), "embed_dim": (8, 8, 12), "depth": (1, 1, 1), "num_heads": 2}
CLASSIFIER = {"model": "convvit_tiny_patch16"}
AUTOENCODER = {"model": "convmae_convvit_tiny_patch16", "decoder_depth": 1}
PROGRAMS = {
    "pretrain": (main_pretrain, AUTOENCODER | {"knn_freq": 1}),
    "finetune": (main_finetune, CLASSIFIER),
    "probe": (main_linprobe, CLASSIFIER),
}


@pytest.fixture
def compile_eagerly(monkeypatch):
    """Compile as the programs say, without code being generated; to compile again is an error."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("util.run.compiler.missing_for_compile", lambda device: "")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for name in ("train/a", "train/b", "val/a"):
        write_pictures(folder / name, 5)
    write_pictures(folder / "val/b", 4)
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_steps_of_a_program_run_one_graph(name, compile_eagerly, classes, tmp_path):
    program, flags = PROGRAMS[name]
    line = RUN | IMAGES | flags | {"data_path": classes, "output_dir": tmp_path}
    with mock.patch("signal.signal"):
        program.main(program.parse_args([*map(str, command_line(line, "--compile"))]))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
