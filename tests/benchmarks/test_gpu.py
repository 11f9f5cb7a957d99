"""`gpu.sh` with a `python` that writes down what it is asked for, in the place of a GPU."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$GPUS"; exit; fi
echo "$@" >> "$CALLS"
echo report
case "$*" in *finetune_step*) exit 1;; esac
"""


@pytest.fixture
def run(tmp_path):
    """Run the script on a machine of so many GPUs; give how it ended, and the calls."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(PYTHON)
    stub.chmod(0o755)

    def script(*names: str, gpus: int = 1) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "CALLS": str(calls), "GPUS": str(gpus)}
        command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), *names]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done, [line.split() for line in lines]

    return script


def test_a_report_that_fails_stops_no_other_but_the_exit_status_tells(run, tmp_path):
    done, calls = run(gpus=2)
    assert done.returncode == 1 and "failed: finetune_step\n" in done.stderr
    modules = [call[1] for call in calls]
    assert "benchmarks.scaling" in modules[modules.index("benchmarks.finetune_step") + 1 :]
    assert len(list((tmp_path / "out").glob("*.txt"))) == len(calls) == 7


def test_every_report_asks_for_what_its_program_knows(run):
    for _, name, *argv in run(gpus=2)[1]:
        module = importlib.import_module(name)
        if name == "benchmarks.profile_step":
            assert module.parse_args([*argv[:-2], "--device", "cpu"])[0].batch_size
        else:
            assert module.get_args_parser().parse_args(argv).batch_size


def test_reports_can_be_chosen_and_a_wrong_name_is_said(run):
    done, calls = run("inference_step", "sparse")
    assert [call[1] for call in calls] == ["benchmarks.inference_step"]
    assert done.returncode == 1 and "there is no report sparse here" in done.stderr


def test_without_a_gpu_nothing_is_run(run):
    done, calls = run(gpus=0)
    assert done.returncode == 2 and not calls
    assert done.stderr == "gpu.sh: no CUDA GPU is visible\n"
