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
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util.atomic import write_atomically
from util.data.files import MAX_BYTES, open_regular, reason_of, retried
from util.data.folders import ImageFolder, kind_of
from util.data.images import IMAGE_EXTENSIONS
from util.errors import TrainingError, UsageError

INDEX = "index.npz"
# Lies beside shards that are being written; after a kill it says that they are not complete.
UNFINISHED = "unfinished"
LABEL = "cls"
# Names that `webdataset` skips, from their start.
_META = re.compile(r"__[^/]*__($|/)")
# Bytes of a file's header in a tar.
HEADER = 512
# Shards that a process keeps open: a quarter of the files that it may open, and no more than 128.
_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_OPEN = 128 if _limit == resource.RLIM_INFINITY else min(128, max(1, _limit // 4))
# More classes or shards than anybody has: a label or a pattern beyond is a mistake.
MAX_CLASSES = MAX_SHARDS = 1_000_000
# What an index holds: kinds of numpy's types; one value per shard, image or thing left out.
_SCHEMA = {
    "shards": "U", "bytes": "iu",
    "shard": "iu", "name": "S", "offset": "iu", "size": "iu", "header": "u",
    "left_out_shard": "iu", "left_out_kind": "U", "left_out_count": "iu",
}  # fmt: skip
_LABEL_SCHEMA = {"label": "iu", "label_offset": "iu", "label_size": "iu", "classes": "U"}
_PER_IMAGE = ("name", "offset", "size", "header", "label", "label_offset", "label_size")


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
        self._index = {name: index[name][samples] for name in _PER_IMAGE if name in index}
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
        """Where an image is, for people: shard and name in it."""
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
                f"since; index it again: {_index_command(Path(shard).parent)}"
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
    """Whether a data path means shards: a pattern of tar files, or a folder with an index."""
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


def _index_command(folder: Path) -> str:
    return f"python -m tools.shards index '{folder}/*.tar'"


def _read_index(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of an index, of whose types, lengths and values one can be sure.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        raise UsageError(
            f"there is no {path}, which says where in the shards the images are: "
            f"{_index_command(folder)} writes it"
        )
    try:
        index = retried(partial(_load_arrays, path), path)
        _check_index(index)
    except TrainingError:
        raise
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise UsageError(
            f"{path} cannot be read ({error}): write it again by {_index_command(folder)}"
        ) from error
    return index


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    with io.BufferedReader(open_regular(path)) as file, np.load(file, allow_pickle=False) as arrays:
        if any(entry.compress_type for entry in arrays.zip.infolist()):
            raise ValueError("it is compressed, so that nothing bounds its size")
        return dict(arrays)


def _check_index(index: dict[str, np.ndarray]) -> None:
    """Refuse arrays that do not fit each other.

    Raises:
        ValueError: saying which.
    """
    labels = _LABEL_SCHEMA if "classes" in index else {}
    for name, kinds in (_SCHEMA | labels).items():
        if name not in index:
            raise ValueError(f"it has no {name}")
        if index[name].ndim != 1 or index[name].dtype.kind not in kinds:
            raise ValueError(f"its {name} are of another type")
    groups = (
        ("shards", "bytes"),
        ("shard", *(name for name in _PER_IMAGE if name in _SCHEMA | labels)),
        ("left_out_shard", "left_out_kind", "left_out_count"),
    )
    for first, *others in groups:
        if any(len(index[name]) != len(index[first]) for name in others):
            raise ValueError(f"not as many {', '.join(others)} as {first}")
    if len(np.unique(index["shards"])) < len(index["shards"]):
        raise ValueError("it names a shard twice")
    shards, last = index["shard"], len(index["shards"]) - 1
    if not len(shards) or shards.min() < 0 or shards.max() > last or (np.diff(shards) < 0).any():
        raise ValueError("its images are in no order of its shards")
    for what in ("", "label_")[: 1 + bool(labels)]:
        start, size = (index[what + name].astype(np.int64) for name in ("offset", "size"))
        room = index["bytes"].astype(np.int64)[shards] - start
        beyond = (size < 0) | (size > np.minimum(room, MAX_BYTES))
        if (beyond | (start < HEADER)).any():
            raise ValueError("it has images beyond the ends of their shards")
    if labels and not set(np.unique(index["label"])) <= set(range(len(index["classes"]))):
        raise ValueError("it has labels beyond its classes")


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


class _Sample(NamedTuple):
    """An image of a shard, and its label if it has one; see `Shards.open` for the check."""

    name: str
    offset: int
    size: int
    header: int
    label: int = -1
    label_offset: int = -1
    label_size: int = -1


def write_index(
    folder: Path, names: Sequence[str], classes: Sequence[str] | None = None
) -> tuple[int, Counter[str]]:
    """Read through shards and write the index beside them.

    Args:
        folder: of the shards.
        names: their files.
        classes: names of the classes; by default their numbers.

    Returns:
        The number of images, and of the files that are left out, by their kinds.

    Raises:
        UsageError: a file that is no tar, no image at all, or labels of some images only, or
            beyond the classes.
    """
    places, samples, left_out = [], [], []
    for place, name in enumerate(names):
        found, others = _scan(folder / name)
        samples += found
        places += [place] * len(found)
        left_out += [(place, kind, count) for kind, count in others.items()]
    if not samples:
        raise UsageError(f"no image in {folder / names[0]} and the other {len(names) - 1} shards")
    columns = dict(zip(_Sample._fields, map(np.array, zip(*samples, strict=True)), strict=True))
    arrays = {
        "shards": np.array(names),
        "bytes": np.array([(folder / shard).stat().st_size for shard in names]),
        "shard": np.array(places, np.int32),
        **columns,
        "name": np.array([os.fsencode(sample.name) for sample in samples]),
        "header": columns["header"].astype(np.uint32),
        "left_out_shard": np.array([place for place, _, _ in left_out], np.int32),
        "left_out_kind": np.array([kind for _, kind, _ in left_out], np.str_),
        "left_out_count": np.array([count for _, _, count in left_out], np.int64),
    }
    if any(kind == f"of .{LABEL}" for _, kind, _ in left_out) or (arrays["label"] >= 0).any():
        arrays["classes"] = np.array(_class_names(arrays["label"], classes, folder))
    elif classes is not None:
        raise UsageError(f"the samples of {folder} have no .{LABEL}, so there are no classes")
    else:
        for name in ("label", "label_offset", "label_size"):
            del arrays[name]
    write_atomically(folder / INDEX, partial(np.savez, **arrays))
    total = Counter()
    for _, kind, count in left_out:
        total[kind] += count
    return len(samples), total


def _class_names(labels: np.ndarray, classes: Sequence[str] | None, folder: Path) -> Sequence[str]:
    if labels.min() < 0:
        raise UsageError(
            f"{(labels < 0).sum()} samples of {folder} have no .{LABEL} beside them: the files "
            f"of a sample must follow each other in the tar (`tar --sort=name`)"
        )
    if classes is None and labels.max() >= MAX_CLASSES:
        raise UsageError(f"label {labels.max()} of {folder} is beyond {MAX_CLASSES} classes")
    classes = classes or [str(number) for number in range(labels.max() + 1)]
    if labels.max() >= len(classes):
        raise UsageError(f"label {labels.max()} of {folder} is beyond the {len(classes)} classes")
    return classes


def _scan(path: Path) -> tuple[list[_Sample], Counter[str]]:
    """The samples of a shard, as `webdataset` has them, and what is left out, by its kind.

    Raises:
        UsageError: a file that is no whole tar.
    """
    samples, left_out = [], Counter()
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for files in _group(tar, left_out):
                if sample := _sample_of(files, file, left_out):
                    samples.append(sample)
            _check_end(file, tar.offset)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UsageError(f"{path} is no whole shard: {error}") from error
    return samples, left_out


def _group(
    tar: Iterable[tarfile.TarInfo], left_out: Counter[str]
) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Neighbouring files of the same name, by their endings: `webdataset`'s samples."""
    from webdataset.tariterators import base_plus_ext

    current, files = None, {}
    for member in tar:
        if member.isdir():
            continue
        name = os.path.basename(member.name)
        key, ending = base_plus_ext(member.name)
        if not member.isreg() or member.issparse():
            left_out["links"] += 1
        elif key is None or name.startswith(".") or _META.match(member.name):
            left_out[kind_of(name)] += 1
        else:
            if key != current and files:
                yield files
                files = {}
            current = key
            if ending.lower() in files:
                left_out["named twice in a row"] += 1
            else:
                files[ending.lower()] = member
    if files:
        yield files


def _sample_of(
    files: dict[str, tarfile.TarInfo], tar: BinaryIO, left_out: Counter[str]
) -> _Sample | None:
    """The image of a sample: the first, but one of a plain ending before `.left.jpg`."""
    endings = [e for e in files if f".{e.rpartition('.')[2]}" in IMAGE_EXTENSIONS]
    endings.sort(key=lambda ending: "." in ending)
    label = None
    if endings:
        stem = endings[0].rpartition(".")[0]
        label = next((e for e in (f"{stem}.{LABEL}", LABEL) if e in files), None)
    for ending in files:
        if ending in endings[1:]:
            left_out[f"further images of a sample (.{ending})"] += 1
        elif ending not in (*endings[:1], label):
            left_out[f"of .{ending}"] += 1
    if not endings:
        return None
    image = files[endings[0]]
    header = zlib.crc32(_header_and(0, image, tar))
    place = (image.name, image.offset_data, image.size)
    if label is None:
        return _Sample(*place, header)
    member = files[label]
    if member.size > 32:
        raise ValueError(f"{member.name} is no label: it has {member.size} bytes")
    data = _header_and(member.size, member, tar)
    text = data[HEADER:].decode("ascii", "replace")
    if not text.strip().isdecimal() or int(text) > np.iinfo(np.int64).max:
        raise ValueError(f"{member.name} is no label: it holds {text!r}, not a number from 0")
    header = zlib.crc32(data, header)
    return _Sample(*place, header, int(text), member.offset_data, member.size)


def _header_and(size: int, member: tarfile.TarInfo, tar: BinaryIO) -> bytes:
    """The header of a file in a tar, and the first bytes of the file."""
    return os.pread(tar.fileno(), HEADER + size, member.offset_data - HEADER)


def _check_end(file: BinaryIO, end: int) -> None:
    """Refuse a tar with anything behind its end, where no reader looks.

    Raises:
        ValueError: there is something: a damaged header, or another tar.
    """
    file.seek(end)
    while data := file.read(1 << 20):
        if any(data):
            raise ValueError(f"damaged, or another tar joined to it, behind byte {end}")


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


def known_classes(folder: Path) -> list[str] | None:
    """The names in an index that is about to be written again; None without one that has names."""
    try:
        index = _read_index(folder)
    except UsageError:
        return None
    return index["classes"].tolist() if "classes" in index else None
