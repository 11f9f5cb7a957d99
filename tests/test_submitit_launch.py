"""Jobs of submitit, run by its executor for this machine; and what is given to SLURM."""

import contextlib
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


needs_proc = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="finds the job's processes in Linux's /proc"
)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture
def folder(tmp_path):
    """A folder for jobs; those that still run in the end are killed."""
    yield tmp_path
    for log in (tmp_path / "jobs").glob("*/*_0_log.out"):
        send(signal.SIGKILL, log)


def submit(launcher, folder: Path, images: Path, epochs: int, **job: object) -> Path:
    """Submit a job, of one process if nothing else is said; returns the log of the first."""
    run = command_line(RUN | {"data_path": images, "output_dir": folder / "out", "epochs": epochs})
    job = JOB | {"ntasks": 1, "job_dir": folder / "jobs"} | job
    result = launcher.run(*command_line(job), MAIN, *run, program=PROGRAM)
    assert_ok(result)
    number, log = re.fullmatch(
        rf"job (\d+): 1 x {job['ntasks']} processes of {MAIN}; its log: (.+)\n", result.out
    ).groups()
    log = Path(log).resolve()
    assert log.name == f"{number}_0_log.out" and log.parent.name == number
    return log


def wait_for(log: Path, text: str) -> None:
    end = time.monotonic() + 90
    while not log.exists() or text not in log.read_text():
        there = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < end, f"no {text!r} in {there}"
        time.sleep(0.02)


def send(number: int, log: Path) -> None:
    """Signal all processes of a job's tasks, as SLURM may: submitit's, the mains, their workers."""
    mark = f"SUBMITIT_LOCAL_JOB_ID={log.parent.name}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), number)


@pytest.fixture(scope="module")
def ended(launcher, images, tmp_path_factory) -> Path:
    """The log of a job of two processes that ended, in folders named after it."""
    folder = tmp_path_factory.mktemp("ended").resolve()
    log = submit(launcher, folder / "%j", images, epochs=2, ntasks=2, job_dir=folder / "%j")
    wait_for(log, "completed successfully")
    return log


def test_a_job_trains_with_its_processes_and_ends(ended):
    assert "2 x 1 x 2 = 4 (" in ended.read_text()
    assert [line["epoch"] for line in log_lines(ended.parent / "out")] == [0, 1]


def test_the_number_of_the_job_stands_for_percent_j_in_its_folders(ended):
    assert ended.parent.name.isdecimal()
    folder = ended.parent.with_name("%j")
    assert not any(folder.rglob("*"))  # submitit makes this folder, and leaves it empty


@needs_proc
def test_a_warned_job_saves_is_requeued_and_ends_as_if_never_stopped(launcher, images, folder):
    epochs = 12
    never_stopped = command_line(
        RUN | {"data_path": images, "output_dir": folder / "whole", "epochs": epochs}
    )
    assert_ok(launcher.run(*never_stopped))
    log = submit(launcher, folder, images, epochs)
    wait_for(log, "Epoch 3/12  [1/6]")
    send(signal.SIGUSR2, log)
    wait_for(log, "completed successfully")
    text = log.read_text()
    assert text.count("stopped by a signal at") == 1
    assert text.count("Requeued job") == 1
    assert "epochs from epoch " in text
    assert_same_end(folder / "out", folder / "whole")


@needs_proc
def test_a_job_warned_before_it_trains_is_requeued_too(launcher, images, folder):
    log = submit(launcher, folder, images, epochs=2)
    wait_for(log, "Loading pickle")
    time.sleep(1)  # the main imports its libraries
    assert "an epoch" not in log.read_text()
    send(signal.SIGUSR2, log)
    wait_for(log, "completed successfully")
    assert log.read_text().count("Requeued job") == 1
    assert [line["epoch"] for line in log_lines(folder / "out")] == [0, 1]


@needs_proc
def test_a_terminated_job_saves_and_is_not_requeued(launcher, images, folder):
    log = submit(launcher, folder, images, epochs=200)
    wait_for(log, "Epoch 3/200  [1/6]")
    send(signal.SIGTERM, log)
    wait_for(log, "stopped by a signal at")
    wait_for(log, "completed successfully")
    assert "Requeued job" not in log.read_text()
    assert (folder / "out" / "checkpoint.pth").exists()


