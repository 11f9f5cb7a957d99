"""Scenes for detection and segmentation that need no download: digits on textured backgrounds.

Each scene is a colour picture with several handwritten digits of varied size, colour and place,
and says for each which digit it is and which pixels are its ink. Training scenes are made of the
training digits of `util.demo.digits`, validation scenes of those held out there. The same scenes
come out every time.
"""

import colorsys
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from util.demo.digits import digits, write_once

COUNT = {"training": 400, "validation": 100}
CLASSES = tuple("0123456789")

_SIDES = (96, 160)  # shortest and longest side of a picture, in pixels
_DIGIT = (24, 56)  # smallest and largest side of a digit
_MOST_DIGITS = 7
_TRIES = 50  # places to try for a digit before it is left out


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        name: unique in its split, without an ending.
        image: `[H, W, 3]`, uint8, RGB.
        labels: `[N]`, the digits, 0 … 9.
        masks: `[N, H, W]`, bool, the ink of each; they do not overlap.
        edges: `[H, W]`, bool, where ink and background mix so that a pixel is neither.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    edges: np.ndarray


def scenes(split: str) -> Iterator[Scene]:
    """The scenes of "training" or "validation", always the same."""
    folder = {"training": "train", "validation": "val"}[split]
    parts = ((name.split("/"), pixels) for name, pixels in digits().items())
    pool = [(int(label), pixels) for (part, label, _), pixels in parts if part == folder]
    for index in range(COUNT[split]):
        # One seed a scene: each stays what it is, whatever the count.
        rng = np.random.default_rng([list(COUNT).index(split), index])
        yield _scene(f"{index:04d}", pool, rng)


def _scene(name: str, pool: list[tuple[int, np.ndarray]], rng: np.random.Generator) -> Scene:
    height, width = (4 * int(n) for n in rng.integers(_SIDES[0] // 4, _SIDES[1] // 4 + 1, 2))
    image = _texture(rng, height, width)
    taken = np.zeros((height, width), bool)
    edges = np.zeros((height, width), bool)
    labels, masks = [], []
    for choice in rng.choice(len(pool), rng.integers(2, _MOST_DIGITS + 1), replace=False):
        label, pixels = pool[choice]
        ink = _place(_ink(pixels, rng), taken, rng)
        if ink is None:
            continue
        taken |= ink > 0
        edges |= (ink > 0.25) & (ink < 0.5)
        image = image + ink[..., None] * (_bright_colour(rng) - image)
        labels.append(label)
        masks.append(ink >= 0.5)
    noise = rng.normal(0, 4, image.shape)
    image = np.clip(image + noise, 0, 255).round().astype(np.uint8)
    return Scene(name, image, np.array(labels), np.stack(masks), edges)


def _ink(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit `[8, 8]`, uint8, at a random size: how much ink is where, within [0, 1]."""
    side = int(rng.integers(_DIGIT[0], _DIGIT[1] + 1))
    ink = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(ink, np.float64) / 255


def _place(ink: np.ndarray, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A digit somewhere on a canvas where nothing is yet, None if no place was found."""
    (height, width), side = taken.shape, len(ink)
    for _ in range(_TRIES):
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        if not taken[top : top + side, left : left + side][ink > 0].any():
            canvas = np.zeros(taken.shape)
            canvas[top : top + side, left : left + side] = ink
            return canvas
    return None


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background `[H, W, 3]`: clouds or stripes between two darkish colours."""
    if rng.random() < 0.5:
        rows, columns = np.mgrid[:height, :width]
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period)
        pattern = 0.5 + wave / 2
    else:
        pattern = _clouds(rng, height, width, int(rng.integers(4, 24)))
    pattern = 0.7 * pattern + 0.3 * _clouds(rng, height, width, 3)
    first, second = rng.uniform(0, 120, (2, 3))
    return first + pattern[..., None] * (second - first)


def _clouds(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Smooth noise `[H, W]` within [0, 1] whose spots are about `cell` pixels wide."""
    coarse = rng.random((height // cell + 2, width // cell + 2)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth, np.float64), 0, 1)


def _bright_colour(rng: np.random.Generator) -> np.ndarray:
    """`[3]`, any hue, light enough to stand out."""
    hue, saturation, value = rng.random(), rng.uniform(0, 0.5), rng.uniform(0.8, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


# --- ADE20K's layout -----------------------------------------------------------------------------

# Values of the annotations: 0 is ignored, 1 … 10 are the digits, then the background.
BACKGROUND = len(CLASSES) + 1
ADE_CLASSES = (*CLASSES, "background")


def annotation(scene: Scene) -> np.ndarray:
    """A scene's class map `[H, W]`, uint8: 0 on the edges of ink, 1 … 10 a digit, 11 background."""
    values = np.where(scene.edges, 0, BACKGROUND).astype(np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        values[mask] = label + 1
    return values


def write_ade_scenes(root: str | os.PathLike) -> Path:
    """Write all scenes as `root/{images,annotations}/{training,validation}/*.png`.

    Returns:
        `root`, see `write_once`.
    """
    names = [
        f"{kind}/{split}/{index:04d}.png"
        for kind in ("images", "annotations")
        for split, count in COUNT.items()
        for index in range(count)
    ]

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for split in COUNT:
            for scene in scenes(split):
                file = f"{split}/{scene.name}.png"
                Image.fromarray(scene.image).save(folder / "images" / file)
                Image.fromarray(annotation(scene)).save(folder / "annotations" / file)

    return write_once(root, names, write)
