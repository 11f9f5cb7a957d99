"""Real images that need no download: the handwritten digits that come with scikit-learn."""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write_digits(root: str | os.PathLike) -> Path:
    """Write 1,797 digits as `root/{train,val}/{0..9}/*.png`, a fifth of each class into `val`.

    A picture is grayscale, 32 x 32 pixels. A complete copy is left as it is, an incomplete one is
    completed; several processes may call this at once.

    Returns:
        `root`.
    """
    root = Path(root)
    digits = _digits()
    if all((root / name).is_file() for name in digits):
        return root
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unfinished-") as unfinished:
        for name, pixels in digits.items():
            path = Path(unfinished) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        for split in ("train", "val"):
            _move(Path(unfinished) / split, root / split)
    return root


def _digits() -> dict[str, np.ndarray]:
    """File name, relative to the root, to pixels `[8, 8]`, uint8."""
    images, labels = load_digits(return_X_y=True)
    _, val = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    split = np.full(len(labels), "train")
    split[val] = "val"
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return {f"{split[i]}/{labels[i]}/{i:04d}.png": pixels[i] for i in range(len(labels))}


def _move(source: Path, target: Path) -> None:
    """Rename a folder; where the target exists, its files one by one. Both leave no half file."""
    try:
        source.rename(target)
    except OSError:  # The target is an incomplete copy, or another process was first.
        for path in source.rglob("*.png"):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
