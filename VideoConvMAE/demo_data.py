"""Real videos that need no download: handwritten digits that move, as mp4 files."""

import os
import random
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from VideoConvMAE.decode import write_mp4

# Pixels a frame, by row and column.
DIRECTIONS = {"down": (2, 0), "left": (0, -2), "right": (0, 2), "up": (-2, 0)}
SIDE, FRAMES, FPS = 32, 16, 8


def write_moving_digits(root: str | os.PathLike, counts: dict[str, int]) -> Path:
    """Write `root/{split}/{direction}/{number}.mp4`; complete splits are left as they are.

    A clip shows one of scikit-learn's digits, which moves at 2 pixels a frame and comes back on
    the other side. It begins anywhere, so that a single frame does not tell the direction. The
    digits of "val" are none of those of the other splits.

    Args:
        root: a folder.
        counts: split to number of clips; they are shared evenly by the directions.

    Returns:
        `root`.
    """
    root, images = Path(root), load_digits().images
    held_out = len(images) * 4 // 5
    for split, count in counts.items():
        digits = images[held_out:] if split == "val" else images[:held_out]
        draw = random.Random(split)
        for i in range(count):
            direction = list(DIRECTIONS)[i % len(DIRECTIONS)]
            path = root / split / direction / f"{i:04d}.mp4"
            frames = moving(draw.choice(digits), DIRECTIONS[direction], draw)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".part")
                write_mp4(unfinished, frames, FPS, crf="18")
                unfinished.replace(path)
    return root


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
