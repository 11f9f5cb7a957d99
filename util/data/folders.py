"""Folders of images: which files they hold, and the classes that the folders name."""

import copy
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.files import open_regular, read_file, retried
from util.data.images import IMAGE_EXTENSIONS
from util.data.paths import Paths
from util.errors import UsageError

HIDDEN = "hidden"


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
    return scan(root)[0]


def scan(
    root: str | os.PathLike, endings: tuple[str, ...] = IMAGE_EXTENSIONS
) -> tuple[list[str], Counter[str]]:
    """The paths of `list_images`, and how many other files there are, by their kinds.

    Args:
        root: the folder.
        endings: of the files to list.

    Raises:
        UsageError: no such folder, one that cannot be read, or no image in it.
    """
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise UsageError(f"the data path {root} {what}: give a folder of images")
    images, left_out = [], Counter()
    for folder, files in walk(root, left_out):
        for name in files:
            if name.lower().endswith(endings):
                images.append(os.path.join(folder, name))
            else:
                left_out[kind_of(name)] += 1
    if not images:
        only = f"only other files ({describe(left_out)})" if left_out else "no file at all"
        arrays = left_out["of .npy"] or left_out["of .npz"]
        raise UsageError(
            f"no image below {root}: looked for files that end in {', '.join(endings)}, "
            f"but it holds {only}{': --arrays reads .npy and .npz' if arrays else ''}"
        )
    return sorted(images), left_out


def kind_of(name: str) -> str:
    """The kind of a file that is left out, as `describe` tells it: "of .txt"."""
    if name.startswith("."):
        return HIDDEN
    ending = os.path.splitext(name)[1]
    return f"of {ending}" if ending else "without an ending"


def describe(left_out: Counter[str], most: int = 5) -> str:
    """Numbers of the files left out by their kinds, the most frequent first; "" for none.

    Such as "12 of .txt, 3 hidden".
    """
    kinds = left_out.most_common()
    parts = [f"{count} {kind}" for kind, count in kinds[:most]]
    if others := sum(count for _, count in kinds[most:]):
        parts.append(f"{others} of {len(kinds) - most} other kinds")
    return ", ".join(parts)


def walk(
    root: str | os.PathLike, left_out: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each visible folder from `root` on, once, with the names of its visible files.

    Args:
        root: where to begin.
        left_out: gets the numbers of the hidden files and folders.

    Raises:
        UsageError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read the data folder {error.filename}: {error.strerror}")

    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        try:
            status = os.stat(folder)
        except OSError as error:
            refuse(error)
        if (status.st_dev, status.st_ino) in seen:  # A link to a parent would never end.
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for names in (subfolders, files):
            visible = sorted(name for name in names if not name.startswith("."))
            if left_out is not None and len(visible) < len(names):
                left_out[HIDDEN] += len(names) - len(visible)
            names[:] = visible
        yield folder, files


class NumberedFiles:
    """Files by number.

    Args:
        root: what the data path was.
        paths: of the files.
        left_out: how many other files there are, by their kinds.

    Attributes:
        group_sizes: None: the files need not be read in groups.
    """

    group_sizes = None

    def __init__(self, root: Path, paths: Sequence[str], left_out: Counter[str]) -> None:
        self.root, self.left_out = root, left_out
        self._paths = Paths(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Path of a file, for messages."""
        return self._paths[index]

    def part(self, keep: np.ndarray) -> "NumberedFiles":
        """Only some of the files: those of `keep`, `[n]`, bool."""
        other = copy.copy(self)
        other._paths = Paths(self.path(index) for index in np.flatnonzero(keep))
        return other

    def open(self, index: int) -> BinaryIO:
        """A file, read whole.

        Raises:
            OSError: the file is to blame.
            TrainingError: the storage fails, see `read_file`.
        """
        return read_file(self.path(index))


class ImageFolder(NumberedFiles):
    """The image files below a folder, by number.

    Args:
        root: a folder, nested or flat.
        endings: of the files to take.

    Raises:
        UsageError: a folder without images, see `list_images`.
    """

    def __init__(
        self, root: str | os.PathLike, endings: tuple[str, ...] = IMAGE_EXTENSIONS
    ) -> None:
        root = Path(root)
        super().__init__(root, *scan(root, endings))

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


class LazyFolder(ImageFolder):
    """The files below a folder, which are opened and not read whole: what takes them reads parts.

    Args: those of `ImageFolder`.
    """

    def open(self, index: int) -> BinaryIO:
        """A file, open at its beginning.

        Raises:
            OSError: the file is to blame.
            TrainingError: the storage fails, see `retried`.
        """
        path = self.path(index)
        return io.BufferedReader(retried(partial(open_regular, path), path))
