import os
import pickle

import numpy as np
import pytest

from util.data.paths import Paths

NAMES = ["a/b.png", "", "caf\u00e9.jpg", os.fsdecode(b"caf\xe9.jpg"), "x" * 4000]


def test_paths_come_back_as_they_were_given():
    paths = Paths(iter(NAMES))
    assert list(paths) == NAMES and len(paths) == len(NAMES)
    assert paths[-1] == NAMES[-1] and paths[np.int64(2)] == NAMES[2]
    assert list(pickle.loads(pickle.dumps(paths))) == NAMES
    assert list(Paths([])) == []


@pytest.mark.parametrize("index", [len(NAMES), -len(NAMES) - 1])
def test_beyond_the_ends_there_is_none(index):
    with pytest.raises(IndexError):
        Paths(NAMES)[index]


def test_a_long_path_does_not_lengthen_the_others():
    paths = Paths(["short", "x" * 100_000, *["short"] * 998])
    assert len(pickle.dumps(paths)) < 120_000
