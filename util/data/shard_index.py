"""The index of tar shards: where each image is, its label, and what of the shards is left out.

It is written by reading through the shards, whose samples are those of the `webdataset` library.
"""

import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util.atomic import write_atomically
from util.data.arrays import ARRAY_EXTENSIONS
from util.data.files import MAX_BYTES, open_regular, retried
from util.data.folders import kind_of
from util.data.images import IMAGE_EXTENSIONS
from util.errors import TrainingError, UsageError, printable

INDEX = "index.npz"
LABEL = "cls"
# Names that `webdataset` skips, from their start.
_META = re.compile(r"__[^/]*__($|/)")
# Endings of images, then those of arrays.
_KINDS = (IMAGE_EXTENSIONS, ARRAY_EXTENSIONS)
# Bytes of a file's header in a tar.
HEADER = 512
# More classes than anybody has: a label beyond is a mistake.
MAX_CLASSES = 1_000_000
# What an index holds: kinds of numpy's types; one value per shard, image or thing left out.
_SCHEMA = {
    "shards": "U", "bytes": "iu",
    "shard": "i", "name": "S", "offset": "iu", "size": "iu", "header": "u",
    "left_out_shard": "iu", "left_out_kind": "U", "left_out_count": "iu",
}  # fmt: skip
_LABEL_SCHEMA = {"label": "iu", "label_offset": "iu", "label_size": "iu", "classes": "U"}
PER_IMAGE = ("name", "offset", "size", "header", "label", "label_offset", "label_size")


def index_command(folder: Path) -> str:
    """The command that writes the index of a folder's shards."""
    return f"python -m tools.shards index '{folder}/*.tar'"


def read_index(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of an index, of whose types, lengths and values one can be sure.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        raise UsageError(
            f"there is no {path}, which says where in the shards the images are: "
            f"{index_command(folder)} writes it"
        )
    try:
        index = retried(partial(_load_arrays, path), path)
        _check_index(index)
    except TrainingError:
        raise
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise UsageError(
            f"{path} cannot be read ({printable(error)}): write it again by {index_command(folder)}"
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
        ("shard", *(name for name in PER_IMAGE if name in _SCHEMA | labels)),
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


class _Sample(NamedTuple):
    """An image of a shard, and its label if it has one.

    `header` is the CRC-32 of the image's header in the tar and, of a label, of header and content.
    """

    name: bytes
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
    parts, left_out = [], []
    for place, name in enumerate(names):
        samples, others = _scan(folder / name)
        parts.append(_columns(place, samples))  # of a shard: objects take many times the memory
        left_out += [(place, kind, count) for kind, count in others.items()]
    if not any(len(part["name"]) for part in parts):
        raise UsageError(f"no image in {folder / names[0]} and the other {len(names) - 1} shards")
    arrays = {
        "shards": np.array(names),
        "bytes": np.array([(folder / shard).stat().st_size for shard in names]),
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
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
    return len(arrays["name"]), total


def _columns(place: int, samples: Sequence[_Sample]) -> dict[str, np.ndarray]:
    """The entries of an index on the samples of one shard."""
    kinds = {"name": np.bytes_, "header": np.uint32}
    return {"shard": np.full(len(samples), place, np.int32)} | {
        name: np.array([sample[i] for sample in samples], kinds.get(name, np.int64))
        for i, name in enumerate(_Sample._fields)
    }


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
        raise UsageError(f"{path} is no whole shard: {printable(error, 300)}") from error
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
    """The image of a sample: the first, but one of a plain ending before `.left.jpg`.

    A file of an array counts only where there is no image.
    """
    known = [[e for e in files if f".{e.rpartition('.')[2]}" in k] for k in _KINDS]
    endings = known[0] or known[1]
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
    place = (os.fsencode(image.name), image.offset_data, image.size)
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


def known_classes(folder: Path) -> list[str] | None:
    """The names in an index that is about to be written again; None without one that has names."""
    try:
        index = read_index(folder)
    except UsageError:
        return None
    return index["classes"].tolist() if "classes" in index else None
