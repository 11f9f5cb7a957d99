"""Files of arrays: pictures of any number of channels and any type of number.

The content decides what a file is, whatever it is called: `.npy`, `.npz`, TIFF, PNG and PGM of 8
or 16 bits, or another picture that Pillow knows. Where the numbers lie in the file as they are
(`.npy`, PGM, uncompressed TIFF) a crop reads the crop. It reads instead of mapping the file into
memory, because storage that fails is an error then, and not the end of the process.
"""

import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import compress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_png

from util.data.crop import Box
from util.data.files import MAX_BYTES, reason_of, retried
from util.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, load_image, open_image
from util.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from tifffile import TiffPageSeries

ARRAY_EXTENSIONS = (*IMAGE_EXTENSIONS, ".npy", ".npz", ".btf")
LAYOUTS = ("hwc", "chw")
_WHOLE = slice(None)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is raised, too
_GDAL_NODATA = 42113  # a tag of TIFF
# Kind, width, height and largest number, comments between them.
_PNM = re.compile(rb"P([56])" + rb"(?:\s|#[^\n]*\n)+(\d{1,9})" * 3 + rb"\s")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF


class ChannelsError(OSError):
    """The channels of a file are not those that the flags say."""


class Picture(NamedTuple):
    """A picture in an open file, of which nothing but the header need have been read.

    Attributes:
        axes: "hw", "hwc" or "chw".
        shape: a length for each of them.
        dtype: of the numbers.
        fetch: from slices, one for each axis, to that part.
        nodata: the number that stands for no data by what the file says; None if it says nothing.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[tuple[slice, ...]], np.ndarray]
    nodata: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as Pillow has it."""
        return self.shape[self.axes.index("w")], self.shape[self.axes.index("h")]

    @property
    def channels(self) -> int:
        """Their number in the file."""
        return self.shape[self.axes.index("c")] if "c" in self.axes else 1

    def read(self, box: Box, bands: Sequence[int] | None = None) -> np.ndarray:
        """A part of the picture.

        Args:
            box: what part.
            bands: the channels to take in this order, counted from 1; all by default.

        Returns:
            `[C, box.height, box.width]`, of `dtype`.

        Raises:
            OSError: the file ends before it, or holds more than `MAX_BYTES` of it.
        """
        first, last = (min(bands) - 1, max(bands)) if bands else (0, self.channels)
        slices = {
            "h": slice(box.top, box.top + box.height),
            "w": slice(box.left, box.left + box.width),
            "c": slice(first, last),
        }
        if box.height * box.width * (last - first) * self.dtype.itemsize > MAX_BYTES:
            raise OSError(
                f"a part of {box.height} x {box.width} pixels and {last - first} channels has more "
                f"than {MAX_BYTES} bytes: lower --crop_scale, or cut the files into tiles"
            )
        part = self.fetch(tuple(slices[axis] for axis in self.axes))
        part = part[None] if self.axes == "hw" else part
        part = np.moveaxis(part, -1, 0) if self.axes == "hwc" else part
        return part if bands is None else part[[band - 1 - first for band in bands]]


