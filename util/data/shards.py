"""WebDataset shards: images in a few large tar files, for file systems that are slow with many.

A sample is what the `webdataset` library writes and reads: files of one name with different
endings, here an image and, if it has a label, its number in a `.cls`. Beside the shards lies an
index, `index.npz`, with the place of each image in them and the names of the classes. With it
every image has a number, as in a folder: so the order of an epoch, resuming within it and the
split over processes and workers are those of folders, and nothing can be lost or come twice.

`python -m tools.shards write DIR OUT` writes shards, and `python -m tools.shards index SHARDS`
an index for shards that came without one.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.atomic import write_atomically
from util.data.folders import ImageFolder
from util.data.images import IMAGE_EXTENSIONS
from util.errors import UsageError

INDEX = "index.npz"
LABEL = "cls"
# Shards that a process keeps open.
MAX_OPEN = 128


class Shards:
    """The images of shards, by number: what `ImageFolder` is for a folder.

    Args:
        pattern: `DIR/{000000..000999}.tar`, as `webdataset` expands it; or a folder with an index,
            for all its shards.

    Attributes:
        group_sizes: images of each shard; those of a shard are neighbours.

    Raises:
        UsageError: shards that are missing, or not those of the index.
    """

    def __init__(self, pattern: str | os.PathLike) -> None:
        self.root = Path(pattern)
        folder, names = expand(pattern)
        index = _read_index(folder)
        places = {name: place for place, name in enumerate(index["shards"].tolist())}
        names = names or list(places)
        _check_shards(folder, names, places, index["bytes"])

        self._paths = [str(folder / name) for name in names]
        bounds = np.searchsorted(index["shard"], np.arange(len(places) + 1))
        chosen = [np.arange(*bounds[places[name] :][:2]) for name in names]
        self.group_sizes = [len(samples) for samples in chosen]
        samples = np.concatenate(chosen)
        self._shard = np.repeat(np.arange(len(names)), self.group_sizes)
        self._offset, self._size = index["offset"][samples], index["size"][samples]
        self._name = index["name"][samples]
        self._classes = index["classes"].tolist() if "classes" in index else None
        self._labels = index["label"][samples] if "classes" in index else None

    def __len__(self) -> int:
        return len(self._shard)

    def path(self, index: int) -> str:
        """Where an image is, for people: shard and name in it."""
        return f"{self._paths[self._shard[index]]}/{os.fsdecode(self._name[index])}"

    def open(self, index: int) -> BinaryIO:
        """An image's file.

        Raises:
            OSError: the shard cannot be read, or ends too early.
        """
        shard = _open_shard(self._paths[self._shard[index]])
        size = int(self._size[index])
        file = io.BytesIO(os.pread(shard.fileno(), size, int(self._offset[index])))
        file.name = self.path(index)
        if file.getbuffer().nbytes != size:
            raise OSError(f"{file.name} cannot be read: the shard ends before it")
        return file

    def read_classes(self) -> tuple[list[str], np.ndarray]:
        """Names of the classes, and the label of each image, `[num_images]`.

        Raises:
            UsageError: shards without labels.
        """
        if self._classes is None:
            raise UsageError(f"the images of {self.root} have no labels: no .{LABEL} in the shards")
        return self._classes, self._labels


@lru_cache(maxsize=MAX_OPEN)
def _open_shard(path: str) -> BinaryIO:
    """A shard, read by position: so processes that share it do not disturb each other."""
    return open(path, "rb", buffering=0)


def is_shards(path: str | os.PathLike) -> bool:
    """Whether a data path means shards: a pattern of tar files, or a folder with an index."""
    return str(path).endswith(".tar") or Path(path, INDEX).is_file()


def expand(pattern: str | os.PathLike) -> tuple[Path, list[str] | None]:
    """The folder of a pattern, and the names of its shards; None for all of a folder.

    Raises:
        UsageError: shards in several folders, or one named twice.
    """
    if not str(pattern).endswith(".tar"):
        return Path(pattern), None
    from webdataset.shardlists import expand_urls  # takes a second

    paths = [Path(url) for url in expand_urls(str(pattern))]
    folders, counts = {path.parent for path in paths}, Counter(paths)
    if len(folders) > 1:
        raise UsageError(f"the shards of {pattern} must lie in one folder, beside their index")
    if max(counts.values()) > 1:
        raise UsageError(f"{pattern} names {counts.most_common(1)[0][0]} more than once")
    return paths[0].parent, [path.name for path in paths]


def _read_index(folder: Path) -> dict[str, np.ndarray]:
    path = folder / INDEX
    try:
        with np.load(path, allow_pickle=False) as index:
            return dict(index)
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path}, which says where in the shards the images are: "
            f"python -m tools.shards index '{folder}/*.tar' writes it"
        ) from None
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise UsageError(f"{path} cannot be read ({error}): write it again") from error


def _check_shards(
    folder: Path, names: Sequence[str], places: dict[str, int], sizes: np.ndarray
) -> None:
    for name in names:
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            raise UsageError(f"shard {folder / name} cannot be read: {error.strerror}") from error
        if name not in places:
            raise UsageError(f"shard {folder / name} is not in {folder / INDEX}")
        if size != sizes[places[name]]:
            raise UsageError(
                f"shard {folder / name} is not the one of {folder / INDEX}: it has {size} bytes, "
                f"not {sizes[places[name]]}; write the index again"
            )


def write_index(folder: Path, names: Sequence[str], classes: Sequence[str] | None = None) -> int:
    """Read through shards and write the index beside them.

    Args:
        folder: of the shards.
        names: their files.
        classes: names of the classes; by default their numbers.

    Returns:
        The number of images.

    Raises:
        UsageError: a file that is no tar, no image at all, or labels of some images only, or
            beyond the classes.
    """
    samples = [
        (place, *sample) for place, name in enumerate(names) for sample in _images_of(folder / name)
    ]
    if not samples:
        raise UsageError(f"no image in {folder / names[0]} and the other {len(names) - 1} shards")
    shard, name, offset, size, label = zip(*samples, strict=True)
    arrays = {
        "shards": np.array(names),
        "bytes": np.array([(folder / shard).stat().st_size for shard in names]),
        "shard": np.array(shard, np.int32),
        "name": np.array([os.fsencode(text) for text in name]),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
    }
    labels = np.array(label, np.int64)
    if (labels >= 0).any():
        arrays |= {"label": labels, "classes": np.array(_class_names(labels, classes, folder))}
    elif classes is not None:
        raise UsageError(f"the samples of {folder} have no .{LABEL}, so there are no classes")
    write_atomically(folder / INDEX, partial(np.savez, **arrays))
    return len(samples)


def _class_names(labels: np.ndarray, classes: Sequence[str] | None, folder: Path) -> Sequence[str]:
    if labels.min() < 0:
        raise UsageError(f"{(labels < 0).sum()} samples of {folder} have no .{LABEL}")
    classes = classes or [str(number) for number in range(labels.max() + 1)]
    if labels.max() >= len(classes):
        raise UsageError(f"label {labels.max()} of {folder} is beyond the {len(classes)} classes")
    return classes


def _images_of(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset, size and label (-1 for none) of each image of a shard."""
    from webdataset.tariterators import base_plus_ext

    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, ending = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if ending == LABEL:
                    labels[key] = int(tar.extractfile(member).read())
                elif f".{ending.lower()}" in IMAGE_EXTENSIONS:
                    images[key] = (member.name, member.offset_data, member.size)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UsageError(f"{path} is no whole shard: {error}") from error
    for key, image in images.items():
        yield (*image, labels.get(key, -1))


