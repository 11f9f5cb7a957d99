from types import SimpleNamespace

import numpy as np
import pytest
import torch

from SEG.hooks import AtomicBackend, FiniteLossHook, overlay, plain
from util.errors import TrainingError


def steps(hook: FiniteLossHook, losses: list[float]) -> None:
    for i, loss in enumerate(losses):
        hook.after_train_iter(SimpleNamespace(iter=i), i, outputs={"loss": torch.tensor(loss)})


def test_single_losses_that_are_not_finite_are_survived():
    steps(FiniteLossHook(), [1.0, float("nan"), float("inf")] * 20)


def test_ten_losses_in_a_row_that_are_not_finite_stop_the_run():
    with pytest.raises(TrainingError, match="not finite in 10 steps"):
        steps(FiniteLossHook(), [1.0, *[float("nan")] * 19])


def test_numpys_values_become_plain_in_any_container():
    value = {"a": np.float64(1.5), "b": [np.arange(2), (np.int64(3), "x")]}
    assert repr(plain(value)) == "{'a': 1.5, 'b': [[0, 1], (3, 'x')]}"


def test_a_write_that_fails_leaves_the_older_file(tmp_path):
    path = tmp_path / "iter_1.pth"
    AtomicBackend().put(b"old", path)
    with pytest.raises(TypeError):
        AtomicBackend().put("no bytes", path)
    assert path.read_bytes() == b"old"


def test_an_overlay_mixes_colours_in_and_leaves_what_is_ignored():
    image = np.full((1, 3, 3), 100, np.uint8)
    mixed = overlay(image, np.array([[0, 1, 255]]), [[200, 0, 0], [0, 255, 0]])
    assert mixed.tolist() == [[[166, 33, 33], [33, 203, 33], [100, 100, 100]]]
