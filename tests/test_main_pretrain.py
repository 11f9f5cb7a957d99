"""The pretraining program from its command line: what a run survives, refuses and leaves behind."""

import argparse
import fcntl
import json
import os
import pickle
import pty
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

import main_pretrain
import tools.visualize
from engine_pretrain import build_model, check_sizes
from models_convmae import MODELS, MaskedAutoencoderConvViT
from models_convvit import convvit_from_checkpoint, convvit_from_weights, convvit_tiny_patch16
from tests.checks import (
    assert_close_end,
    assert_finite,
    assert_ok,
    assert_one_line,
    assert_same_end,
    command_line,
    curve,
    events,
    load,
    log_lines,
    outcomes,
    same,
    weights,
)
from tests.pictures import write_pictures
from tests.runs import (
    MAIN,
    ROOT,
    Launcher,
    Process,
    Result,
    call,
    code_of,
    environment,
    picture,
    write_images,
)
from tools import knn
from util.errors import UsageError
from util.weights.read import read_weights

# A tiny model on 24 images, so that a run of 4 epochs of 6 steps takes a second or two.
DEFAULTS = {
    "model": "convmae_convvit_tiny_patch16", "input_size": 32, "patch_size": (2, 2, 1),
    "device": "cpu", "num_workers": 0, "batch_size": 4, "epochs": 4, "warmup_epochs": 1,
    "lr": 1e-3, "print_freq": 1, "save_freq": 2, "save_steps": 2,
}  # fmt: skip
STEPS = 6


def flags(data: Path | None, output: Path, *more: object, **values: object) -> list[object]:
    """A command line: `DEFAULTS`, overridden by `values`; those that are None are left out."""
    return command_line(DEFAULTS | {"data_path": data, "output_dir": output} | values, *more)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 4 * STEPS)


@pytest.fixture(scope="session")
def whole_run(images, tmp_path_factory) -> tuple[Result, Path]:
    """A run that was never stopped, started as a user does it, and its folder."""
    output = tmp_path_factory.mktemp("whole")
    return call(MAIN, *flags(images, output)), output


@pytest.fixture(scope="session")
def whole(whole_run) -> Path:
    assert_ok(whole_run[0])
    return whole_run[1]


# --- the same step, however the batch is split ---------------------------------------------------


@pytest.fixture(scope="session")
def one_process(images, launcher, tmp_path_factory) -> Path:
    """The run that the splits below must equal: 9 steps of 8 images in one process."""
    output = tmp_path_factory.mktemp("one")
    assert_ok(launcher.run(*split(images, output, 8, 1)))
    return output


@pytest.fixture(scope="session")
def two_processes(images, launcher, tmp_path_factory) -> Path:
    """A run of two processes that was never stopped."""
    output = tmp_path_factory.mktemp("two")
    assert_ok(*launcher.run_ranks(*flags(images, output)))
    return output


def split(images: Path, output: Path, batch_size: int, accum_iter: int) -> list[object]:
    return flags(
        images, output, epochs=3, batch_size=batch_size, accum_iter=accum_iter, lr=None, blr=0.016
    )


def test_two_processes_with_half_the_batch_equal_one_with_all_of_it(
    images, one_process, launcher, tmp_path
):
    assert_ok(*launcher.run_ranks(*split(images, tmp_path / "run", 4, 1)))
    assert_close_end(tmp_path / "run", one_process)


def test_several_processes_write_nothing_to_stderr(images, launcher, tmp_path):
    for result in launcher.run_ranks(*flags(images, tmp_path, epochs=2)):
        assert (result.code, result.err) == (0, "")


def test_accumulation_over_half_the_batch_equals_all_of_it(images, one_process, launcher, tmp_path):
    assert_ok(launcher.run(*split(images, tmp_path, 4, 2)))
    assert_close_end(tmp_path, one_process)


def test_two_processes_that_accumulate_equal_one_with_all_of_the_batch(
    images, one_process, launcher, tmp_path
):
    assert_ok(*launcher.run_ranks(*split(images, tmp_path, 2, 2)))
    assert_close_end(tmp_path, one_process)


# --- kill -9 -------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_like_one_never_stopped(
    whole, images, launcher, tmp_path
):
    draw, kills = random.Random(0), 0
    command = flags(images, tmp_path, num_workers=1)
    while True:
        process = launcher.start(*command)
        # Killed after a random number of steps and a random moment, at the start too.
        steps, delay = (draw.randint(0, 4), draw.uniform(0, 0.2)) if kills < 12 else (99, 0)
        while process.out.read_text().count("Epoch") < steps and process.ended(0.005) is None:
            pass
        if process.ended(delay + 0.001) is not None:
            break
        process.signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        kills += 1
    assert_ok(process.wait())
    assert kills >= 6
    assert_same_end(tmp_path, whole)
    assert {path.name for path in tmp_path.glob("*.pth*")} == {
        path.name for path in whole.glob("*.pth")
    }
    assert curve(tmp_path, "train/loss") == curve(whole, "train/loss")


def die_in_a_write(name: str, count: int, moment: str) -> None:
    """Kill the process in its `count`th write of a checkpoint of a certain name."""
    import io
    import os
    import signal

    import torch

    save, replace, writes = torch.save, os.replace, []

    def half_save(state, file):
        writes.append(os.path.basename(file.name).startswith(f"{name}."))
        if moment != "half written" or sum(writes) < count:
            return save(state, file)
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_around_replace(source, target):
        dies = os.path.basename(source).startswith(f"{name}.") and sum(writes) == count
        if dies and moment == "not yet renamed":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if dies and moment == "just renamed":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = half_save, kill_around_replace


@pytest.mark.parametrize("moment", ["half written", "not yet renamed", "just renamed"])
def test_a_kill_in_the_middle_of_a_write_leaves_a_checkpoint_to_go_on_from(
    whole, images, launcher, tmp_path, moment
):
    fault = code_of(die_in_a_write, name="checkpoint.pth", count=4, moment=moment)
    assert launcher.run(*flags(images, tmp_path), before=fault).code == -signal.SIGKILL
    left = load(tmp_path / "checkpoint.pth")
    # Writes 1 to 4: after steps 2 and 4, at the end of epoch 1, after step 2 of epoch 2.
    position = (1, 2) if moment == "just renamed" else (1, 0)
    assert (left["epoch"], left["step"]) == position
    assert_ok(launcher.run(*flags(images, tmp_path)))
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("moment", ["not yet renamed", "just renamed"])
def test_a_kill_between_the_checkpoints_of_an_epoch_loses_none(
    whole, images, launcher, tmp_path, moment
):
    fault = code_of(die_in_a_write, name="checkpoint-1.pth", count=1, moment=moment)
    assert launcher.run(*flags(images, tmp_path), before=fault).code == -signal.SIGKILL
    assert_ok(launcher.run(*flags(images, tmp_path)))
    assert same(
        load(tmp_path / "checkpoint-1.pth")["model"], load(whole / "checkpoint-1.pth")["model"]
    )
    assert not list(tmp_path.glob("*.tmp"))
    assert_same_end(tmp_path, whole)


def full_disk() -> None:
    """What is written atomically goes to a disk without space."""
    import util.atomic

    def on_a_full_disk(path):
        link = path.with_name(path.name + ".tmp")
        link.symlink_to("/dev/full")
        return link

    util.atomic.temporary_name = on_a_full_disk