def open_picture(
    file: BinaryIO,
    in_chans: int,
    *,
    bands: Sequence[int] | None = None,
    layout: str | None = None,
    array_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """The picture in a file; where its format allows nothing but its header is read.

    Args:
        file: open until the picture has been read; may have a name.
        in_chans: channels of the file, or the number of `bands`.
        bands: channels that will be read, counted from 1.
        layout: one of `LAYOUTS`, where shape and channels leave it open.
        array_key: name of the array in a `.npz`; needed if there are several.
        max_pixels: a larger picture is refused.

    Raises:
        OSError: a file that cannot be read or decoded, whatever the reason; but for
        ChannelsError: one with other channels than asked for, or with axes that cannot be told.
        UsageError: a TIFF whose compression needs a library that is not there.
        TrainingError: the storage fails, see `retried`.
    """
    path = getattr(file, "name", "the array")
    try:
        found = retried(partial(_open_any, file, array_key, max_pixels), path)
        axes, shape, dtype, fetch, nodata = found
        if dtype.kind not in "biuf":
            raise OSError(f"its numbers are of type {dtype}, not integers or floats")
        if axes is None:
            axes = _axes_of(shape, in_chans, bands, layout)
        picture = Picture(axes, shape, dtype, partial(_fetch, fetch, path), nodata)
        _check(picture, in_chans, bands, max_pixels)
        return picture
    except (TrainingError, UsageError):
        raise
    except ChannelsError as error:
        raise ChannelsError(f"{path} cannot be decoded: {error}") from error
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        why = reason_of(error, path) if isinstance(error, OSError) else error
        raise OSError(f"{path} cannot be decoded: {why}") from error


def _fetch(fetch: Callable, path: str, slices: tuple[slice, ...]) -> np.ndarray:
    """A part of a picture, read again while the storage fails."""
    try:
        return retried(partial(fetch, slices), path)
    except (TrainingError, UsageError):
        raise
    except Exception as error:
        raise OSError(f"{path} cannot be decoded: {error}") from error


class _Found(NamedTuple):
    """The facts that a file states, as in `Picture`; the axes None where it does not say."""

    axes: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[tuple[slice, ...]], np.ndarray]
    nodata: float | None = None


def _open_any(file: BinaryIO, array_key: str | None, max_pixels: int) -> _Found:
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    if start.startswith(np.lib.format.MAGIC_PREFIX):
        return _squeezed(*_open_npy(file))
    if start.startswith(b"PK"):
        return _squeezed(*_open_npz(file, array_key))
    if start.startswith(_TIFF) and (found := _open_tiff(file)):
        return found
    if start.startswith((b"P5", b"P6")) and (found := _open_pnm(file)):
        return found
    header = open_image(file, max_pixels)  # a damaged file: it says so
    file.seek(0)
    if header.format == "PNG" and header.mode != "P":
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        return _in_memory(decode_png(data, ImageReadMode.UNCHANGED).numpy(), "chw")
    if header.mode.startswith(("I", "F")):  # numbers of more than 8 bits
        return _in_memory(np.asarray(header), "hw")
    channels = 1 if header.mode in ("1", "L") else 3
    image = np.asarray(load_image(file, channels, max_pixels))
    return _in_memory(image, "hwc" if channels == 3 else "hw")


def _in_memory(array: np.ndarray, axes: str | None) -> _Found:
    return _Found(axes, array.shape, array.dtype, array.__getitem__)


def _squeezed(
    shape: tuple[int, ...], dtype: np.dtype, fetch: Callable[[tuple[slice, ...]], np.ndarray]
) -> _Found:
    """An array without the axes of length 1 that it has beyond three."""
    spare = len(shape) - 3
    dropped = [i for i, length in enumerate(shape) if length == 1][: max(spare, 0)]
    if len(shape) - len(dropped) not in (2, 3):
        raise ChannelsError(f"its shape {shape} is not one of rows, columns and channels")
    kept = [i for i in range(len(shape)) if i not in dropped]

    def part(slices: tuple[slice, ...]) -> np.ndarray:
        wanted = dict(zip(kept, slices, strict=True))
        return fetch(tuple(wanted.get(i, _WHOLE) for i in range(len(shape)))).squeeze(
            tuple(dropped)
        )

    return _Found(None, tuple(shape[i] for i in kept), dtype, part if dropped else fetch)


