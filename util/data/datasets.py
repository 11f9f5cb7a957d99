"""Data sets: files by number to samples, the same for any number of workers and processes.

What a sample looks like depends on the seed that comes with its index and on nothing else: not on
the number of workers or processes, nor on where a run was resumed.
"""

import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data.arrays import ARRAY_EXTENSIONS
from util.data.classes import NO_LABEL, some, unseen
from util.data.files import reason_of, retried
from util.data.folders import ImageFolder, LazyFolder, describe
from util.data.images import IMAGE_EXTENSIONS
from util.data.lists import ImageList, is_list
from util.data.shards import Shards, is_shards
from util.errors import TrainingError, UsageError

# Files that may fail one after the other before a sample is given up.
MAX_TRIES = 10
# The number of a file, and why it cannot be decoded.
BadFile = tuple[int, str]
# What numpy can draw from within `seeded`.
_spare_generators: list[np.random.MT19937] = []


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with `torch`, `numpy` and `random` seeded on the CPU, then restore their states.

    `torch.manual_seed` would also seed the generators of the accelerators, which are not ours.
    """
    # numpy's generator is exchanged because to copy its state takes ten times as long.
    generator = _spare_generators.pop() if _spare_generators else np.random.MT19937(0)
    states = torch.default_generator.get_state(), np.random.get_bit_generator(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.set_bit_generator(generator)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_bit_generator(states[1])
        _spare_generators.append(generator)
        random.setstate(states[2])


def open_images(root: str | os.PathLike, arrays: bool = False) -> ImageFolder | Shards | ImageList:
    """The images of a data path: a folder, shards (see `util.data.shards`), a list or one image.

    Args:
        root: the data path.
        arrays: take files of arrays, too, and open them without reading them.

    Raises:
        UsageError: there are none.
    """
    if is_list(root, ARRAY_EXTENSIONS if arrays else IMAGE_EXTENSIONS):
        return ImageList(root)
    if is_shards(root):
        return Shards(root)
    return LazyFolder(root, ARRAY_EXTENSIONS) if arrays else ImageFolder(root)


class FileDataset(Dataset):
    """Samples of one kind, some of which may be damaged; a subclass says what they are.

    An item's key is `(index, seed)`, as a sampler gives it. The item is `(sample, bad)`: what
    `load` made of the file, and `(index, reason)` of each file that could not be decoded. Another
    file, drawn by the same seed, takes the place of such a one.

    Attributes:
        root: the folder or list that the files come from, for messages.
        what: what they are, for messages.
        group_sizes: of files that need to be read in groups, the number in each.
        left_out: one line on the files that are there but no samples; "" if there are none.
    """

    root: Path
    what = "files"
    group_sizes: Sequence[int] | None = None
    left_out = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Path of a sample, for messages."""
        raise NotImplementedError

    def load(self, index: int) -> Tensor:
        """A sample; may draw from `torch`, `numpy` and `random`.

        Raises:
            OSError: it cannot be decoded; or with an `errno` of the storage, see `retried`.
        """
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, tuple[BadFile, ...]]:
        sample, _, bad = self.read(*key)
        return sample, bad

    def read(self, index: int, seed: int) -> tuple[Tensor, int, tuple[BadFile, ...]]:
        """Load one file, or another in its place.

        Args:
            index: the file wanted.
            seed: what decides the augmentation, and the substitute of a bad file.

        Returns:
            sample: of `load`.
            index: the file it came from.
            bad: the files that failed before.

        Raises:
            TrainingError: `MAX_TRIES` files failed, or the storage does.
        """
        bad = []
        while len(bad) < MAX_TRIES:
            path = self.path(index)
            try:
                return retried(partial(self._load_seeded, index, seed), path), index, tuple(bad)
            except OSError as error:
                bad.append((index, reason_of(error, path)))
                draw = random.Random(f"{seed} {len(bad)}")
                index = draw.randrange(len(self))
        raise TrainingError(
            f"{MAX_TRIES} files in a row cannot be decoded, the last: {path} cannot be decoded: "
            f"{bad[-1][1]}"
        )

    def _load_seeded(self, index: int, seed: int) -> Tensor:
        with seeded(seed):
            return self.load(index)


class ImageFiles(FileDataset):
    """All images of a data path, without labels.

    An item is `(image, bad)`: what `transform` made of the file, see `FileDataset`.

    Args:
        root: a folder, nested or flat, shards, a list or one image.
        transform: from an open image file to `[C, H, W]`; may draw from `torch`, `numpy` and
            `random`; raises an OSError for a file that cannot be decoded.
        arrays: take files of arrays, see `open_images`.

    Attributes:
        files: the folder or the shards, as `open_images` finds them.

    Raises:
        UsageError: there are no images.
    """

    what = "images"

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[BinaryIO], Tensor],
        arrays: bool = False,
    ) -> None:
        self.root = Path(root)
        self.transform = transform
        self.files = open_images(root, arrays)
        self.group_sizes = self.files.group_sizes
        if self.files.left_out:
            self.left_out = f"left out of {root}: {describe(self.files.left_out)}"

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Path of an image, for messages."""
        return self.files.path(index)

    def load(self, index: int) -> Tensor:
        """The transformed picture of a file."""
        with self.files.open(index) as file:
            return self.transform(file)


class LabeledImages(ImageFiles):
    """Images in one folder a class, as in ImageNet's `train/` and `val/`, or labelled shards.

    An item is `(image, label, index, bad)`: what `ImageFiles` gives, the place of the image's
    class among `classes`, and the index that was asked for. A bad file's substitute comes with
    its own label.

    Args:
        root: the folder of the class folders, or shards.
        transform: an open image file to a tensor.
        unlabeled: images without labels are taken too, of any data path of `ImageFiles`.
        arrays: take files of arrays, see `open_images`.

    Attributes:
        classes: their names; of folders, sorted.
        labels: `[num_images]`, int64; `NO_LABEL` where there are none to know.

    Raises:
        UsageError: no images, or images without labels.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[BinaryIO], Tensor],
        unlabeled: bool = False,
        arrays: bool = False,
    ) -> None:
        super().__init__(root, transform, arrays)
        try:
            self.classes, self.labels = self.files.read_classes()
        except UsageError:
            if not unlabeled:
                raise
            self.classes, self.labels = [], np.full(len(self), NO_LABEL)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, tuple[BadFile, ...]]:
        image, index, bad = self.read(*key)
        return image, int(self.labels[index]), key[0], bad

    def part(self, keep: np.ndarray, transform: Callable[[BinaryIO], Tensor]) -> "LabeledImages":
        """Only some of the images of a folder, of the same classes.

        Args:
            keep: which, `[num_images]`, bool.
            transform: of them.
        """
        other = copy.copy(self)
        other.files, other.labels = self.files.part(keep), self.labels[keep]
        other.transform = transform
        return other

    def check_complete(self) -> None:
        """Refuse a class without images, of which nothing can be learned.

        Raises:
            UsageError: naming the first such folders.
        """
        if empty := unseen(self.labels, self.classes):
            raise UsageError(f"{self.root}: no image in {some(empty)}: fill or remove the folder")