def small_files(limit: int) -> None:
    """Let no file grow over so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_the_log_keeps_its_lines_when_they_cannot_be_written_again(
    whole, images, launcher, tmp_path
):
    output = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(output / "checkpoint-1.pth", output / "checkpoint.pth")
    result = launcher.run(*flags(images, output), before=code_of(small_files, limit=100))
    assert result.code == 1
    assert log_lines(output)[:2] == log_lines(whole)[:2]


def test_half_a_line_at_the_end_of_the_log_is_dropped(whole, images, launcher, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(output / "checkpoint-1.pth", output / "checkpoint.pth")
    text = (output / "log.txt").read_text()
    (output / "log.txt").write_text(text[: text.index('"epoch": 2')])
    assert_ok(launcher.run(*flags(images, output)))
    assert_same_end(output, whole)


def test_a_killed_worker_ends_all_and_torchrun_can_start_them_again(
    images, launcher, tmp_path, two_processes
):
    process = launcher.torchrun(*flags(images, tmp_path), restarts=1)
    process.wait_for("Epoch 2/4  [1/3]")
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait().code == 0
    assert_same_end(tmp_path, two_processes)


# --- asked to stop -------------------------------------------------------------------------------


def workers(process: Process) -> list[int]:
    """The processes that torchrun has started, in order of rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    def rank(pid: str) -> int:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next(int(v[5:]) for v in variables if v.startswith(b"RANK="))

    return [int(pid) for pid in sorted(children, key=rank)]


def saved_position(output: Path) -> tuple[int, int]:
    content = load(output / "checkpoint.pth")
    return content["epoch"], content["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on_as_if_never_stopped(
    whole, images, launcher, tmp_path, number
):
    command = flags(images, tmp_path, save_steps=0)
    process = launcher.start(*command)
    process.wait_for("Epoch 2/4  [2/6]")
    process.signal(number)
    result = process.wait()
    assert_ok(result)
    assert "stopped by a signal at" in result.out
    epoch, step = saved_position(tmp_path)
    assert (1, 2) <= (epoch, step) < (4, 0)

    result = launcher.run(*command)
    assert_ok(result)
    assert f"from epoch {epoch + 1}, step {step}" in result.out
    assert_same_end(tmp_path, whole)
    assert curve(tmp_path, "train/loss") == curve(whole, "train/loss")


def test_a_signal_to_the_data_workers_too_saves_as_well(whole, images, launcher, tmp_path):
    command = flags(images, tmp_path, save_steps=0, num_workers=1)
    process = launcher.start(*command)
    process.wait_for("Epoch 2/4  [2/6]")
    os.killpg(process.pid, signal.SIGTERM)
    assert_ok(process.wait())
    assert (1, 2) <= saved_position(tmp_path) < (4, 0)
    assert_ok(launcher.run(*command))
    assert_same_end(tmp_path, whole)


def test_a_signal_at_the_last_step_of_an_epoch_saves_too(images, launcher, tmp_path):
    # One step an epoch, so that any is the last.
    settings = {"batch_size": 24, "epochs": 6, "save_steps": 0}
    assert_ok(launcher.run(*flags(images, tmp_path / "never", **settings)))
    process = launcher.start(*flags(images, tmp_path / "run", **settings))
    process.wait_for("Epoch 2/6")
    process.signal(signal.SIGTERM)
    result = process.wait()
    assert_ok(result)
    assert "stopped by a signal" in result.out
    assert_ok(launcher.run(*flags(images, tmp_path / "run", **settings)))
    assert_same_end(tmp_path / "run", tmp_path / "never")


def test_a_signal_to_one_of_two_processes_stops_both(images, launcher, tmp_path, two_processes):
    command = flags(images, tmp_path / "run", save_steps=0)
    first, second = launcher.start_ranks(*command)
    first.wait_for("Epoch 2/4  [1/3]")
    second.signal(signal.SIGUSR1)
    result = first.wait()
    assert_ok(result, second.wait())
    assert "stopped by a signal at" in result.out
    assert saved_position(tmp_path / "run") >= (1, 1)
    assert_ok(*launcher.run_ranks(*command))
    assert_same_end(tmp_path / "run", two_processes)


def test_sigterm_to_torchrun_saves(images, launcher, tmp_path, two_processes):
    command = flags(images, tmp_path / "run", save_steps=0)
    process = launcher.torchrun(*command)
    process.wait_for("Epoch 2/4  [1/3]")
    process.signal(signal.SIGTERM)
    assert "stopped by a signal at" in process.wait().out
    assert saved_position(tmp_path / "run") >= (1, 1)
    assert_ok(*launcher.run_ranks(*command))
    assert_same_end(tmp_path / "run", two_processes)


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture
def stopped(images, launcher, tmp_path) -> Path:
    """The folder of a run like `whole` that was killed after step 4 of its second epoch."""
    output = tmp_path / "stopped"
    fault = code_of(die_in_a_write, name="checkpoint.pth", count=5, moment="just renamed")
    assert launcher.run(*flags(images, output), before=fault).code == -signal.SIGKILL
    assert saved_position(output) == (1, 4)
    return output