def _open_npy(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, Callable]:
    """Shape, type and reader of a `.npy`; pickled objects are refused, not loaded."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise OSError(f"it is a .npy of the unknown version {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0
    if version > (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise OSError("it holds pickled Python objects, which are not loaded: save numbers")
    fetch = _raw(file, file.tell(), shape[::-1] if fortran else shape, dtype)
    if not fortran:
        return shape, dtype, fetch
    return shape, dtype, lambda slices: fetch(slices[::-1]).T


def _open_npz(file: BinaryIO, key: str | None) -> tuple[tuple[int, ...], np.dtype, Callable]:
    """Shape, type and reader of an array of a `.npz`, which is unpacked into memory."""
    with zipfile.ZipFile(file) as archive:
        names = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
        if not names:
            raise OSError("it is an archive without an array")
        if key is None and len(names) > 1:
            raise ChannelsError(
                f"it holds {len(names)} arrays ({', '.join(sorted(names)[:8])}): "
                f"--array_key chooses one"
            )
        if key is not None and key not in names:
            raise ChannelsError(
                f"it has no array {key}, but {', '.join(sorted(names)[:8])}: see --array_key"
            )
        entry = archive.getinfo(names[next(iter(names)) if key is None else key])
        if entry.file_size > MAX_BYTES:
            raise OSError(f"its array of {entry.file_size} bytes has more than {MAX_BYTES}")
        with archive.open(entry) as member:
            content = io.BytesIO(member.read(MAX_BYTES + 1))
    return _open_npy(content)


def _open_pnm(file: BinaryIO) -> _Found | None:
    """A gray or colour picture of netpbm's binary formats; None for a header that is none."""
    match = _PNM.match(file.read(4096))
    if not match or not 0 < int(match[4]) < 1 << 16:
        return None
    height, width, channels = int(match[3]), int(match[2]), {b"5": (), b"6": (3,)}[match[1]]
    shape, dtype = (height, width, *channels), np.dtype("u1" if int(match[4]) < 256 else ">u2")
    fetch = _raw(file, match.end(), shape, dtype)
    return _Found("hwc" if channels else "hw", shape, dtype, fetch)


def _open_tiff(file: BinaryIO) -> _Found | None:
    """A TIFF's first series of pages; None if its numbers are those of a palette's colours."""
    import tifffile  # takes half a second

    tiff = tifffile.TiffFile(file)
    series = tiff.series[0]
    if series.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
        return None
    if len(tiff.series) > 1:
        raise OSError(
            f"its pages are of {len(tiff.series)} kinds: write one picture a file, of pages alike"
        )
    kept = [n > 1 or a in "YX" for a, n in zip(series.axes, series.shape, strict=True)]
    names = "".join(compress(series.axes, kept))
    shape = tuple(compress(series.shape, kept))
    dtype = series.dtype.newbyteorder(tiff.byteorder)
    if series.dataoffset is not None:
        fetch = _raw(file, series.dataoffset, series.shape, dtype)
    else:
        if series.nbytes > MAX_BYTES:
            raise OSError(f"its compressed numbers take {series.nbytes} bytes, over {MAX_BYTES}")
        decoded = cache(partial(_decode, series, getattr(file, "name", "a TIFF")))

        def fetch(slices: tuple[slice, ...]) -> np.ndarray:
            return decoded()[slices]

    def part(slices: tuple[slice, ...]) -> np.ndarray:
        wanted = iter(slices)
        found = fetch(tuple(next(wanted) if keep else _WHOLE for keep in kept))
        return found.reshape([*compress(found.shape, kept)])

    return _Found(_axes_of_tiff(names, shape), shape, dtype, part, _nodata_of(series))


def _decode(series: "TiffPageSeries", path: str) -> np.ndarray:
    """All numbers of a compressed TIFF.

    Raises:
        UsageError: its compression needs a library that is not there.
    """
    try:
        return series.asarray(maxworkers=1)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise UsageError(
            f"{path} is compressed ({series.keyframe.compression.name}), for which imagecodecs is "
            f"missing: pip install -r requirements-arrays.txt"
        ) from error