def test_a_main_that_fails_fails_its_job(launcher, images, folder):
    (folder / "out").mkdir()
    (folder / "out" / "checkpoint.pth").write_bytes(b"broken")
    log = submit(launcher, folder, images, epochs=2)
    wait_for(log, "Submitted job triggered an exception")
    wait_for(log, "failed with exit code")
    assert "completed successfully" not in log.read_text()


def test_the_programs_own_flags_are_checked_before_it_waits_in_a_queue(launcher, tmp_path):
    def refused(line, *phrases):
        job = command_line(JOB | {"job_dir": tmp_path / "jobs"})
        assert_one_line(launcher.run(*job, *line, program=PROGRAM), 2, *phrases)

    refused([], "required: MAIN")
    refused(["main_pretrian.py"], "did you mean main_pretrain.py?")
    refused([MAIN], "--data_path is missing")
    refused([MAIN, "--data_path", "x", "--epoch", 3], "did you mean --epochs?")
    ready = [MAIN, "--data_path", "x"]
    refused([*ready, "--resume", "none"], "begin there again after each requeue")
    refused([*ready, "--resume", "output/checkpoint-3.pth"], "begin there again")
    refused(["--nodes", 2, *ready], "this machine alone")
    refused(["--sbatch", "x=", *ready], "'x=' is not NAME=VALUE or NAME")
    refused(["--ngpus", 1, *ready], "--ntasks 2: a process takes a GPU")
    refused(["--signal_delay", 300, *ready], "must lie between 20 and the 300 seconds")
    assert not (tmp_path / "jobs").exists()


def test_without_slurm_a_job_is_refused(launcher, tmp_path):
    line = ["--job_dir", tmp_path, MAIN, "--data_path", "x"]
    result = launcher.run(*line, program=PROGRAM, env={"PATH": str(tmp_path)})
    assert_one_line(result, 2, "there is no srun and sbatch here")


def slurm(folder: Path, sbatch: str) -> dict[str, str]:
    """The environment with an `srun`, and an `sbatch` of these lines of shell."""
    folder.mkdir()
    for name, lines in (("srun", ""), ("sbatch", sbatch)):
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_what_slurm_gets(launcher, tmp_path):
    env = slurm(tmp_path / "bin", f'cp "$1" {tmp_path}/script; echo "Submitted batch job 42"')
    job = {"nodes": 4, "ngpus": 8, "cpus": 12, "timeout": 60, "partition": "gpu"}
    line = command_line(job | {"job_dir": tmp_path / "jobs"}, "--sbatch", "account=vision")
    line += ["--sbatch", "gpus-per-node=a100:8", "--sbatch", "exclusive"]
    video = ["VideoConvMAE.main_pretrain", "--data_path", "x"]
    result = launcher.run(*line, *video, program=PROGRAM, env=env)
    assert_ok(result)
    assert result.out.startswith("job 42: 4 x 8 processes of VideoConvMAE.main_pretrain; its log: ")
    script = (tmp_path / "script").read_text()
    options = re.findall(r"#SBATCH --(.+)", script)
    for option in (
        "nodes=4", "ntasks-per-node=8", "cpus-per-task=12", "time=60", "partition=gpu", "requeue",
        "signal=USR2@120", "account=vision", "gpus-per-node=a100:8", "exclusive",
        "job-name=VideoConvMAE.main_pretrain",
    ):  # fmt: skip
        assert option in options
    assert sum(option.startswith("gpus") for option in options) == 1
    assert re.search(r"^srun .*--kill-on-bad-exit=1 --cpus-per-task=12 .*_submit", script, re.M)


def test_what_slurm_refuses_is_told_in_one_line(launcher, tmp_path):
    env = slurm(tmp_path / "bin", "echo 'error: no such account' >&2; echo 'bye' >&2; exit 1")
    line = ["--job_dir", tmp_path / "jobs", MAIN, "--data_path", "x"]
    result = launcher.run(*line, program=PROGRAM, env=env)
    assert_one_line(result, 2, "SLURM refuses the job:", "error: no such account bye")


def test_what_follows_the_program_is_its_own():
    args = parse_args(["--nodes", "4", MAIN, "--nodes", "--data_path", "x", "-h"])
    assert (args.nodes, args.program) == (4, MAIN)
    assert args.arguments == ["--nodes", "--data_path", "x", "-h"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_main_can_be_submitted(launcher, tmp_path, program):
    line = ["--cluster", "local", "--job_dir", tmp_path, program, "--help"]
    result = launcher.run(*line, program=PROGRAM)
    assert_ok(result)
    assert "--output_dir" in result.out
