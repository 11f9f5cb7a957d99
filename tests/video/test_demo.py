"""The demo, shortened; and its videos."""

import itertools

import numpy as np
import pytest

from tests.checks import assert_ok
from tests.runs import code_of
from VideoConvMAE.decode import open_video
from VideoConvMAE.demo_data import DIRECTIONS, write_moving_digits
from VideoConvMAE.lists import find_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_moving_digits(tmp_path_factory.mktemp("videos"), {"train": 8, "val": 8})


def test_each_direction_has_as_many_videos(videos):
    for split in ("train", "val"):
        assert find_videos(videos / split).labels == sorted(list(DIRECTIONS) * 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_digits_move_as_their_folder_says(videos, direction):
    for path in find_videos(videos / "val" / direction).paths:
        with open_video(path, 1) as video:
            frames = video.frames(range(len(video)))[..., 0].astype(float)
        for now, then in itertools.pairwise(frames):
            errors = {
                name: np.abs(np.roll(now, step, (0, 1)) - then).mean()
                for name, step in DIRECTIONS.items()
            }
            assert min(errors, key=errors.get) == direction


def test_videos_that_are_there_are_left_as_they_are(videos):
    path = next((videos / "train" / "up").iterdir())
    before = path.stat().st_mtime_ns
    write_moving_digits(videos, {"train": 8})
    assert path.stat().st_mtime_ns == before


def shortened(folder):
    from VideoConvMAE import demo

    demo.CLIPS = {"pretrain": 32, "train": 16, "val": 8}
    short = ["--epochs", "1", "--finetune_epochs", "1"]
    demo.main(demo.parse_args(["--output_dir", folder, *short]))
    raise SystemExit


def test_the_demo_shortened_prints_what_it_compares(launcher, tmp_path):
    before = code_of(shortened, folder=str(tmp_path))
    result = launcher.run(program="VideoConvMAE.demo", before=before)
    assert_ok(result)
    for phrase in ("from pretraining ", "from random weights", "repeated frame", "chance"):
        assert phrase in result.out
    assert (tmp_path / "pretrain" / "reconstruction.mp4").exists()
