"""Real videos that need no download: handwritten digits that move, as mp4 files."""

import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from util.demo_scenes import clouds
from VideoConvMAE.decode import write_mp4

# Pixels a frame, by row and column.
DIRECTIONS = {"down": (2, 0), "left": (0, -2), "right": (0, 2), "up": (-2, 0)}
SIDE, FRAMES, FPS = 32, 16, 8


def write_moving_digits(root: str | os.PathLike, counts: dict[str, int]) -> Path:
    """Write `root/{split}/{direction}/{number}.mp4`; videos that are there are left as they are.

    A clip shows one of scikit-learn's digits, which moves at 2 pixels a frame and comes back on
    the other side, in front of a cloudy background with another digit that stands still; all is
    grainy. It begins anywhere, so that a single frame does not tell the direction. The digits of
    "val" are none of those of the other splits.

    Args:
        root: a folder.
        counts: split to number of clips; they are shared evenly by the directions.

    Returns:
        `root`.
    """
    root, images = Path(root), load_digits().images / 16
    held_out = len(images) * 4 // 5
    for split, count in counts.items():
        digits = images[held_out:] if split == "val" else images[:held_out]
        rng = np.random.default_rng(list(split.encode()))
        for i in range(count):
            direction = list(DIRECTIONS)[i % len(DIRECTIONS)]
            path = root / split / direction / f"{i:04d}.mp4"
            frames = moving(digits, DIRECTIONS[direction], rng)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".part")
                write_mp4(unfinished, frames, FPS, crf="18")
                unfinished.replace(path)
    return root


def moving(digits: np.ndarray, step: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A clip: `[FRAMES, SIDE, SIDE, 3]`, uint8.

    Args:
        digits: `[N, 8, 8]`, from 0 to 1, to choose from.
        step: pixels from a frame to the next, by row and column.
        rng: chooses the digits, where they are, and how light.
    """
    background = 0.4 * clouds(rng, SIDE, SIDE, int(rng.integers(3, 9)))
    still, ink = _somewhere(digits, rng), _somewhere(digits, rng)
    background = background + still * (rng.uniform(0.6, 1) - background)
    light = rng.uniform(0.6, 1)
    frames = []
    for i in range(FRAMES):
        shown = np.roll(ink, (step[0] * i, step[1] * i), (0, 1))
        frame = background + shown * (light - background)
        frames.append(frame + rng.normal(0, 0.03, frame.shape))
    pixels = (255 * np.clip(np.stack(frames), 0, 1)).round().astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


def _somewhere(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the digits at a random place: how much ink is where, `[SIDE, SIDE]` within [0, 1]."""
    canvas = np.zeros((SIDE, SIDE))
    canvas[:16, :16] = np.kron(rng.choice(digits), np.ones((2, 2)))
    return np.roll(canvas, tuple(rng.integers(SIDE, size=2)), (0, 1))