def write_shards(source: ImageFolder, folder: Path, shard_size: int) -> tuple[int, int | None]:
    """Copy images into shards, in random order, with an index.

    An image keeps its bytes. Its label is its class folder, if all images lie in such.

    Args:
        source: the images.
        folder: where to write.
        shard_size: images of a shard.

    Returns:
        The number of shards, and that of classes or None.

    Raises:
        UsageError: there are shards in the folder already.
    """
    from webdataset import TarWriter

    if folder.is_dir() and any(folder.glob("*.tar")):
        raise UsageError(f"{folder} holds shards already: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        classes, labels = source.read_classes()
    except UsageError:
        classes = labels = None
    order = np.random.default_rng(0).permutation(len(source))
    names = []
    for start in range(0, len(order), shard_size):
        names.append(f"{len(names):06d}.tar")
        with TarWriter(str(folder / names[-1]), encoder=False, mtime=0) as shard:
            for index in order[start : start + shard_size].tolist():
                shard.write(_sample(source, index, None if labels is None else labels[index]))
    write_index(folder, names, classes)
    return len(names), classes and len(classes)


def _sample(source: ImageFolder, index: int, label: int | None) -> dict[str, str | bytes]:
    """An image as `webdataset` writes it; the number makes its key unique."""
    path = Path(source.path(index)).relative_to(source.root)
    key = f"{path.with_suffix('').as_posix().replace('.', '_')}_{index}"
    with source.open(index) as file:
        sample = {"__key__": key, path.suffix[1:].lower(): file.read()}
    return sample if label is None else sample | {LABEL: str(label).encode()}


def known_classes(folder: Path) -> list[str] | None:
    """The names in an index that is about to be written again; None without one that has names."""
    try:
        index = _read_index(folder)
    except UsageError:
        return None
    return index["classes"].tolist() if "classes" in index else None
