import argparse
import os
import pickle
import random
import resource

import numpy as np
import pytest
import torch
from torch import nn

from util import checkpoint
from util.checkpoint import (
    LAST,
    Checkpoints,
    find_resumable,
    load_file,
    random_state,
    save_atomically,
    set_random_state,
)
from util.datasets import seeded
from util.errors import TrainingError, UsageError

CONTENT = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "epoch": 3}


@pytest.fixture(autouse=True)
def own_random_state():
    """What a test does to the random numbers ends with it."""
    with seeded(0):
        yield


def legacy_save(content, path):
    """Write the format that PyTorch had before its zip archives."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


FORMATS = pytest.mark.parametrize("save", [torch.save, legacy_save], ids=["zip", "legacy"])

# ---- Writing -------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_only_file_written(tmp_path):
    path = tmp_path / LAST
    for epoch in (1, 2):
        save_atomically(CONTENT | {"epoch": epoch}, path)
        assert os.listdir(tmp_path) == [LAST]
        assert load_file(path)["epoch"] == epoch


def test_what_was_written_is_read(tmp_path):
    save_atomically(CONTENT, tmp_path / LAST)
    torch.testing.assert_close(load_file(tmp_path / LAST), CONTENT, rtol=0, atol=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without space")
@pytest.mark.parametrize("size", [1, 300_000], ids=["small", "large"])
def test_a_full_disk_is_an_error_that_keeps_the_older_file(tmp_path, size):
    path, temporary = tmp_path / LAST, tmp_path / (LAST + ".tmp")
    save_atomically(CONTENT, path)
    temporary.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot write .*; the previous one is intact"):
        save_atomically({"model": torch.zeros(size)}, path)
    assert os.listdir(tmp_path) == [LAST]
    assert load_file(path)["epoch"] == 3


@pytest.fixture
def small_files():
    """No file can grow beyond 100 kB: the disk fills up in the middle of one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_is_an_error_that_keeps_the_older_file(small_files, tmp_path):
    save_atomically(CONTENT, tmp_path / LAST)
    with pytest.raises(TrainingError, match="the previous one is intact"):
        save_atomically({"model": torch.zeros(300_000)}, tmp_path / LAST)
    assert os.listdir(tmp_path) == [LAST]
    assert load_file(tmp_path / LAST)["epoch"] == 3


def test_the_error_gives_the_reason_of_the_system(small_files, tmp_path):
    with pytest.raises(TrainingError, match="File too large"):
        save_atomically({"model": torch.zeros(300_000)}, tmp_path / LAST)


def test_data_are_on_the_disk_before_the_file_has_its_name_and_then_the_name_is(
    tmp_path, monkeypatch
):
    calls = []

    def recorded(name, call):
        def record(*args):
            calls.append(name)
            return call(*args)

        return record

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    save_atomically(CONTENT, tmp_path / LAST)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_an_error_that_promises_no_older_file(tmp_path):
    with pytest.raises(TrainingError, match="No such file or directory") as error:
        save_atomically(CONTENT, tmp_path / "gone" / LAST)
    assert "intact" not in str(error.value)


# ---- Reading -------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.pth does not exist"):
        load_file(tmp_path / "gone.pth")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a file"):
        load_file(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def load(*args, **kwargs):  # Permissions themselves do not stop a superuser.
        raise PermissionError(13, "Permission denied")

    torch.save(CONTENT, tmp_path / LAST)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UsageError, match=f"{LAST}.*Permission denied"):
        load_file(tmp_path / LAST)


@FORMATS
def test_a_truncated_file_is_refused_wherever_it_ends(save, tmp_path):
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    save(CONTENT, whole)
    content = whole.read_bytes()
    for length in range(0, len(content), len(content) // 60):
        part.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"part\.pth"):
            load_file(part)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Not a checkpoint.\n",
        b"epoch,loss\n1,0.5\n",
        b"<html><body>Not found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"PK\x03\x04" + bytes(99),
    ],
    ids=["empty", "text", "csv", "html", "git_lfs", "png", "zip"],
)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"other\.pth"):
        load_file(path)


@FORMATS
def test_a_file_that_holds_no_dictionary_is_refused(save, tmp_path):
    save([1, 2], tmp_path / LAST)
    with pytest.raises(UsageError, match="holds a list, not a dictionary"):
        load_file(tmp_path / LAST)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize(
    ("save", "load"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (legacy_save, lambda path: torch.load(path, weights_only=False)),
        (plain_pickle, lambda path: pickle.loads(path.read_bytes())),
    ],
    ids=["zip", "legacy", "pickle"],
)
def test_a_hostile_file_runs_nothing(save, load, tmp_path):
    path, marker = tmp_path / LAST, tmp_path / "marker"
    save({"model": {}, "args": Hostile(marker)}, path)
    with pytest.raises(UsageError, match="refused"):
        load_file(path)
    assert not marker.exists()
    load(path)
    assert marker.exists()  # so the file is hostile indeed


