"""Folders of images: which files they hold, and the classes that the folders name."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.images import IMAGE_EXTENSIONS
from util.errors import UsageError


def find_train_folder(root: str | os.PathLike) -> Path:
    """`root/train` where that folder exists (the ImageNet layout), else `root` itself."""
    train = Path(root) / "train"
    return train if train.is_dir() else Path(root)


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all image files below a folder.

    Links are followed and a folder that several lead to counts once. Hidden files and folders are
    left out: they hold thumbnails, checkpoints of editors and what macOS packs into archives.

    Raises:
        UsageError: no such folder, one that cannot be read, or no image in it.
    """
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise UsageError(f"the data path {root} {what}: give a folder of images")
    images, others = [], Counter()
    for folder, files in walk(root):
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS):
                images.append(os.path.join(folder, name))
            else:
                others[os.path.splitext(name)[1] or "unnamed type"] += 1
    if not images:
        found = ", ".join(f"{count} of {ending}" for ending, count in others.most_common(5))
        raise UsageError(
            f"no image below {root}: looked for files that end in {', '.join(IMAGE_EXTENSIONS)}, "
            f"but it holds {f'only other files ({found})' if found else 'no file at all'}"
        )
    return sorted(images)


def walk(root: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """Each visible folder from `root` on, once, with the names of its visible files."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read the data folder {error.filename}: {error.strerror}")

    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # A link to a parent would never end.
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, [name for name in files if not name.startswith(".")]


class ImageFolder:
    """The image files below a folder, by number.

    Args:
        root: a folder, nested or flat.

    Attributes:
        group_sizes: None: the files need not be read in groups.

    Raises:
        UsageError: a folder without images, see `list_images`.
    """

    group_sizes = None

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        # One array, because workers would copy a list bit by bit as they touch its strings.
        self._paths = np.array([os.fsencode(path) for path in list_images(self.root)])

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Where an image is, for people."""
        return os.fsdecode(self._paths[index])

    def open(self, index: int) -> BinaryIO:
        """An image's file."""
        return open(self.path(index), "rb")

    def read_classes(self) -> tuple[list[str], np.ndarray]:
        """Names of the class folders, sorted, and the label of each image, `[num_images]`.

        Raises:
            UsageError: no class folders, or images outside of them.
        """
        visible = (f for f in self.root.iterdir() if not f.name.startswith(".") and f.is_dir())
        classes = sorted(folder.name for folder in visible)
        if not classes:
            raise UsageError(
                f"{self.root} has no class folders: put the images of each class in a folder of "
                f"its own"
            )
        numbers = {name: label for label, name in enumerate(classes)}
        start = len(os.path.join(self.root, ""))
        firsts = (self.path(i)[start:].partition(os.sep)[0] for i in range(len(self)))
        labels = np.array([numbers.get(name, -1) for name in firsts])
        outside = np.flatnonzero(labels < 0)
        if len(outside):
            raise UsageError(
                f"{len(outside)} images of {self.root} lie outside of the class folders (first: "
                f"{self.path(outside[0])}): each belongs in one"
            )
        return classes, labels
