"""Real images that need no download: the handwritten digits that come with scikit-learn."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def digits() -> dict[str, np.ndarray]:
    """All 1,797 as `{train,val}/{0..9}/*.png` to pixels `[8, 8]`, uint8, white on black.

    A fifth of each class is in `val`.
    """
    # Here, as it takes a second that no other run than the demo should wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    _, val = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    split = np.full(len(labels), "train")
    split[val] = "val"
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return {f"{split[i]}/{labels[i]}/{i:04d}.png": pixels[i] for i in range(len(labels))}


def write_digits(root: str | os.PathLike) -> Path:
    """Write the digits as grayscale pictures of 32 x 32 pixels, `root/{train,val}/{0..9}/*.png`.

    Returns:
        `root`, see `write_once`.
    """
    pictures = digits()

    def write(folder: Path) -> None:
        for name, pixels in pictures.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)

    return write_once(root, pictures, write)


def write_once(
    root: str | os.PathLike, names: Iterable[str], write: Callable[[Path], None]
) -> Path:
    """Write files below a folder so that no half-written one is ever seen there.

    A complete copy is left as it is, an incomplete one is completed; several processes may call
    this at once.

    Args:
        root: the folder.
        names: paths of the files, relative to it.
        write: writes them all below the folder it gets.

    Returns:
        `root`.
    """
    root = Path(root)
    if all((root / name).is_file() for name in names):
        return root
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unfinished-") as unfinished:
        write(Path(unfinished))
        for part in sorted(Path(unfinished).iterdir()):
            _move(part, root / part.name)
    return root


def _move(source: Path, target: Path) -> None:
    """Rename a file or folder; where the folder exists, its files one by one. None is ever half."""
    try:
        source.rename(target)
    except OSError:  # The target is an incomplete copy, or another process was first.
        for path in filter(Path.is_file, sorted(source.rglob("*"))):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