def test_refusal_of_a_hostile_file_names_the_object_on_one_line(tmp_path):
    torch.save({"model": {}, "args": Hostile("marker")}, tmp_path / LAST)
    with pytest.raises(UsageError, match=r"\bopen\b") as error:
        load_file(tmp_path / LAST)
    assert str(error.value).isprintable()  # no line breaks, no terminal codes
    assert "can still be loaded" not in str(error.value)


@FORMATS
def test_arguments_of_the_published_checkpoints_are_read(save, tmp_path):
    args = argparse.Namespace(model="convmae_convvit_base_patch16", input_size=224, blr=1.5e-4)
    save(CONTENT | {"args": args}, tmp_path / LAST)
    assert load_file(tmp_path / LAST)["args"] == args


# ---- Random states -------------------------------------------------------------------------------


def draw():
    """Some numbers of every generator."""
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],
    )


def draw_normal():
    """One normal number each; odd calls leave a second one pending in both generators."""
    return np.random.randn(), random.gauss(0, 1)


def test_random_state_goes_through_a_file(tmp_path):
    draw_normal()
    torch.save({"random_state": random_state()}, tmp_path / LAST)
    expected = draw()
    assert draw() != expected
    set_random_state(load_file(tmp_path / LAST)["random_state"])
    assert draw() == expected


@pytest.mark.parametrize("pending", [False, True])
def test_pending_normal_numbers_are_part_of_the_random_state(pending):
    if pending:
        draw_normal()
    state = random_state()
    expected = [draw_normal(), draw_normal()]
    draw_normal()
    set_random_state(state)
    assert [draw_normal(), draw_normal()] == expected


# ---- A run's checkpoints -------------------------------------------------------------------------


def training_parts(seed):
    """A model and its optimizer after a step, by a checkpoint's names."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_saved_state_is_restored(tmp_path):
    parts, others = training_parts(seed=1), training_parts(seed=2)
    Checkpoints(tmp_path, {"epochs": 9}, parts, {"classes": ["cat"]}).save(4, 2, LAST, "kept.pth")
    expected = draw()
    for name in (LAST, "kept.pth"):
        content = load_file(tmp_path / name)
        assert (content["args"], content["classes"]) == ({"epochs": 9}, ["cat"])
        assert Checkpoints(tmp_path, {}, others).restore(content) == (4, 2)
        assert draw() == expected
        for part, other in zip(parts.values(), others.values(), strict=True):
            torch.testing.assert_close(other.state_dict(), part.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("rank", "source"), [(0, 0), (1, 1), (2, 0)])
def test_each_process_goes_on_from_its_own_random_state_or_the_first(rank, source, monkeypatch):
    states, expected = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(random_state())
        expected.append(torch.rand(3).tolist())
    monkeypatch.setattr(checkpoint, "rank", lambda: rank)
    content = {"random_state": states, "epoch": 0, "step": 0}
    Checkpoints("", {}, {}).restore(content)
    assert torch.rand(3).tolist() == expected[source]


# ---- What to resume from -------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the checkpoints of a run, the last at epoch 1."""
    folder = tmp_path / "run"
    folder.mkdir()
    parts = training_parts(seed=1) | {"scaler": nn.Identity(), "meters": nn.Identity()}
    checkpoints = Checkpoints(folder, {}, parts)
    checkpoints.save(0, 5, "earlier.pth")
    checkpoints.save(1, 0, LAST)
    return folder


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_without_a_checkpoint_a_run_begins_anew(resume, tmp_path):
    assert find_resumable(resume, tmp_path) is None
    assert find_resumable(resume, tmp_path / "not_there_yet") is None


def test_auto_goes_on_from_the_last_checkpoint_of_the_folder(run_folder):
    assert find_resumable("auto", run_folder)["epoch"] == 1


def test_auto_refuses_a_damaged_last_checkpoint(run_folder):
    (run_folder / LAST).write_bytes(b"damaged")
    with pytest.raises(UsageError, match=LAST):
        find_resumable("auto", run_folder)


def test_a_path_goes_on_from_that_file(run_folder, tmp_path):
    content = find_resumable(str(run_folder / "earlier.pth"), tmp_path)
    assert (content["epoch"], content["step"]) == (0, 5)


def test_a_repeated_command_goes_on_from_the_folder_not_from_where_it_began(run_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    beginning = (run_folder / "earlier.pth").rename(tmp_path / "elsewhere" / "earlier.pth")
    assert find_resumable(str(beginning), run_folder)["epoch"] == 1


def test_a_run_can_be_taken_back_to_an_earlier_checkpoint_of_its_folder(run_folder):
    content = find_resumable(str(run_folder / "earlier.pth"), run_folder)
    assert (content["epoch"], content["step"]) == (0, 5)


def test_a_path_to_nowhere_is_refused(run_folder):
    with pytest.raises(UsageError, match="does not exist"):
        find_resumable(str(run_folder / "gone.pth"), run_folder)


def test_none_refuses_to_overwrite_a_run(run_folder):
    with pytest.raises(UsageError, match=r"would overwrite .* choose another --output_dir"):
        find_resumable("none", run_folder)


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({"model": {}, "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(
        UsageError, match=r"\(no args, meters, optimizer, random_state, scaler, step\)"
    ):
        find_resumable(str(tmp_path / "weights.pth"), tmp_path)