def test_a_finished_run_started_again_changes_nothing(whole, images, launcher, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    assert_ok(launcher.run(*flags(images, output)))
    assert_same_end(output, whole)
    assert curve(output, "train/loss") == curve(whole, "train/loss")
    assert len(events(output).Images("pictures/reconstruction")) == 4


def test_batch_and_accumulation_may_be_exchanged_in_mid_run(whole, images, launcher, stopped):
    result = launcher.run(*flags(images, stopped, batch_size=2, accum_iter=2))
    assert_ok(result)
    assert "from epoch 2, step 4" in result.out
    assert_close_end(stopped, whole)


def test_a_run_may_go_on_with_more_processes(whole, images, launcher, stopped):
    results = launcher.run_ranks(*flags(images, stopped, batch_size=2))
    assert_ok(*results)
    assert "from epoch 2, step 4" in results[0].out
    assert_close_end(stopped, whole)


def test_a_checkpoint_of_another_folder_can_be_resumed(whole, images, launcher, tmp_path):
    result = launcher.run(*flags(images, tmp_path, resume=whole / "checkpoint-1.pth"))
    assert_ok(result)
    assert "from epoch 3, step 0" in result.out
    assert same(weights(tmp_path), weights(whole))
    assert [line["epoch"] for line in log_lines(tmp_path)] == [2, 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"mask_ratio": 0.5},
        {"model": "convmae_convvit_small_patch16"},
        {"epochs": 5},
        {"lr": 2e-3, "seed": 1},
        {"input_size": (32, 64)},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_another_run_in_the_same_folder_is_refused_with_what_differs(
    whole, images, launcher, changed
):
    result = launcher.run(*flags(images, whole, **changed))
    assert_one_line(result, 2, "another run", "--output_dir", "--finetune")
    for name in DEFAULTS | {"mask_ratio": 0, "seed": 0, "norm_pix_loss": 0}:
        assert (f"--{name} " in result.err) == (name in changed), name


def test_another_effective_batch_is_refused_with_how_it_is_computed(whole, images, launcher):
    result = launcher.run(*flags(images, whole, batch_size=8))
    assert_one_line(result, 2, "batch_size x accum_iter x processes 4 there, 8 here")


def test_resume_none_does_not_overwrite_a_run(whole, images, launcher):
    before = (whole / "checkpoint.pth").read_bytes()
    result = launcher.run(*flags(images, whole, resume="none"))
    assert_one_line(result, 2, "--resume none", str(whole))
    assert (whole / "checkpoint.pth").read_bytes() == before


def truncate(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def keep_weights(good: Path, path: Path) -> None:
    torch.save({"model": load(good)["model"]}, path)


def keep_bare_weights(good: Path, path: Path) -> None:
    torch.save(load(good)["model"], path)


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def add_hostile(good: Path, path: Path) -> None:
    torch.save(load(good) | {"extra": Hostile(path.with_name("marker"))}, path)


def only_hostile(good: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(path.with_name("marker"))))


def of_another_program(good: Path, path: Path) -> None:
    content = load(good)
    del content["step"], content["random_state"]
    torch.save(content | {"args": argparse.Namespace(**content["args"])}, path)


BAD_CHECKPOINTS = {
    "missing": (lambda good, path: None, "does not exist"),
    "a folder": (lambda good, path: path.mkdir(), "is not a file"),
    "empty": (lambda good, path: path.touch(), "truncated"),
    "truncated": (truncate, "truncated"),
    "a text": (lambda good, path: path.write_text("hello\n" * 100), "no PyTorch file"),
    "weights in a dictionary": (keep_weights, "no training state"),
    "weights": (keep_bare_weights, "no training state"),
    "another program's": (of_another_program, "no training state"),
    "hostile in part": (add_hostile, "could run code"),
    "hostile": (only_hostile, "could run code"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line(whole, images, launcher, tmp_path, kind):
    make, phrase = BAD_CHECKPOINTS[kind]
    make(whole / "checkpoint.pth", tmp_path / "bad.pth")
    result = launcher.run(*flags(images, tmp_path / "run", resume=tmp_path / "bad.pth"))
    assert_one_line(result, 2, phrase, str(tmp_path / "bad.pth"))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["truncated", "hostile in part"])
def test_a_bad_checkpoint_in_the_output_folder_is_refused_and_kept(
    whole, images, launcher, tmp_path, kind
):
    BAD_CHECKPOINTS[kind][0](whole / "checkpoint.pth", tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    assert_one_line(launcher.run(*flags(images, tmp_path)), 2, BAD_CHECKPOINTS[kind][1])
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert not (tmp_path / "marker").exists()


def test_fewer_images_than_before_are_refused(launcher, tmp_path, stopped):
    few = write_images(tmp_path / "few", 12)
    result = launcher.run(*flags(few, stopped))
    assert_one_line(result, 2, "cannot go on at step 4 of an epoch of 24 images", "12 now")


# --- full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "limited"])
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(
    whole, images, launcher, stopped, form
):
    fault = code_of(small_files, limit=1 << 20) if form == "limited" else code_of(full_disk)
    result = launcher.run(*flags(images, stopped, save_freq=100), before=fault)
    reason = {"full": "No space left on device", "limited": "File too large"}[form]
    assert_one_line(result, 1, "cannot write", reason, "the previous one is intact")
    assert saved_position(stopped) == (1, 4)
    assert_ok(launcher.run(*flags(images, stopped)))
    assert_same_end(stopped, whole)


def test_a_log_that_cannot_be_written_does_not_end_the_run(whole, images, launcher, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "log.txt").symlink_to("/dev/full")
    result = launcher.run(*flags(images, output))
    assert result.code == 0
    (warning,) = [line for line in result.err.splitlines() if "log.txt" in line]
    assert warning.startswith("warning: ") and "No space left on device" in warning
    assert same(weights(output), weights(whole))


def test_a_full_disk_ends_all_processes(images, launcher, tmp_path):
    first, second = launcher.run_ranks(*flags(images, tmp_path), before=code_of(full_disk))
    assert (first.code, second.code) == (1, 1)
    last = first.err.splitlines()[-1]
    assert "cannot write" in last and "No space left on device" in last


# --- steps that are not finite -------------------------------------------------------------------


def spoil(what: str, ranks: list[str], first: int, last: int, folder: str) -> None:
    """Make the loss NaN, or a gradient infinite, in some training steps of some processes.

    At its end each process leaves its weights in `folder`.
    """
    import atexit
    import os

    import torch

    from models_convmae import MaskedAutoencoderConvViT as Model

    rank, forward, models, calls = os.environ.get("RANK", "0"), Model.forward, [], []

    def bad() -> bool:
        return rank in ranks and first <= len(calls) <= last

    def spoiled(self, *args, **kwargs):
        loss, pred, mask = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if what == "loss" and bad():
                loss = loss * float("nan")
        if not models:
            models.append(self)
            if what == "gradient":
                weight = self.decoder_pred.weight
                weight.register_hook(lambda grad: grad * float("inf") if bad() else grad)
        return loss, pred, mask

    def leave_weights():
        torch.save(models[0].state_dict(), f"{folder}/rank{rank}.pth")

    Model.forward = spoiled
    atexit.register(leave_weights)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_all_processes_skip_a_step_that_one_of_them_cannot_take(images, launcher, tmp_path, what):
    fault = code_of(spoil, what=what, ranks=["1"], first=5, last=6, folder=str(tmp_path))
    results = launcher.run_ranks(*flags(images, tmp_path), before=fault)
    assert_ok(*results)
    lines = results[0].out.splitlines()
    assert any("Epoch 2/4  [1/3]" in line and "skipped" not in line for line in lines)
    assert any("Epoch 2/4  [2/3]" in line and "skipped_steps 1" in line for line in lines)
    assert any("Epoch 4/4  [3/3]" in line and "skipped_steps 2" in line for line in lines)
    assert curve(tmp_path, "train/skipped_steps")[-1] == (4000, 2)
    assert all(np.isfinite(line["train_loss"]) for line in log_lines(tmp_path))

    assert_finite(tmp_path)
    first, second = (load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    assert same(first, second)
    assert same(first, weights(tmp_path))


def test_a_skipped_step_changes_no_weight(images, launcher, tmp_path):
    fault = code_of(spoil, what="loss", ranks=["0"], first=7, last=12, folder=str(tmp_path))
    assert_ok(launcher.run(*flags(images, tmp_path, save_freq=1), before=fault))
    first, second, third = (load(tmp_path / f"checkpoint-{epoch}.pth") for epoch in range(3))
    assert same(first["model"], second["model"])
    assert not same(second["model"], third["model"])


def test_ten_skipped_steps_in_a_row_stop_all_processes(images, launcher, tmp_path):
    fault = code_of(spoil, what="loss", ranks=["1"], first=3, last=99, folder=str(tmp_path))
    first, second = launcher.run_ranks(*flags(images, tmp_path, epochs=8), before=fault)
    assert (first.code, second.code) == (1, 1)
    last = first.err.splitlines()[-1]
    for phrase in ("failed: ", "10 steps in a row", "--clip_grad", "--blr", "checkpoint is intact"):
        assert phrase in last
    assert "Traceback" not in first.err + second.err
    assert "skipped_steps 9" in first.out
    assert_finite(tmp_path)


def test_after_ten_skipped_steps_a_run_can_go_on(images, launcher, tmp_path):
    # 24 steps an epoch and a report after 20: states with ten skipped steps in a row are saved.
    command = flags(images, tmp_path, batch_size=1, print_freq=20, save_steps=2, epochs=2)
    fault = code_of(spoil, what="loss", ranks=["0"], first=5, last=99, folder=str(tmp_path))
    assert_one_line(launcher.run(*command, before=fault), 1, "10 steps in a row", "--clip_grad 1.0")
    assert_finite(tmp_path)
    assert_ok(launcher.run(*command, "--clip_grad", 1.0))
    assert_finite(tmp_path)


# --- images of every kind ------------------------------------------------------------------------


def write_odd_images(folder: Path) -> list[Path]:
    """24 files that are pictures of some kind and 6 that are none; returns the latter."""
    folder.mkdir()
    rgb = picture(1, 48, 40)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sixteen = (np.asarray(rgb.convert("L"), np.uint16) << 8) + 7
    for i in range(3):
        rgb.save(folder / f"plain{i}.jpg")
        rgb.convert("RGBA").save(folder / f"rgba{i}.png")
        rgb.convert("CMYK").save(folder / f"cmyk{i}.jpg")
        rgb.quantize(32).save(folder / f"palette{i}.png", transparency=3)
        rgb.convert("L").save(folder / f"gray{i}.webp")
        rgb.convert("1").save(folder / f"bilevel{i}.tif")
        Image.fromarray(sixteen).save(folder / f"sixteen{i}.png")
        rgb.save(folder / f"rotated{i}.jpg", exif=exif)
    png, jpeg = (folder / "rgba0.png").read_bytes(), (folder / "plain0.jpg").read_bytes()
    bad = {
        "empty.png": b"",
        "text.jpg": b"this is no picture\n",
        "truncated.png": png[: len(png) // 2],
        "truncated.jpeg": jpeg[: len(jpeg) // 2],
        "corrupt.png": png[:60] + bytes(40) + png[100:],
        "header.tiff": b"II*\0",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not counted: its name is no picture's")
    return [folder / name for name in bad]


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("odd") / "images"
    return folder, write_odd_images(folder)


def assert_each_named_once(err: str, bad: list[Path]) -> None:
    *lines, left_out = sorted(err.splitlines(), key=lambda line: "left out" in line)
    assert "1 of .txt" in left_out
    assert sorted(line.split()[0] for line in lines) == sorted(map(str, bad))
    assert all("cannot be decoded" in line for line in lines)


def test_files_that_are_no_pictures_are_skipped_and_named_once(odd_images, launcher, tmp_path):
    folder, bad = odd_images
    settings = {"batch_size": 5, "max_bad_images": 0.2, "num_workers": 1}
    result = launcher.run(*flags(folder, tmp_path, **settings))
    assert_ok(result)
    assert "30 images of" in result.out
    assert "bad_images 6" in result.out.splitlines()[-3]
    assert_each_named_once(result.err, bad)
    assert_finite(tmp_path)


def test_several_processes_count_and_name_a_bad_file_once(odd_images, launcher, tmp_path):
    folder, bad = odd_images
    settings = {"batch_size": 5, "max_bad_images": 0.2}
    results = launcher.run_ranks(*flags(folder, tmp_path, **settings))
    assert_ok(*results)
    assert "bad_images 6" in results[0].out.splitlines()[-3]
    named = [line for r in results for line in r.err.splitlines() if line.startswith(str(folder))]
    assert_each_named_once("\n".join(named), bad)


def test_too_many_bad_files_stop_the_run(odd_images, launcher, tmp_path):
    folder, bad = odd_images
    result = launcher.run(*flags(folder, tmp_path, batch_size=5))
    assert result.code == 1
    *named, last = result.err.splitlines()
    assert last.startswith("failed: ")
    assert "of 30 images cannot be decoded, more than --max_bad_images 0.01" in last
    assert {line.split()[0] for line in named if "left out" not in line} <= set(map(str, bad))


def test_a_folder_of_bad_files_alone_is_refused_in_one_line(launcher, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"no picture")
    result = launcher.run(*flags(tmp_path / "images", tmp_path / "run"))
    assert_one_line(result, 2, "can be decoded", str(tmp_path / "images"))


# --- bad use -------------------------------------------------------------------------------------

BAD_FLAGS = {
    "nothing masked": ({"mask_ratio": 0}, ["--mask_ratio", "above 0 and below 1"]),
    "all masked": ({"mask_ratio": 1.0}, ["--mask_ratio", "above 0 and below 1"]),
    "nothing visible": ({"mask_ratio": 0.999}, ["--mask_ratio"]),
    "no number": ({"mask_ratio": "most"}, ["--mask_ratio", "'most'"]),
    "size does not divide": ({"input_size": 30}, ["--input_size", "30"]),
    "three sizes": ({"input_size": (32, 32, 32)}, ["--input_size", "one or two", "3"]),
    "unknown model": (
        {"model": "convmae_convit_tiny_patch16"},
        ["--model", "did you mean convmae_convvit_tiny_patch16?"],
    ),
    "unknown flag": ({"batchsize": 8}, ["--batchsize", "did you mean --batch_size?"]),
    "shortened flag": ({"accum": 8}, ["--accum", "did you mean --accum_iter?"]),
    "no GPU": ({"device": "cuda"}, ["--device cuda", "--device cpu"]),
    "fp16 on a CPU": ({"amp": "fp16"}, ["--amp fp16", "bf16 or none"]),
    "warm-up too long": ({"warmup_epochs": 4}, ["--warmup_epochs 4", "--epochs 4"]),
    "no epochs": ({"epochs": 0}, ["--epochs", "at least 1"]),
    "negative rate": ({"lr": -1}, ["--lr"]),
    "too few images": ({"batch_size": 25}, ["24 images", "25 x 1 x 1", "--batch_size"]),
    "heads": ({"num_heads": 3}, ["--num_heads", "width 128 of stage 3", "by 3 heads"]),
    "decoder's heads": ({"decoder_num_heads": 5}, ["decoder_embed_dim 64", "decoder_num_heads 5"]),
    "two widths": ({"embed_dim": (8, 16)}, ["--embed_dim", "expected 3 arguments"]),
    "even kernel": ({"kernel_size": 4}, ["--kernel_size", "4 must be odd, such as 5"]),
    "no hidden channel": ({"mlp_ratio": (4, 4, 1e-3)}, ["--mlp_ratio", "stage 3", "no hidden"]),
    "crop upside down": ({"crop_scale": (1.0, 0.2)}, ["--crop_scale"]),
    "seed too large": ({"seed": 2**70}, ["--seed"]),
    "no such data": ({"data_path": "/does/not/exist"}, ["/does/not/exist does not exist"]),
    "no data": ({"data_path": None}, ["--data_path", "--demo"]),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_bad_use_is_one_line_before_anything_is_built(images, launcher, tmp_path, kind):
    values, phrases = BAD_FLAGS[kind]
    result = launcher.run(*flags(images, tmp_path / "run", **values))
    assert_one_line(result, 2, *phrases)
    assert result.out == ""
    assert not list(tmp_path.glob("run/*"))


def test_bad_use_is_the_same_without_a_launcher(images, tmp_path):
    result = call(MAIN, *flags(images, tmp_path / "run", mask_ratio=1))
    assert_one_line(result, 2, "--mask_ratio: 1 must lie above 0 and below 1")


@pytest.mark.parametrize("content", [[], ["notes.txt", "labels.csv"], [".hidden.png"]])
def test_a_folder_without_images_is_refused(launcher, tmp_path, content):
    (tmp_path / "images").mkdir()
    for name in content:
        (tmp_path / "images" / name).touch()
    result = launcher.run(*flags(tmp_path / "images", tmp_path / "run"))
    assert_one_line(result, 2, f"no image below {tmp_path / 'images'}")
    assert not list(tmp_path.glob("run/*"))


def test_a_file_in_place_of_the_output_folder_is_refused(images, launcher, tmp_path):
    (tmp_path / "file").touch()
    result = launcher.run(*flags(images, tmp_path / "file" / "run"))
    assert_one_line(result, 2, "--output_dir", "cannot be written", "Not a directory")


def test_a_file_in_place_of_the_log_folder_is_refused(images, launcher, tmp_path):
    (tmp_path / "file").touch()
    result = launcher.run(*flags(images, tmp_path / "run", log_dir=tmp_path / "file" / "logs"))
    assert_one_line(result, 2, "--log_dir", "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_refused(images, launcher, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    result = launcher.run(*flags(images, tmp_path / "run"))
    assert_one_line(result, 2, "--output_dir", "cannot be written", "Permission denied")


# --- help, console, files ------------------------------------------------------------------------


def test_help_is_grouped_and_shows_defaults(launcher):
    result = launcher.run("--help")
    assert (result.code, result.err) == (0, "")
    for group in ("data", "augmentation", "model", "optimization", "run"):
        assert f"\n{group}:\n" in result.out
    text = " ".join(result.out.split())
    assert "images per GPU and micro-batch" in text
    assert "(default: 0.75)" in text
    assert "(default: what --finetune holds, else convmae_convvit_base_patch16)" in text


def test_help_of_a_flag_names_one_default_at_most(launcher):
    text = " ".join(launcher.run("--help").out.split())
    assert "(default: None)" not in text


def test_output_to_a_file_is_plain_lines(whole_run):
    result, output = whole_run
    assert result.err == ""
    assert "\r" not in result.out and "\x1b" not in result.out
    lines = result.out.splitlines()
    assert lines[0].startswith("convmae_convvit_tiny_patch16: ")
    assert "M parameters, 32x32 pixels, 16 of 64 patches visible" in lines[0]
    assert lines[1].startswith("24 images of ")
    progress = [line for line in lines if line.startswith("Epoch ")]
    assert len(progress) == 4 * STEPS
    assert progress[0].startswith("Epoch 1/4  [1/6]")
    for name in ("lr", "loss", "grad_norm", "images_per_s", "data_wait", "memory_mb", "left"):
        assert all(f"  {name} " in line for line in progress)
    assert lines[-2].startswith("done: ") and str(output) in lines[-2]


def test_a_terminal_gets_a_progress_bar(images, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    command = [sys.executable, MAIN, *flags(images, tmp_path, epochs=1, warmup_epochs=0)]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stdout=slave, stderr=slave
    )
    os.close(slave)
    text = read_terminal(master)
    assert process.wait(10) == 0, text
    assert "Epoch 1/1: 100%|" in text and "6/6" in text
    assert "\r" in text and "loss" in text and "left 0:00:00" in text
    assert "Epoch 1/1  [" not in text


def read_terminal(master: int) -> str:
    """What a program writes to a terminal until it ends, a minute at most."""
    parts, end = [], time.monotonic() + 60
    while select.select([master], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            parts.append(os.read(master, 1 << 16))
        except OSError:  # the other side is closed
            break
    os.close(master)
    return b"".join(parts).decode()


def test_checkpoints_are_kept_every_save_freq_epochs_and_the_last_is_there_once(whole):
    names = ["checkpoint-1.pth", "checkpoint.pth"]
    assert sorted(path.name for path in whole.glob("*.pth*")) == names
    assert [load(whole / name)["epoch"] for name in names] == [2, 4]


def test_the_newest_checkpoints_stay_and_what_is_of_another_run(images, launcher, tmp_path):
    (tmp_path / "checkpoint-99.pth").write_text("of another run")
    assert_ok(launcher.run(*flags(images, tmp_path, epochs=5, save_freq=1, keep=2)))
    assert sorted(path.name for path in tmp_path.glob("*.pth*")) == [
        "checkpoint-2.pth",
        "checkpoint-3.pth",
        "checkpoint-99.pth",
        "checkpoint.pth",
    ]


def test_a_run_can_be_repeated_from_its_args_json(images, whole, launcher, tmp_path):
    record = json.loads((whole / "args.json").read_text())
    assert record["versions"]["torch"] == version("torch")
    assert record["command"][-2:] == list(map(str, flags(images, whole)[-2:]))
    result = launcher.run("--config", whole / "args.json", "--output_dir", tmp_path)
    assert_ok(result)
    assert same(weights(tmp_path), weights(whole)) and outcomes(tmp_path) == outcomes(whole)


def test_a_checkpoint_holds_all_that_a_run_needs(whole, images):
    content = load(whole / "checkpoint.pth")
    assert content.keys() >= {"model", "optimizer", "scaler", "epoch", "step", "random_state"}
    assert (content["epoch"], content["step"]) == (4, 0)
    assert content["model"]["patch_embed1.proj.weight"].shape[1:] == (3, 2, 2)
    assert type(content["args"]) is dict
    assert content["args"]["data_path"] == str(images)
    assert content["args"]["mask_ratio"] == 0.75
    assert content["args"]["lr"] == 1e-3


def test_another_seed_gives_other_weights(whole, images, launcher, tmp_path):
    assert_ok(launcher.run(*flags(images, tmp_path, seed=1)))
    assert not same(weights(tmp_path), weights(whole))


def test_gray_images_of_two_sizes_in_bfloat16_train(images, launcher, tmp_path):
    settings = {"input_size": (32, 48), "in_chans": 1, "amp": "bf16", "clip_grad": 1.0}
    result = launcher.run(*flags(images, tmp_path, "--norm_pix_loss", **settings))
    assert_ok(result)
    assert "32x48 pixels" in result.out and "bfloat16 on cpu" in result.out
    assert_finite(tmp_path)


# --- the demo ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo(launcher, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    result = launcher.run("--demo", "--epochs", 2, "--warmup_epochs", 1, "--output_dir", output)
    assert_ok(result)
    assert result.err == ""
    return output


def test_the_demo_writes_real_images_in_imagenet_layout(demo):
    files = sorted((demo / "digits").glob("*/*/*.png"))
    assert len(files) == 1797
    assert {path.parts[-3] for path in files} == {"train", "val"}
    assert {path.parts[-2] for path in files} == set("0123456789")
    assert Image.open(files[0]).size == (32, 32)


def test_the_demo_leaves_what_a_run_leaves(demo):
    names = {path.name for path in demo.iterdir()}
    expected = {"checkpoint.pth", "args.json", "log.txt", "reconstruction.png", "loss.png"}
    assert expected <= names
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    assert not any(name.endswith(".tmp") or name.startswith(".") for name in names)


def test_the_log_has_a_line_an_epoch_with_maes_keys(demo):
    lines = log_lines(demo)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(line.keys() >= {"train_lr", "train_loss", "epoch"} for line in lines)
    assert all(0 < line["data_wait"] < 1 for line in lines)


def test_the_loss_falls(demo):
    first, second = (line["train_loss"] for line in log_lines(demo))
    assert second < 0.95 * first


def test_the_pictures_can_be_looked_at(demo):
    grid = Image.open(demo / "reconstruction.png").convert("RGB")
    assert 500 < grid.width < 2000 and 500 < grid.height < 2000
    assert len(np.unique(np.asarray(grid))) > 20
    loss = Image.open(demo / "loss.png").convert("RGB")
    assert loss.width > 400 and loss.height > 200


@pytest.mark.parametrize(
    "tag",
    [
        *(f"train/{n}" for n in ("loss", "lr", "grad_norm")),
        *(f"perf/{n}" for n in ("images_per_s", "data_wait", "memory_mb")),
    ],
)
def test_tensorboard_shows_curves_against_thousandths_of_epochs(whole, demo, tag):
    steps = [step for step, _ in curve(whole, tag)]
    assert steps == [round(1000 * (i + 1) / STEPS) for i in range(4 * STEPS)]
    *_, (last, value) = curve(demo, tag)
    assert last == 2000
    assert np.isfinite(value) and value > 0


def test_tensorboard_shows_a_reconstruction_an_epoch(demo):
    pictures = events(demo).Images("pictures/reconstruction")
    assert [picture.step for picture in pictures] == [1000, 2000]
    assert all(picture.width > 500 and picture.height > 500 for picture in pictures)


@pytest.mark.parametrize(("freq", "drawn"), [(2, [2000, 3000]), (0, [3000])])
def test_pictures_come_every_picture_freq_epochs_and_after_the_last(
    freq, drawn, images, launcher, tmp_path
):
    assert_ok(launcher.run(*flags(images, tmp_path, epochs=3, picture_freq=freq)))
    assert [p.step for p in events(tmp_path).Images("pictures/reconstruction")] == drawn
    assert (tmp_path / "reconstruction.png").exists()


def test_other_flags_override_the_demos(launcher, tmp_path):
    result = launcher.run("--demo", "--epochs", 3, "--warmup_epochs", 3, "--output_dir", tmp_path)
    assert_one_line(result, 2, "--warmup_epochs 3", "--epochs 3")


# --- python -m tools.visualize --------------------------------------------------------------------


def visualize(launcher: Launcher, *command: object) -> Result:
    return launcher.run(*command, program="tools.visualize")


def test_visualize_draws_images_of_several_formats(whole, launcher, tmp_path):
    names = ["a.png", "b.jpg", "c.webp", "d.bmp", "e.tiff"]
    for i, name in enumerate(names):
        picture(i).save(tmp_path / name)
    output = tmp_path / "grid.png"
    files = [tmp_path / name for name in names]
    command = ["-m", "tools.visualize", "--checkpoint", whole / "checkpoint.pth"]
    result = call(*command, "--images", *files, "--output", output)
    assert_ok(result)
    assert result.err == "" and "5 images" in result.out
    # Three rows of two triples; each picture is 96 pixels wide.
    grid = Image.open(output)
    assert 600 < grid.width < 700 and 300 < grid.height < 400


def test_complementary_masks_are_a_flag_that_a_run_keeps(images, launcher, tmp_path):
    command = flags(images, tmp_path, "--complementary", epochs=2)
    result = launcher.run(*command)
    assert_ok(result)
    assert "16 of 64 patches visible in each of 4 masks" in result.out
    assert load(tmp_path / "checkpoint.pth")["args"]["complementary"] is True
    other = launcher.run(*flags(images, tmp_path, epochs=2))
    assert_one_line(other, 2, "(--complementary True there, None here)")
    command = ["--checkpoint", tmp_path / "checkpoint.pth", "--images", images, "--max_images", 1]
    assert_ok(visualize(launcher, *command, "--output", tmp_path / "grid.png"))
    assert Image.open(tmp_path / "grid.png").width > 0


def test_a_share_to_predict_is_a_flag_of_which_all_is_the_same_as_none(
    whole, images, launcher, tmp_path
):
    result = launcher.run(*flags(images, tmp_path / "half", epochs=2, predict_share=0.5))
    assert_ok(result)
    assert "16 of 64 patches visible, 24 predicted" in result.out
    assert_ok(launcher.run(*flags(images, tmp_path / "all", predict_share=1)))
    assert_same_end(tmp_path / "all", whole)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> list[Path]:
    """The weights of two small teachers."""
    folder, paths = tmp_path_factory.mktemp("teachers"), []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(folder / f"{seed}.pth")
        torch.save(timm.create_model("test_vit").state_dict(), paths[-1])
    return paths


def test_a_run_with_a_teacher_goes_on_bit_for_bit_and_with_no_other(
    images, teachers, launcher, tmp_path
):
    values = dict(teacher="test_vit", epochs=2, save_freq=1)
    whole, half = tmp_path / "whole", tmp_path / "half"
    result = launcher.run(*flags(images, whole, teacher_checkpoint=teachers[0], **values))
    assert_ok(result)
    assert "teacher test_vit: 0." in result.out and "GFLOP an image" in result.out
    content = load(whole / "checkpoint.pth")
    assert content["args"]["mimic_weight"] == 1.0
    names = ("loss", "loss_reconstruction", "loss_mimic", "teacher_seconds")
    shown = result.out.splitlines()[-3].split("  ")
    assert all(sum(part.startswith(f"{name} ") for part in shown) == 1 for name in names)
    for line in log_lines(whole):
        loss, *parts = (line[f"train_{name}"] for name in names[:3])
        assert loss == pytest.approx(sum(parts)) and min(parts) > 0
        assert 0 < line["teacher_seconds"] < line["epoch_seconds"] / STEPS
    assert all(seconds > 0 for _, seconds in curve(whole, "perf/teacher_seconds"))
    steps = zip(*(curve(whole, f"train/{name}") for name in names[:3]), strict=True)
    for (_, loss), *parts in steps:
        assert loss == pytest.approx(sum(value for _, value in parts))
    more = {name for name in content["model"] if name.startswith("mimic")}
    assert more == {"mimic.weight", "mimic.bias"}
    assert not any("teacher" in name for name in content["model"])

    values["resume"] = whole / "checkpoint-0.pth"
    other = launcher.run(*flags(images, half, teacher_checkpoint=teachers[1], **values))
    assert_one_line(other, 2, "weights of the teacher")
    assert_ok(launcher.run(*flags(images, half, teacher_checkpoint=teachers[0], **values)))
    resumed = load(half / "checkpoint.pth")
    assert all(same(resumed[part], content[part]) for part in content.keys() - {"args"})

    inspected = launcher.run("inspect", whole / "checkpoint.pth", program="tools.checkpoint")
    assert "teacher test_vit (weights " in inspected.out
    command = ["--checkpoint", whole / "checkpoint.pth", "--images", images, "--max_images", 1]
    assert_ok(visualize(launcher, *command, "--output", tmp_path / "grid.png"))


@pytest.fixture(scope="session")
def with_class_token(images, launcher, tmp_path_factory) -> Path:
    """A run of two epochs of a model with a class token."""
    output = tmp_path_factory.mktemp("class_token")
    assert_ok(launcher.run(*flags(images, output, "--class_token", epochs=2, save_freq=1)))
    return output


def test_a_model_with_a_class_token_can_be_looked_at_and_made_a_classifier(
    with_class_token, images, launcher, tmp_path
):
    checkpoint = with_class_token / "checkpoint.pth"
    assert load(checkpoint)["model"]["pos_embed"].shape == (1, 65, 128)
    command = ["--checkpoint", checkpoint, "--images", images, "--max_images", 1]
    assert_ok(visualize(launcher, *command, "--output", tmp_path / "grid.png"))
    model = convvit_from_checkpoint(checkpoint, num_classes=3)
    assert torch.equal(model.cls_token, load(checkpoint)["model"]["cls_token"])
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_run_with_a_class_token_goes_on_bit_for_bit(with_class_token, images, launcher, tmp_path):
    values = dict(epochs=2, save_freq=1, resume=with_class_token / "checkpoint-0.pth")
    assert_ok(launcher.run(*flags(images, tmp_path, "--class_token", **values)))
    assert same(weights(tmp_path), weights(with_class_token))


@pytest.mark.parametrize("program", ["main_finetune.py", "main_linprobe.py"])
def test_a_class_token_is_fine_tuned_and_probed(
    program, with_class_token, labeled, launcher, tmp_path
):
    start = {"finetune": with_class_token / "checkpoint.pth", "data_path": labeled, "epochs": 1}
    more = {"output_dir": tmp_path, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    line = command_line(start | more | {"warmup_epochs": 0}, "--cls_token")
    assert_ok(launcher.run(*line, program=program))
    found, pretrained = weights(tmp_path)["cls_token"], weights(with_class_token)["cls_token"]
    assert torch.equal(found, pretrained) == (program == "main_linprobe.py")


def test_flags_of_a_teacher_without_one_are_refused(images, launcher, tmp_path):
    result = launcher.run(*flags(images, tmp_path, mimic_weight=2))
    assert_one_line(result, 2, "--mimic_weight needs --teacher NAME")


def test_visualize_takes_folders(whole, images, launcher, tmp_path):
    command = ["--checkpoint", whole / "checkpoint-1.pth", "--images", images, "--max_images", 2]
    result = visualize(launcher, *command, "--output", tmp_path / "grid.png", "--columns", 1)
    assert_ok(result)
    grid = Image.open(tmp_path / "grid.png")
    assert 300 < grid.width < 350 and 200 < grid.height < 300


def keep_encoder(good: Path, path: Path) -> None:
    content = load(good)
    encoder = {k: v for k, v in content["model"].items() if not k.startswith(("decoder", "mask"))}
    torch.save(content | {"model": encoder}, path)


BAD_FOR_PICTURES = {
    "an encoder": (keep_encoder, "encoder alone"),
    "a list": (lambda good, path: torch.save([1, 2], path), "not a dictionary"),
    "truncated": (truncate, "truncated"),
    "missing": (lambda good, path: None, "does not exist"),
    "hostile": (add_hostile, "could run code"),
}


@pytest.mark.parametrize("kind", BAD_FOR_PICTURES)
def test_visualize_refuses_a_bad_checkpoint_in_one_line(whole, images, launcher, tmp_path, kind):
    make, phrase = BAD_FOR_PICTURES[kind]
    make(whole / "checkpoint.pth", tmp_path / "bad.pth")
    output = tmp_path / "grid.png"
    command = ["--checkpoint", tmp_path / "bad.pth", "--images", images, "--output", output]
    assert_one_line(visualize(launcher, *command), 2, phrase, str(tmp_path / "bad.pth"))
    assert not output.exists() and not (tmp_path / "marker").exists()


def test_visualize_draws_bare_weights_and_says_what_they_do_not_tell(
    whole, images, launcher, tmp_path
):
    keep_bare_weights(whole / "checkpoint.pth", tmp_path / "bare.pth")
    line = ["--images", images, "--max_images", 2, "--output"]
    bare = visualize(launcher, "--checkpoint", tmp_path / "bare.pth", *line, tmp_path / "bare.png")
    assert_ok(bare)
    assert "decoder_num_heads 2, norm_pix_loss False: neither shapes nor arguments" in bare.out
    told = visualize(launcher, "--checkpoint", whole / "checkpoint.pth", *line, tmp_path / "a.png")
    assert "note" not in told.out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "bare.png").read_bytes()


# --- from weights --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def continued(whole, images, launcher, tmp_path_factory) -> tuple[Result, Path]:
    """A run of other sizes that starts from weights and barely changes them."""
    output = tmp_path_factory.mktemp("continued")
    return launcher.run(*from_weights(whole, images, output)), output


def from_weights(whole: Path, images: Path, output: Path) -> list[object]:
    start = {"finetune": whole / "checkpoint.pth", "model": None, "patch_size": None}
    return flags(images, output, **start, input_size=48, epochs=1, warmup_epochs=0, lr=1e-12)


def test_a_run_at_another_size_starts_from_the_weights_of_another(whole, continued):
    result, output = continued
    assert_ok(result)
    assert "fixed, computed anew: decoder_pos_embed (8x8 to 12x12), pos_embed" in result.out
    assert "convmae_convvit_tiny_patch16" in result.out and "36 of 144 patches" in result.out
    ours, theirs = weights(output), weights(whole)
    for name in theirs.keys() - {"pos_embed", "decoder_pos_embed"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_a_run_from_weights_goes_on_by_the_same_command_without_their_file(
    continued, whole, images, launcher, tmp_path
):
    shutil.copytree(continued[1], tmp_path / "run")
    line = from_weights(whole, images, tmp_path / "run")
    moved = [Path("/gone") if x == whole / "checkpoint.pth" else x for x in line]
    result = launcher.run(*line)
    assert_ok(result)
    assert "nothing to train" in result.out and "computed anew" not in result.out
    assert_one_line(launcher.run(*moved), 2, "--finetune", "there, /gone here")


def test_an_encoder_with_a_class_token_is_gone_on_from_with_it(images, launcher, tmp_path):
    # As the v2 checkpoints: the encoder alone, with a class token and a row of the table for it.
    sizes = dict(img_size=32, patch_size=(2, 2, 1), class_token=True, num_classes=0)
    encoder = convvit_tiny_patch16(**sizes).state_dict()
    torch.save({"model": encoder}, tmp_path / "v2.pth")
    start = {"finetune": tmp_path / "v2.pth", "model": None, "patch_size": None, "lr": 1e-12}
    command = flags(images, tmp_path / "run", **start, epochs=1, warmup_epochs=0)
    assert_ok(launcher.run(*command))
    ours = weights(tmp_path / "run")
    torch.testing.assert_close(ours["cls_token"], encoder["cls_token"], rtol=0, atol=1e-6)
    assert ours["decoder_pos_embed"].shape[1] == 65


def test_a_fast_model_may_have_one_mask():
    name = "fastconvmae_convvit_base_patch16"
    for flags_, masks in ((["--no_complementary"], False), ([], True)):
        args = main_pretrain.parse_args(["--data_path", "x", "--model", name, *flags_])
        check_sizes(args, MODELS)
        with torch.device("meta"):
            assert build_model(args, MODELS).complementary is masks


def test_a_teacher_may_join_a_run_that_starts_from_weights(whole, images, launcher, tmp_path):
    start = {"finetune": whole / "checkpoint.pth", "model": None, "patch_size": None}
    start |= {"teacher": whole / "checkpoint.pth", "epochs": 1, "warmup_epochs": 0}
    assert_ok(launcher.run(*flags(images, tmp_path, **start)))
    assert "mimic.weight" in weights(tmp_path)


def test_a_decoder_that_is_to_predict_something_else_is_told_of(whole, images, launcher, tmp_path):
    start = {"finetune": whole / "checkpoint.pth", "model": None, "patch_size": None}
    command = flags(images, tmp_path, "--norm_pix_loss", **start, epochs=1, warmup_epochs=0)
    result = launcher.run(*command)
    assert "was pretrained with norm_pix_loss off, this run has norm_pix_loss True" in result.out


def test_a_folder_for_k_nn_without_its_frequency_is_refused(images, launcher, tmp_path):
    result = launcher.run(*flags(images, tmp_path, knn_path=images))
    assert_one_line(result, 2, "--knn_path needs --knn_freq")


def test_a_finished_run_names_the_data_that_it_is_given_in_vain(whole, launcher, tmp_path):
    images = write_images(tmp_path / "others", 4)
    shutil.copytree(whole, tmp_path / "run")
    result = launcher.run(*flags(images, tmp_path / "run"))
    assert_ok(result)
    assert f"there, {images} here): give another --output_dir for a new run" in result.out


def test_a_run_of_before_keeps_the_warm_up_that_was_not_given(images, launcher, tmp_path):
    command = flags(images, tmp_path, warmup_epochs=None)
    assert_ok(launcher.run(*command))
    content = load(tmp_path / "checkpoint.pth")
    content["args"]["warmup_epochs"] = 1.5
    torch.save(content, tmp_path / "checkpoint.pth")
    assert "nothing to train" in launcher.run(*command).out


BAD_STARTS = {
    "another model": ({"model": "convmae_convvit_small_patch16"}, ["is not what", "tiny"]),
    "other patches": ({"patch_size": (4, 2, 1)}, ["--patch_size 4 2 1", "2 2 1"]),
    "other channels": ({"in_chans": 1}, ["--in_chans 1", "holds: 3"]),
    "no file": ({"finetune": "/gone.pth"}, ["/gone.pth does not exist"]),
}


@pytest.mark.parametrize("kind", BAD_STARTS)
def test_weights_that_do_not_fit_the_flags_are_refused(kind, whole, images, launcher, tmp_path):
    values, phrases = BAD_STARTS[kind]
    start = {"finetune": whole / "checkpoint.pth", "model": None, "patch_size": None}
    result = launcher.run(*flags(images, tmp_path / "run", **start | values))
    assert_one_line(result, 2, *phrases)
    assert result.out == "" and not list(tmp_path.glob("run/*"))


def test_recomputed_activations_change_no_weight(whole, images, launcher, tmp_path):
    assert_ok(launcher.run(*flags(images, tmp_path, "--grad_checkpointing")))
    assert same(weights(tmp_path), weights(whole))


# --- another geometry ----------------------------------------------------------------------------

SIZES = {
    "embed_dim": (16, 24, 36), "depth": (1, 2, 1), "num_heads": 3, "mlp_ratio": (1.3, 2, 3),
    "kernel_size": 3, "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def resized(images, launcher, tmp_path_factory) -> Path:
    """A run of another geometry than its model's name stands for."""
    output = tmp_path_factory.mktemp("resized")
    line = flags(images, output, "--no_multi_scale", epochs=2, save_steps=None, **SIZES)
    assert_ok(launcher.run(*line))
    return output


def test_flags_make_a_model_of_their_geometry(resized):
    assert {name: tuple(t.shape) for name, t in weights(resized).items() if "norm" in name} == {
        name: tuple(t.shape)
        for name, t in MaskedAutoencoderConvViT(
            img_size=32, patch_size=(2, 2, 1), multi_scale=False, **SIZES
        ).state_dict().items()
        if "norm" in name
    }  # fmt: skip


def test_a_run_of_another_geometry_goes_on_by_the_same_flags_alone(resized, images, launcher):
    line = flags(images, resized, "--no_multi_scale", epochs=2, save_steps=None)
    result = launcher.run(*line, *command_line(SIZES))
    assert_ok(result)
    assert "nothing to train" in result.out
    refused = launcher.run(*line, *command_line(SIZES | {"decoder_num_heads": 4}))
    assert_one_line(refused, 2, "--decoder_num_heads 3 there, 4 here")


def test_the_geometry_of_a_checkpoint_from_before_its_flags_is_read_off_the_shapes(
    whole, images, launcher, tmp_path
):
    content = load(whole / "checkpoint.pth")
    blocks = ("embed_dim", "depth", "num_heads", "mlp_ratio", "kernel_size", "multi_scale")
    content["args"] = {
        k: v for k, v in content["args"].items() if k not in blocks and "decoder" not in k
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    result = launcher.run(*flags(images, tmp_path))
    assert_ok(result)
    assert "nothing to train" in result.out
    line = flags(images, tmp_path, decoder_num_heads=4)
    assert_one_line(launcher.run(*line), 2, "--decoder_num_heads 2 there, 4 here")


def test_pictures_and_a_description_of_another_geometry_come_from_its_file(
    resized, images, launcher, tmp_path
):
    path, grid = resized / "checkpoint.pth", tmp_path / "grid.png"
    assert_ok(visualize(launcher, "--checkpoint", path, "--images", images, "--output", grid))
    result = launcher.run("inspect", path, program="tools.checkpoint")
    assert_ok(result)
    assert "(widths 16-24-36, blocks 1-2-1, MLP ratios 1.3-2-3, 3 heads)" in result.out
    assert "48 wide, 1 blocks, 3 heads, of stage 3 alone" in result.out
    assert "guessed" not in result.out


def test_a_classifier_takes_another_geometry_from_the_file_of_its_pretraining(resized):
    weights = read_weights(resized / "checkpoint.pth")
    model, report = convvit_from_weights(weights, num_classes=3)
    assert [block.attn.num_heads for block in model.blocks3] == [3]
    assert {name.split(".")[0] for name in report.missing} == {"fc_norm", "head"}


def test_an_output_folder_within_the_images_is_refused(images, launcher):
    result = launcher.run(*flags(images, images / "a" / "out"))
    assert_one_line(result, 2, "lies within the data", "would be taken for images")
    assert not (images / "a" / "out").exists()


@pytest.mark.parametrize("program", ["VideoConvMAE.main_pretrain", "SEG.train"])
def test_a_program_without_its_optional_packages_says_in_one_line_what_installs_them(program):
    result = call("-S", "-m", program, "--help")  # without site-packages
    assert_one_line(result, 2, "is not installed: pip install -r requirements-")


@pytest.mark.parametrize("kind", ["text", "missing", "folder without images"])
def test_visualize_refuses_images_that_are_none_in_one_line(whole, launcher, tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "folder without images":
        path.mkdir()
    command = ["--checkpoint", whole / "checkpoint.pth", "--images", path]
    result = visualize(launcher, *command, "--output", tmp_path / "grid.png")
    assert_one_line(result, 2, str(path))


def test_visualize_does_not_write_over_an_image(whole, images):
    image = next(images.rglob("*.png"))
    other_name = image.parent / ".." / image.parent.name / image.name
    command = [
        "--checkpoint",
        str(whole / "checkpoint.pth"),
        "--images",
        str(images),
        "--output",
        str(other_name),
    ]
    with pytest.raises(UsageError, match="is one of the images"):
        tools.visualize.main(tools.visualize.parse_args(command))


def test_visualize_refuses_a_mask_ratio_that_leaves_nothing(whole, images, launcher, tmp_path):
    command = ["--checkpoint", whole / "checkpoint.pth", "--images", images, "--mask_ratio", 0.999]
    result = visualize(launcher, *command, "--output", tmp_path / "grid.png")
    assert_one_line(result, 2, "--mask_ratio")


@pytest.mark.parametrize("name", ["missing/grid.png", "grid.xyz"])
def test_visualize_refuses_an_output_that_it_cannot_write(whole, images, launcher, tmp_path, name):
    command = ["--checkpoint", whole / "checkpoint.pth", "--images", images]
    result = visualize(launcher, *command, "--output", tmp_path / name)
    assert_one_line(result, 2, str(tmp_path / name))


# --- accuracy as it runs -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def labeled(tmp_path_factory) -> Path:
    """`train/` and `val/` of two classes."""
    root = tmp_path_factory.mktemp("labeled")
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee"):
            write_pictures(root / split / name, count)
    return root


def stop_within_the_accuracy() -> None:
    import os
    import signal

    import engine_knn

    each_output = engine_knn.each_output

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return each_output(*args)

    engine_knn.each_output = stopped


def test_measuring_the_accuracy_changes_no_bit_of_a_run_stopped_within_it(
    images, labeled, whole, launcher, tmp_path
):
    line = flags(images, tmp_path, knn_freq=3, knn_path=labeled)
    result = launcher.run(*line, before=code_of(stop_within_the_accuracy))
    assert result.code == 0
    assert "stopped by a signal at the evaluation of epoch 3" in result.out
    assert_ok(launcher.run(*line))
    got, want = load(tmp_path / "checkpoint.pth"), load(whole / "checkpoint.pth")
    for part in want.keys() - {"args"}:
        assert same(got[part], want[part]), part
    measured = [line["epoch"] for line in log_lines(tmp_path) if "knn_acc1" in line]
    assert measured == [2, 3]
    assert [step for step, _ in curve(tmp_path, "test/knn_acc1")] == [3000, 4000]
    found = ["--checkpoint", tmp_path / "checkpoint.pth", "--data_path", labeled]
    args = knn.parse_args([*map(str, found), "--device", "cpu", "--num_workers", "0"])
    assert log_lines(tmp_path)[-1]["knn_acc1"] == pytest.approx(knn.main(args)["knn_acc1"])


def test_the_accuracy_wants_labelled_images(images, launcher, tmp_path):
    result = launcher.run(*flags(images, tmp_path, knn_freq=1))
    assert_one_line(result, 2, "--knn_freq without --knn_path: --data_path", "has no train/")
