import random

import numpy as np
import pytest
import torch
from torch import nn

from util.data.datasets import seeded
from util.errors import UsageError
from util.run import resume
from util.run.resume import LAST, Checkpoints, find_resumable, random_state, set_random_state
from util.weights.checkpoint import load_file


@pytest.fixture(autouse=True)
def own_random_state():
    """What a test does to the random numbers ends with it."""
    with seeded(0):
        yield


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
    monkeypatch.setattr(resume, "rank", lambda: rank)
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
    checkpoints = Checkpoints(folder, {}, parts, {"num_images": 24})
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
    with pytest.raises(UsageError, match=r"\(no args, optimizer, random_state, scaler, step\)"):
        find_resumable(str(tmp_path / "weights.pth"), tmp_path)