def _nodata_of(series: "TiffPageSeries") -> float | None:
    """The number that GDAL's tag names; None without it or for text that is no number."""
    try:
        return float(str(series.keyframe.tags.valueof(_GDAL_NODATA)).strip(" \0"))
    except ValueError:
        return None


def _axes_of_tiff(names: str, shape: tuple[int, ...]) -> str | None:
    """The axes by a TIFF's names of them; one that nothing is known of ("Q") tells nothing."""
    if len(names) not in (2, 3):
        raise ChannelsError(
            f"its axes {names} of lengths {shape} are not rows, columns and channels"
        )
    if "Q" in names or not {"Y", "X"} <= set(names):
        return None
    axes = "".join({"Y": "h", "X": "w"}.get(name, "c") for name in names)
    if axes not in ("hw", "hwc", "chw"):
        raise ChannelsError(f"its axes {names} of lengths {shape} are in an order of their own")
    return axes


def _raw(
    file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A reader of numbers that lie in a file as they are, the last axis fastest.

    Raises:
        OSError: the file is too short for them.
    """
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset + size > file.seek(0, os.SEEK_END):
        raise OSError(f"it ends before its {size} bytes of numbers")
    return partial(_read_part, file, offset, shape, dtype)


def _read_part(
    file: BinaryIO,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    slices: tuple[slice, ...],
) -> np.ndarray:
    """A part of an array in a file: in one piece where it is one, else row by row."""
    start, stop, _ = slices[0].indices(shape[0])
    stride = int(np.prod(shape[1:], dtype=object)) * dtype.itemsize
    if all(s.indices(n)[:2] == (0, n) for s, n in zip(slices[1:], shape[1:], strict=True)):
        file.seek(offset + start * stride)
        data = file.read((stop - start) * stride)
        if len(data) < (stop - start) * stride:
            raise OSError("it ends before its numbers do")
        return np.frombuffer(data, dtype).reshape(stop - start, *shape[1:])
    rows = range(start, stop)
    return np.stack(
        [_read_part(file, offset + i * stride, shape[1:], dtype, slices[1:]) for i in rows]
    )


def _axes_of(
    shape: tuple[int, ...], in_chans: int, bands: Sequence[int] | None, layout: str | None
) -> str:
    """The axes of an array that does not name them.

    Without bands the channels are the first or the last axis, the one of length `in_chans`; with
    bands the one of these that is the shortest of all three.

    Raises:
        ChannelsError: it could be either, or neither.
    """
    if len(shape) == 2:
        return "hw"
    if layout:
        return layout
    if bands:
        fits = {"hwc": shape[2] < min(shape[:2]), "chw": shape[0] < min(shape[1:])}
        wanted = f"{max(bands)} bands or more"
    else:
        fits = {"hwc": shape[2] == in_chans, "chw": shape[0] == in_chans}
        wanted = f"{in_chans} channels"
    found = [axes for axes, fit in fits.items() if fit]
    if len(found) == 1:
        return found[0]
    if found:
        raise ChannelsError(
            f"its shape {shape} may be channels first or last: --layout chw or hwc says which"
        )
    raise ChannelsError(
        f"its shape {shape} has no {wanted} first or last: give --in_chans, --bands or --layout"
    )


def _check(picture: Picture, in_chans: int, bands: Sequence[int] | None, max_pixels: int) -> None:
    """Refuse a picture of other channels, empty, or too large.

    Raises:
        OSError: saying which.
    """
    width, height = picture.size
    if bands is None and picture.channels != in_chans:
        raise ChannelsError(
            f"it has {picture.channels} channels, not --in_chans {in_chans}: "
            f"--bands chooses among them"
        )
    if bands and max(bands) > picture.channels:
        raise ChannelsError(f"it has {picture.channels} channels, and no band {max(bands)}")
    if not width * height:
        raise OSError("it is empty")
    if width * height > max_pixels:
        raise OSError(f"its {width} x {height} pixels are more than --max_pixels {max_pixels}")
