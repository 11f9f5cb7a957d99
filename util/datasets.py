"""Image data: any file to one picture, any folder to a data set.

`python -m util.datasets --help` writes folders as shards, see `util.shards`.

What a sample looks like depends on the seed that comes with its index and on nothing else: not on
the number of workers or processes, nor on where a run was resumed.
"""

import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from util.shards import Shards

IMAGE_EXTENSIONS = IMG_EXTENSIONS

# Files that may fail one after the other before a sample is given up.
MAX_TRIES = 10
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What numpy can draw from within `seeded`.
_spare_generators: list[np.random.MT19937] = []

# A picture of 100 megapixels is large, not an attack; twice Pillow's limit is still an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(file: str | os.PathLike | BinaryIO, in_chans: int = 3) -> Image.Image:
    """The picture that a viewer shows for a file, upright and with 8 bits a channel.

    Transparency is composited over white, as viewers and browsers show it on their page, unless
    the alpha channel is asked for.

    Args:
        file: an image file, by its path or open.
        in_chans: 1 for grayscale, 3 for RGB, 4 for RGB with alpha.

    Raises:
        UsageError: another number of channels.
        OSError: a file that cannot be read or decoded, whatever the reason.
    """
    mode = check_channels(in_chans)
    try:
        with Image.open(file) as image:
            image.load()
            return _upright(_to_8_bit(image, mode), orientation(image))
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        path = file if isinstance(file, str | os.PathLike) else file.name
        raise OSError(f"{path} cannot be decoded: {error}") from error


def check_channels(in_chans: int) -> str:
    """Pillow's mode for a number of channels.

    Raises:
        UsageError: another number than 1, 3 or 4.
    """
    if in_chans not in _MODES:
        raise UsageError(
            f"images of {in_chans} channels are not supported: "
            f"use 1 (grayscale), 3 (RGB) or 4 (RGB and alpha)"
        )
    return _MODES[in_chans]


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """Any image to one of the modes in `_MODES`."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _narrow(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _narrow(image: Image.Image) -> Image.Image:
    """Grayscale of 16 or 32 bits to "L"; Pillow's own conversion would clip at 255.

    16-bit values keep their upper byte, as Pillow does it for 16-bit colour. Values that are not
    of 16 bits have no agreed range, so the darkest becomes black and the brightest white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        values = (values - low) * (65535 / ((high - low) or 1))
    return Image.fromarray((values // 256).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """How the metadata of an image say that it is stored: 1 for upright, else 2 … 8 (EXIF)."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged metadata raise anything, and do not spoil the picture.
        return 1


def _upright(image: Image.Image, stored: int) -> Image.Image:
    """Turn and mirror an image so that it is upright."""
    return image.transpose(_TRANSPOSE[stored]) if stored in _TRANSPOSE else image


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


def open_images(root: str | os.PathLike) -> "ImageFolder | Shards":
    """The images of a data path: a folder of them, or shards (see `util.shards`).

    Raises:
        UsageError: there are none.
    """
    from util.shards import Shards, is_shards

    return Shards(root) if is_shards(root) else ImageFolder(root)


class FileDataset(Dataset):
    """Samples of one kind, some of which may be damaged; a subclass says what they are.

    An item's key is `(index, seed)`, as a sampler gives it. The item is `(sample, bad)`: what
    `load` made of the file, and the indices of files that could not be decoded. Another file,
    drawn by the same seed, takes the place of such a one.

    Attributes:
        root: the folder or list that the files come from, for messages.
        what: what they are, for messages.
        group_sizes: of files that need to be read in groups, the number in each.
    """

    root: Path
    what = "files"
    group_sizes: Sequence[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Where a sample is, for people."""
        raise NotImplementedError

    def load(self, index: int) -> Tensor:
        """A sample; may draw from `torch`, `numpy` and `random`.

        Raises:
            OSError: it cannot be decoded.
        """
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
        sample, _, bad = self.read(*key)
        return sample, bad

    def read(self, index: int, seed: int) -> tuple[Tensor, int, tuple[int, ...]]:
        """Load one file, or another in its place.

        Args:
            index: the file wanted.
            seed: what decides the augmentation, and the substitute of a bad file.

        Returns:
            sample: of `load`.
            index: the file it came from.
            bad: the files that failed before.

        Raises:
            TrainingError: `MAX_TRIES` files failed.
        """
        bad = []
        while len(bad) < MAX_TRIES:
            try:
                with seeded(seed):
                    return self.load(index), index, tuple(bad)
            except OSError as error:
                bad.append(index)
                draw = random.Random(f"{seed} {len(bad)}")
                index, reason = draw.randrange(len(self)), error
        raise TrainingError(f"{MAX_TRIES} files in a row cannot be decoded, the last: {reason}")


class ImageFiles(FileDataset):
    """All images of a data path, without labels.

    An item is `(image, bad)`: what `transform` made of the file, see `FileDataset`.

    Args:
        root: a folder, nested or flat, or shards.
        transform: from an open image file to `[C, H, W]`; may draw from `torch`, `numpy` and
            `random`; raises an OSError for a file that cannot be decoded.

    Attributes:
        files: see `open_images`.

    Raises:
        UsageError: there are no images, see `open_images`.
    """

    what = "images"

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[BinaryIO], Tensor],
    ) -> None:
        self.root = Path(root)
        self.transform = transform
        self.files = open_images(root)
        self.group_sizes = self.files.group_sizes

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Where an image is, for people."""
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
        transform: see `ImageFiles`.

    Attributes:
        classes: their names; of folders, sorted.
        labels: `[num_images]`, int64.

    Raises:
        UsageError: images without labels, or see `ImageFiles`.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[BinaryIO], Tensor],
    ) -> None:
        super().__init__(root, transform)
        self.classes, self.labels = self.files.read_classes()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, tuple[int, ...]]:
        image, index, bad = self.read(*key)
        return image, int(self.labels[index]), key[0], bad

    def check_complete(self) -> None:
        """Refuse a class without images, of which nothing can be learned.

        Raises:
            UsageError: naming the first such folders.
        """
        counts = np.bincount(self.labels, minlength=len(self.classes))
        empty = [self.classes[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            raise UsageError(f"{self.root}: no image in {some(empty)}: fill or remove the folder")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_classes(
    known: Sequence[str], found: Sequence[str], known_by: str, folder: str | os.PathLike
) -> None:
    """Refuse a folder whose labels would mean something else than the model's outputs.

    Args:
        known: names of the classes in the order of the outputs.
        found: those of the folder.
        known_by: who knows them, for the message.
        folder: where `found` was found.

    Raises:
        UsageError: classes of another number, other names or another order.
    """
    if list(known) == list(found):
        return
    lacking, foreign = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    if not lacking and not foreign:
        first = next(i for i, (a, b) in enumerate(zip(known, found, strict=True)) if a != b)
        difference = (
            f"the same names in another order (output {first} is {known[first]} there, "
            f"{found[first]} here): labels would be compared with the wrong outputs"
        )
    else:
        parts = [f"it lacks {some(lacking)}"] * bool(lacking)
        parts += [f"it has {some(foreign)}, which are not there"] * bool(foreign)
        difference = "; ".join(parts)
        if lacking and not foreign:
            difference += " (an empty folder stands for a class without images)"
    raise UsageError(
        f"{folder} does not hold the classes of {known_by}: "
        f"{len(found)} here, {len(known)} there; {difference}"
    )


if __name__ == "__main__":
    from util.run import run_main
    from util.shards import main, parse_args

    sys.exit(run_main(main, parse_args()))
