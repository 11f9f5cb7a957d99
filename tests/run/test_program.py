"""How a program ends: exit codes, one line, signals before training."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checks import assert_one_line, command_line
from tests.runs import MAIN, ROOT, code_of, free_port, write_images
from util.run.program import run_main
from util.signals import STOPPED_EXIT_CODE

RUN = {
    "model": "convmae_convvit_tiny_patch16", "input_size": 32, "patch_size": (2, 2, 1),
    "device": "cpu", "num_workers": 0, "batch_size": 2, "epochs": 2, "warmup_epochs": 1,
}  # fmt: skip


def wait_as_the_data_are_listed(number):
    """The process signals itself where a run reads its data, before any step."""
    import os

    import util.data.datasets as datasets

    datasets.ImageFiles.__init__ = lambda *_, **__: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 4)


def start_up(launcher, images, folder, number, **env):
    before = code_of(wait_as_the_data_are_listed, number=int(number))
    line = command_line(RUN | {"data_path": images, "output_dir": folder})
    return launcher.run(*line, program=MAIN, before=before, env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_start_up_ends_a_run_as_a_stopped_one(number, launcher, images, tmp_path):
    result = start_up(launcher, images, tmp_path, number)
    assert (result.code, result.err) == (0, "")
    assert result.out == "stopped by a signal: there was nothing to save yet\n"


def test_a_launcher_hears_of_a_run_stopped_during_start_up(launcher, images, tmp_path):
    env = {STOPPED_EXIT_CODE: 85}
    assert start_up(launcher, images, tmp_path, signal.SIGTERM, **env).code == 85


def test_an_interrupt_during_start_up_is_one_line(launcher, images, tmp_path):
    result = start_up(launcher, images, tmp_path, signal.SIGINT)
    assert_one_line(result, 130, "interrupted")


def signal_at_the_first_library(number):
    """The process signals itself as its program begins to import torch or what needs it."""
    import builtins
    import os

    libraries, real = {"torch", "torchvision", "timm", "numpy", "PIL"}, builtins.__import__

    def signalling(name, *args, **kwargs):
        if name.partition(".")[0] in libraries:
            builtins.__import__ = real
            os.kill(os.getpid(), number)
        return real(name, *args, **kwargs)

    builtins.__import__ = signalling


RUNS = ["main_pretrain.py", "main_finetune.py", "main_linprobe.py"]
RUNS += ["VideoConvMAE.main_pretrain", "VideoConvMAE.main_finetune"]
TOOLS = ["tools.visualize", "tools.shards", "tools.checkpoint", "submitit_pretrain.py"]


def at_the_imports(launcher, program, number, **env):
    before = code_of(signal_at_the_first_library, number=int(number))
    return launcher.run("--data_path", "x", program=program, before=before, env=env)


@pytest.mark.parametrize("program", RUNS + TOOLS)
def test_an_interrupt_while_libraries_are_imported_is_one_line(program, launcher):
    assert_one_line(at_the_imports(launcher, program, signal.SIGINT), 130, "interrupted")


@pytest.mark.parametrize("program", RUNS)
def test_sigterm_while_libraries_are_imported_ends_a_run_as_a_stopped_one(program, launcher):
    result = at_the_imports(launcher, program, signal.SIGTERM, **{STOPPED_EXIT_CODE: 85})
    assert (result.code, result.err) == (85, "")
    assert result.out == "stopped by a signal: there was nothing to save yet\n"


def test_sigterm_while_libraries_are_imported_ends_a_tool_in_silence(launcher):
    result = at_the_imports(launcher, "tools.shards", signal.SIGTERM)
    assert (result.code, result.out, result.err) == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize(
    ("program", "code", "out"),
    [
        ("SEG.train", 85, "stopped by a signal: there was nothing to save yet\n"),
        ("SEG.predict", -signal.SIGTERM, ""),
    ],
)
def test_sigterm_while_a_package_imports_mmseg_ends_its_programs_as_others(
    program, code, out, tmp_path
):
    (tmp_path / "mmseg.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    env = os.environ | {"PYTHONPATH": str(tmp_path), STOPPED_EXIT_CODE: "85"}
    command = [sys.executable, "-m", program]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (code, out, "")


def test_what_the_system_refuses_is_one_line(tmp_path, capfd):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert run_main(lambda args: loop.read_text(), None) == 1
    assert capfd.readouterr().err == f"failed: {loop}: {os.strerror(errno.ELOOP)}\n"


def test_a_gpu_without_enough_memory_is_one_line_that_says_what_to_try(capfd):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")

    assert run_main(main, None) == 1
    error = capfd.readouterr().err
    assert error.startswith("failed: the GPU's memory is full (CUDA out of memory. Tried to")
    assert error.count("\n") == 1 and "--batch_size" in error and "--grad_checkpointing" in error


def test_an_error_of_the_program_s_own_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        run_main(lambda args: Path("/no/such/file").read_text(), None)


def torchrun(launcher, *line):
    """Two processes, as torchrun starts them by default: it keeps the store where they meet."""
    options = ["--nproc_per_node", 2, "--master_port", free_port()]
    return launcher.run(*options, MAIN, *line, program="torch.distributed.run")


def test_processes_of_torchrun_that_fail_alike_say_it_once(launcher, tmp_path):
    line = command_line(RUN | {"data_path": tmp_path / "no", "output_dir": tmp_path / "out"})
    result = torchrun(launcher, *line)
    assert result.code == 1
    assert result.err.count("error: the data path") == 1


def test_a_bad_flag_under_torchrun_is_said_once(launcher, tmp_path):
    result = torchrun(launcher, "--data_path", tmp_path, "--batchsize", 3)
    assert result.err.count("did you mean --batch_size?") == 1


def test_processes_without_an_agent_each_say_what_is_wrong(launcher, tmp_path):
    line = command_line(RUN | {"data_path": tmp_path / "no", "output_dir": tmp_path / "out"})
    for result in launcher.run_ranks(*line):
        assert result.code == 2 and "error: the data path" in result.err
