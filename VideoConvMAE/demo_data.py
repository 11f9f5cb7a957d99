"""Real videos that need no download: handwritten digits that move, as mp4 files."""

import os
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from util.demo.digits import write_once
from VideoConvMAE.decode import write_mp4

# Pixels a frame, by row and column.
DIRECTIONS = {"down": (2, 0), "left": (0, -2), "right": (0, 2), "up": (-2, 0)}
SIDE, FRAMES, FPS = 32, 16, 8


def write_moving_digits(root: str | os.PathLike, counts: dict[str, int]) -> Path:
    """Write `root/{split}/{direction}/{number}.mp4`.

    A clip shows one of scikit-learn's digits, which moves at 2 pixels a frame and comes back on
    the other side. It begins anywhere, so that a single frame does not tell the direction. The
    digits of "val" are none of those of the other splits.

    Args:
        root: a folder.
        counts: split to number of clips; they are shared evenly by the directions.

    Returns:
        `root`, see `write_once`.
    """
    names = {
        split: [f"{direction}/{i:04d}.mp4" for i, direction in zip(range(count), cycle(DIRECTIONS))]
        for split, count in counts.items()
    }

    def write(folder: Path) -> None:
        for split, paths in names.items():
            for path, frames in zip(paths, _clips(split), strict=False):
                (folder / split / path).parent.mkdir(parents=True, exist_ok=True)
                write_mp4(folder / split / path, frames, FPS, crf="18")

    return write_once(root, (f"{split}/{path}" for split in names for path in names[split]), write)


def _clips(split: str) -> Iterator[np.ndarray]:
    """Clips without end, the directions in turn; a split has the same ones each time."""
    images, draw = load_digits().images, random.Random(split)
    held_out = len(images) * 4 // 5
    digits = images[held_out:] if split == "val" else images[:held_out]
    for step in cycle(DIRECTIONS.values()):
        yield moving(draw.choice(digits), step, draw)


def moving(digit: np.ndarray, step: tuple[int, int], draw: random.Random) -> np.ndarray:
    """A clip of a digit: `[FRAMES, SIDE, SIDE, 3]`, uint8.

    Args:
        digit: `[8, 8]`, from 0 to 16.
        step: pixels from a frame to the next, by row and column.
        draw: where it begins.
    """
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[:24, :24] = np.kron(digit * (255 / 16), np.ones((3, 3))).astype(np.uint8)
    row, column = draw.randrange(SIDE), draw.randrange(SIDE)
    frames = [
        np.roll(canvas, (row + step[0] * i, column + step[1] * i), (0, 1)) for i in range(FRAMES)
    ]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)
