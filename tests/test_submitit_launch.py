"""Jobs of submitit, run by its executor for this machine; SLURM's differs in how they start."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="needs requirements-slurm.txt")

from submitit_launch import PROGRAMS, parse_args
from tests.checks import assert_ok, assert_one_line, assert_same_end, command_line, log_lines
from tests.runs import MAIN, write_images

PROGRAM = "submitit_launch.py"
# A tiny model on 12 images: an epoch takes a tenth of a second.
RUN = {
    "model": "convmae_convvit_tiny_patch16", "input_size": 32, "patch_size": (2, 2, 1),
    "device": "cpu", "num_workers": 1, "batch_size": 2, "warmup_epochs": 1, "lr": 1e-3,
    "print_freq": 1,
}  # fmt: skip
JOB = {"cluster": "local", "ngpus": 0, "ntasks": 2, "timeout": 5}


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 12)


def submit(launcher, folder: Path, images: Path, epochs: int) -> Path:
    """Submit a job of two processes; returns the log of the first."""
    run = command_line(RUN | {"data_path": images, "output_dir": folder / "out", "epochs": epochs})
    job = command_line(JOB | {"job_dir": folder / "jobs"})
    result = launcher.run(*job, MAIN, *run, program=PROGRAM)
    assert_ok(result)
    number, log = re.fullmatch(
        rf"job (\d+): 1 x 2 processes of {MAIN}; its log: (.+)\n", result.out
    ).groups()
    log = Path(log).resolve()
    assert log == folder / "jobs" / number / f"{number}_0_log.out"
    return log


def wait_for(log: Path, text: str) -> None:
    end = time.monotonic() + 90
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < end, f"no {text!r} in {log.read_text()}"
        time.sleep(0.02)


def processes_of(log: Path) -> list[int]:
    """All processes of a job's tasks: submitit's, the mains, their workers."""
    mark = f"SUBMITIT_LOCAL_JOB_ID={log.parent.name}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def test_a_job_trains_with_its_processes_and_ends(launcher, images, tmp_path):
    log = submit(launcher, tmp_path, images, epochs=2)
    wait_for(log, "completed successfully")
    assert "2 x 1 x 2 = 4 an epoch" in log.read_text()
    assert [line["epoch"] for line in log_lines(tmp_path / "out")] == [0, 1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the job's processes in Linux's /proc")
def test_a_warned_job_saves_is_requeued_and_ends_as_if_never_stopped(launcher, images, tmp_path):
    epochs = 30
    never_stopped = command_line(
        RUN | {"data_path": images, "output_dir": tmp_path / "whole", "epochs": epochs}
    )
    assert_ok(*launcher.run_ranks(*never_stopped))
    log = submit(launcher, tmp_path, images, epochs)
    wait_for(log, "Epoch 3/30  [1/3]")
    for pid in processes_of(log):  # SLURM signals them all
        os.kill(pid, signal.SIGUSR2)
    wait_for(log, "completed successfully")
    text = log.read_text()
    assert text.count("stopped by a signal at") == 1
    assert text.count("Requeued job") == 1
    assert "epochs from epoch " in text
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_main_that_fails_fails_its_job(launcher, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pth").write_bytes(b"broken")
    log = submit(launcher, tmp_path, images, epochs=2)
    wait_for(log, "Submitted job triggered an exception")
    wait_for(log, "failed with exit code 2")
    assert "completed successfully" not in log.read_text()


def test_the_programs_own_flags_are_checked_before_it_waits_in_a_queue(launcher, tmp_path):
    def refused(line, *phrases):
        job = command_line(JOB | {"job_dir": tmp_path / "jobs"})
        assert_one_line(launcher.run(*job, *line, program=PROGRAM), 2, *phrases)

    refused([], "required: MAIN")
    refused(["main_pretrian.py"], "did you mean main_pretrain.py?")
    refused([MAIN], "--data_path is missing")
    refused([MAIN, "--data_path", "x", "--epoch", 3], "did you mean --epochs?")
    refused([MAIN, "--data_path", "x", "--resume", "none"], "begin anew after each requeue")
    refused(["--nodes", 2, MAIN, "--data_path", "x"], "this machine alone")
    refused(["--sbatch", "x", MAIN, "--data_path", "x"], "'x' is not NAME=VALUE")
    assert not (tmp_path / "jobs").exists()


def test_without_slurm_a_job_is_refused(launcher, tmp_path):
    line = ["--job_dir", tmp_path, MAIN, "--data_path", "x"]
    result = launcher.run(*line, program=PROGRAM, env={"PATH": str(tmp_path)})
    assert_one_line(result, 2, "there is no srun here")


def test_what_follows_the_program_is_its_own(launcher):
    args = parse_args(["--nodes", "4", MAIN, "--nodes", "--data_path", "x", "-h"])
    assert (args.nodes, args.program) == (4, MAIN)
    assert args.arguments == ["--nodes", "--data_path", "x", "-h"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_main_can_be_submitted(launcher, tmp_path, program):
    line = ["--cluster", "local", "--job_dir", tmp_path, program, "--help"]
    result = launcher.run(*line, program=PROGRAM)
    assert_ok(result)
    assert "--output_dir" in result.out
