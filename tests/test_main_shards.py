"""Training on shards from the command line: the same guarantees as on folders."""

import signal
from pathlib import Path

import pytest

from tests.checks import (
    assert_ok,
    assert_one_line,
    assert_same_end,
    command_line,
    load,
    log_lines,
)
from tests.runs import code_of, write_images
from util.data.folders import ImageFolder
from util.data.shards import write_shards

SIZES = {
    "input_size": 32, "patch_size": (2, 2, 1), "device": "cpu", "batch_size": 4, "epochs": 3,
    "warmup_epochs": 1, "print_freq": 1,
}  # fmt: skip
PRETRAIN = SIZES | {"model": "convmae_convvit_tiny_patch16", "save_steps": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """24 images in two classes, five a shard."""
    folder = tmp_path_factory.mktemp("images")
    write_shards(ImageFolder(write_images(folder / "set", 24)), folder / "shards", 5)
    return folder / "shards"


def pattern(shards: Path) -> Path:
    return shards / "{000000..000004}.tar"


def test_a_run_on_shards_that_is_killed_ends_like_one_never_stopped(shards, launcher, tmp_path):
    def run(output: Path, **values: object) -> list[object]:
        data = {"data_path": pattern(shards), "output_dir": output, "num_workers": 1}
        return command_line(PRETRAIN | data | values)

    assert_ok(launcher.run(*run(tmp_path / "whole", num_workers=0)))
    process = launcher.start(*run(tmp_path / "killed"))
    process.wait_for("Epoch 2/3  [3/6]")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    result = launcher.run(*run(tmp_path / "killed"))
    assert_ok(result)
    assert "from epoch 2, step " in result.out and f"24 images of {pattern(shards)}" in result.out
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_classifier_learns_from_shards_and_is_evaluated_on_shards(shards, launcher, tmp_path):
    data = {"data_path": pattern(shards), "val_path": shards, "output_dir": tmp_path}
    model = {"model": "convvit_tiny_patch16", "num_workers": 0}
    result = launcher.run(*command_line(SIZES | model | data), program="main_finetune.py")
    assert_ok(result)
    assert "2 classes" in result.out
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2]
    assert load(tmp_path / "checkpoint.pth")["classes"] == ["a", "b"]

    command = ["--eval", *command_line({"val_path": shards, "output_dir": tmp_path})]
    result = launcher.run(
        *command, "--device", "cpu", "--num_workers", 0, program="main_finetune.py"
    )
    assert_ok(result)
    assert "on the 24 test images" in result.out


def test_shards_without_an_index_are_refused_in_one_line(launcher, tmp_path):
    data = {"data_path": tmp_path / "{0..3}.tar", "output_dir": tmp_path / "run"}
    result = launcher.run(*command_line(PRETRAIN | data))
    assert_one_line(result, 2, "index.npz", "python -m tools.shards index")


def slow_pictures(seconds: float, judge_after: float) -> None:
    """Make each image take a while to read, and have the waiting judged so soon."""
    import time

    import util.run.reporter
    from util.data.folders import ImageFolder

    fast = ImageFolder.open

    def slow(self, index):
        time.sleep(seconds)
        return fast(self, index)

    ImageFolder.open = slow
    util.run.reporter.SECONDS_TO_JUDGE = judge_after


@pytest.mark.parametrize(("judge_after", "told"), [(0.0, 1), (60.0, 0)], ids=["long", "short"])
def test_a_run_that_waits_for_its_data_for_long_says_so_once(launcher, tmp_path, judge_after, told):
    data = {"data_path": write_images(tmp_path / "set", 24), "output_dir": tmp_path / "run"}
    command = command_line(PRETRAIN | data | {"num_workers": 0})
    result = launcher.run(
        *command, before=code_of(slow_pictures, seconds=0.05, judge_after=judge_after)
    )
    assert_ok(result)
    lines = [
        line for line in result.out.splitlines() if line.startswith("the model waits for data")
    ]
    waits = [line["data_wait"] for line in log_lines(tmp_path / "run")]
    assert min(waits) > 0.3 and len(lines) == told
    assert all("raise --num_workers (now 0 a process" in line for line in lines)
