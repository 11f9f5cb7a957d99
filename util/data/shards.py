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
import math
import os
import re
import resource
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.atomic import write_atomically
from util.data.files import open_regular, reason_of, retried
from util.data.folders import ImageFolder
from util.data.shard_index import (
    HEADER,
    INDEX,
    LABEL,
    PER_IMAGE,
    index_command,
    read_index,
    write_index,
)
from util.errors import TrainingError, UsageError

# Lies beside shards that are being written; after a kill it says that they are not complete.
UNFINISHED = "unfinished"
# Shards that a process keeps open: a quarter of the files that it may open, and no more than 128.
_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_OPEN = 128 if _limit == resource.RLIM_INFINITY else min(128, max(1, _limit // 4))
# More shards than anybody has: a pattern beyond is a mistake.
MAX_SHARDS = 1_000_000


class Shards:
    """The images of shards, by number: what `ImageFolder` is for a folder.

    Args:
        pattern: `DIR/{000000..000999}.tar`, as `webdataset` expands it; or a folder with an index,
            for all its shards.

    Attributes:
        group_sizes: images of each shard; those of a shard are neighbours.
        left_out: how many files of the shards are no images of ours, by their kinds.

    Raises:
        UsageError: shards that are missing, or not those of the index.
    """

    def __init__(self, pattern: str | os.PathLike) -> None:
        self.root = Path(pattern)
        folder, names = expand(pattern)
        index = read_index(folder)
        places = {name: place for place, name in enumerate(index["shards"].tolist())}
        names = names or list(places)
        _check_shards(folder, names, places, index["bytes"])

        self._paths = [str(folder / name) for name in names]
        bounds = np.searchsorted(index["shard"], np.arange(len(places) + 1))
        chosen = [np.arange(*bounds[places[name] :][:2]) for name in names]
        self.group_sizes = [len(samples) for samples in chosen]
        samples = np.concatenate(chosen)
        self._shard = np.repeat(np.arange(len(names)), self.group_sizes)
        self._index = {name: index[name][samples] for name in PER_IMAGE if name in index}
        self._classes = index["classes"].tolist() if "classes" in index else None
        self.left_out = Counter()
        in_use = np.isin(index["left_out_shard"], [places[name] for name in names])
        for kind, count in zip(
            index["left_out_kind"][in_use].tolist(),
            index["left_out_count"][in_use].tolist(),
            strict=True,
        ):
            self.left_out[kind] += count

    def __len__(self) -> int:
        return len(self._shard)

    def path(self, index: int) -> str:
        """Path of an image, for messages: the shard and the name in it."""
        return f"{self._paths[self._shard[index]]}/{os.fsdecode(self._index['name'][index])}"

    def open(self, index: int) -> BinaryIO:
        """An image's file.

        Raises:
            TrainingError: the storage fails, or the shard is no longer the one of the index.
        """
        shard = self._paths[self._shard[index]]
        size = int(self._index["size"][index])
        # The header lies before the file.
        data = self._read(index, int(self._index["offset"][index]) - HEADER, HEADER + size)
        check = zlib.crc32(data[:HEADER])
        if self._classes is not None:
            start = int(self._index["label_offset"][index]) - HEADER
            label = self._read(index, start, HEADER + int(self._index["label_size"][index]))
            check = zlib.crc32(label, check)
        if check != self._index["header"][index]:
            raise TrainingError(
                f"{self.path(index)} is not where {INDEX} has it: {shard} was written again "
                f"since; index it again: {index_command(Path(shard).parent)}"
            )
        file = io.BytesIO(data[HEADER:])
        file.name = self.path(index)
        return file

    def _read(self, index: int, start: int, size: int) -> bytes:
        shard = self._paths[self._shard[index]]
        data = retried(partial(_read_part, shard, start, size), shard)
        if len(data) != size:
            raise TrainingError(f"{self.path(index)} cannot be read: the shard ends before it")
        return data

    def read_classes(self) -> tuple[list[str], np.ndarray]:
        """Names of the classes, and the label of each image, `[num_images]`.

        Raises:
            UsageError: shards without labels.
        """
        if self._classes is None:
            raise UsageError(f"the images of {self.root} have no labels: no .{LABEL} in the shards")
        return self._classes, self._index["label"].astype(np.int64)


def _read_part(path: str, start: int, size: int) -> bytes:
    """Some bytes of a shard."""
    try:
        return os.pread(_open_shard(path).fileno(), size, start)
    except OSError:
        _open_shard.cache_clear()  # a shard that went stale, or too many of them
        raise


@lru_cache(maxsize=MAX_OPEN)
def _open_shard(path: str) -> BinaryIO:
    """A shard, read by position: so processes that share it do not disturb each other."""
    return open_regular(path)


def is_shards(path: str | os.PathLike) -> bool:
    """True if a data path means shards: a pattern of tar files, or a folder with an index."""
    return str(path).endswith(".tar") or Path(path, INDEX).is_file()


def expand(pattern: str | os.PathLike) -> tuple[Path, list[str] | None]:
    """The folder of a pattern, and the names of its shards; None for all of a folder.

    Raises:
        UsageError: shards in several folders, one named twice, more than anybody has, or braces
            that do not match.
    """
    if not str(pattern).endswith(".tar"):
        return Path(pattern), None
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", str(pattern))
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
        raise UsageError(f"{pattern} names more than {MAX_SHARDS} shards")
    from webdataset.shardlists import expand_urls  # takes a second

    try:
        paths = [Path(url) for url in expand_urls(str(pattern))]
    except ValueError as error:
        raise UsageError(f"{pattern} is no pattern of shards: {error}") from error
    folders, counts = {path.parent for path in paths}, Counter(paths)
    if len(folders) > 1:
        raise UsageError(f"the shards of {pattern} must lie in one folder, beside their index")
    if max(counts.values()) > 1:
        raise UsageError(f"{pattern} names {counts.most_common(1)[0][0]} more than once")
    return paths[0].parent, [path.name for path in paths]


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


def write_shards(source: ImageFolder, folder: Path, shard_size: int) -> tuple[int, int | None]:
    """Copy images into shards, in random order, with an index.

    An image keeps its bytes. Its label is its class folder, if all images lie in such. Shards of
    a call that was killed are written again.

    Args:
        source: the images.
        folder: where to write.
        shard_size: images of a shard.

    Returns:
        The number of shards, and that of classes or None.

    Raises:
        UsageError: there are shards in the folder already, or an image cannot be read.
        TrainingError: the disk is full, or the storage fails.
    """
    unfinished = folder / UNFINISHED
    if folder.is_dir() and not unfinished.exists() and any(folder.glob("*.tar")):
        raise UsageError(f"{folder} holds shards already: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    for path in (folder / INDEX, *folder.glob("[0-9]*.tar*")):
        path.unlink(missing_ok=True)
    try:
        classes, labels = source.read_classes()
    except UsageError:
        classes = labels = None
    order = np.random.default_rng(0).permutation(len(source))
    names = []
    for start in range(0, len(order), shard_size):
        names.append(f"{len(names):06d}.tar")
        chosen = order[start : start + shard_size].tolist()
        samples = (_sample(source, i, None if labels is None else labels[i]) for i in chosen)
        write_atomically(folder / names[-1], partial(_write_tar, samples))
    write_index(folder, names, classes)
    unfinished.unlink()
    return len(names), classes and len(classes)


def _write_tar(samples: Iterable[dict[str, str | bytes]], file: BinaryIO) -> None:
    from webdataset import TarWriter

    # GNU's form, because names may be longer than the library's own choice allows.
    with TarWriter(file, encoder=False, mtime=0, format="GNU_FORMAT") as tar:
        for sample in samples:
            tar.write(sample)


def _sample(source: ImageFolder, index: int, label: int | None) -> dict[str, str | bytes]:
    """An image as `webdataset` writes it; the number makes its key unique."""
    path = Path(source.path(index)).relative_to(source.root)
    # Dots begin an ending, and two underscores what the library skips.
    key = f"{path.with_suffix('').as_posix().replace('.', '_')}_{index}".lstrip("_")
    try:
        data = source.open(index).read()
    except OSError as error:
        raise UsageError(f"{source.path(index)}: {reason_of(error, source.path(index))}") from error
    sample = {"__key__": key, path.suffix[1:].lower(): data}
    return sample if label is None else sample | {LABEL: str(label).encode()}
