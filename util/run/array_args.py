"""Command lines: the flags of arrays, what follows from them, and the checkpoint that has them."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from util.data.array_views import ArrayFormat, array_transform
from util.data.arrays import LAYOUTS, ChannelsError
from util.data.crop import Box
from util.data.datasets import open_images
from util.errors import TrainingError, UsageError
from util.run.distributed import print_once
from util.run.normalization import MEASURED, check_stats, complete_stats, tell_stats
from util.run.parser import Parser, finite_float, positive_int, show_value
from util.weights.read import Weights

# Flags that say what the numbers of files mean, and mean the same for a checkpoint's data.
FORMAT_FLAGS = (
    *("arrays", "bands", "layout", "array_key", "nodata", "clip_min", "clip_max", "mean", "std"),
    "rgb",
)
# Channels that 8-bit pictures have.
_OF_PICTURES = (1, 3, 4)
# Files looked at before a run starts, until one can be read.
_LOOKS = 10


def add_format_args(parser: Parser) -> argparse._ArgumentGroup:
    """The flags by which files of arrays are read; returns the group."""
    group = parser.add_argument_group("arrays (docs/ARRAYS.md)")
    # None and not False: what a checkpoint of an older version says of them.
    group.add_argument(
        "--arrays",
        action="store_true",
        default=None,
        help="read .npy, .npz, TIFF and 16-bit PNG as they are; other --in_chans than 1, 3 and 4 "
        "and the flags of this group mean the same",
    )
    group.add_argument(
        "--bands",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="channels of the files to take, in this order, counted from 1",
    )
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="channels last or first (default: told by the shape)",
    )
    group.add_argument("--array_key", metavar="NAME", help="the array of a .npz that holds several")
    group.add_argument(
        "--nodata",
        type=finite_float,
        metavar="V",
        help="the number that stands for no data; NaN, infinity and what a GeoTIFF says always do",
    )
    return group


def add_array_args(parser: Parser, *, training: bool = True) -> None:
    """The flags of a run on arrays; without `training`, those of a frozen model."""
    group = add_format_args(parser)

    def add(name: str, help: str) -> None:
        group.add_argument(
            f"--{name}", type=finite_float, nargs="+", metavar="X", help=f"{help}, a number each"
        )

    add("clip_min", "smallest number of the channels: what is below is set to it")
    add("clip_max", "largest number of the channels")
    if training:
        group.add_argument(
            "--rot90",
            action="store_true",
            default=None,
            help="turn by 0, 90, 180 or 270 degrees, for what has no up",
        )
    group.add_argument(
        "--rgb",
        type=positive_int,
        nargs=3,
        metavar="N",
        help="channels of the input to show as red, green and blue (default: the first three; of "
        "fewer the first, in false colours)",
    )


def follow_checkpoint(args: argparse.Namespace, saved: Mapping[str, object]) -> None:
    """Take the flags of arrays that were not given from a checkpoint's arguments.

    Nothing is taken if `--in_chans` or the number of `--bands` is not the checkpoint's. Values of
    another type than the flag's, as damage or malice may leave them, are left. Mean and deviation
    of 8-bit pictures are for `complete_stats`.
    """
    channels = len(args.bands) if args.bands else args.in_chans
    if channels not in (None, saved.get("in_chans")):
        args.in_chans = channels
        return
    numbers = ("bands", "clip_min", "clip_max", "mean", "std", "rgb")
    for name in FORMAT_FLAGS:
        if name in ("mean", "std") and saved.get("arrays") is not True:
            continue
        value = saved.get(name)
        if name in numbers:
            fits = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
        elif name == "nodata":
            fits = type(value) in (int, float)
        else:
            fits = type(value) is (bool if name == "arrays" else str)
        if fits and getattr(args, name, None) is None:
            setattr(args, name, list(value) if name in numbers else value)


def is_arrays(args: argparse.Namespace) -> bool:
    """True if the flags ask for arrays, and not for 8-bit pictures."""
    implying = ("arrays", "bands", "layout", "array_key", "nodata", "clip_min", "clip_max", "rot90")
    given = any(getattr(args, name, None) is not None for name in implying)
    return given or (args.in_chans is not None and args.in_chans not in _OF_PICTURES)


def complete_arrays(
    args: argparse.Namespace, weights: Weights | None = None, *, statistics: bool = True
) -> None:
    """Fill in whether files are read as arrays, and of how many channels; check the flags of it.

    Args:
        args: of a command line; `in_chans` may be None.
        weights: those that a run begins with, see `complete_stats`.
        statistics: whether the numbers are to be normalised.

    Raises:
        UsageError: flags that do not go together.
    """
    args.arrays = True if is_arrays(args) else None
    if args.bands and args.in_chans not in (None, len(args.bands)):
        raise UsageError(
            f"--bands {show_value(args.bands)} are {len(args.bands)} channels, not --in_chans "
            f"{args.in_chans}: leave --in_chans away"
        )
    if args.bands:
        args.in_chans = len(args.bands)
    args.in_chans = args.in_chans or 3
    if not statistics:
        return
    if args.rgb and max(args.rgb) > args.in_chans:
        raise UsageError(
            f"--rgb {show_value(args.rgb)}: there are {args.in_chans} channels, counted from 1"
        )
    for name in ("clip_min", "clip_max"):
        values = getattr(args, name)
        if values is not None and len(values) != args.in_chans:
            raise UsageError(
                f"--{name} takes {args.in_chans} numbers, one for each channel, not {len(values)}"
            )
    if args.rgb and not args.arrays:
        raise UsageError("--rgb is for arrays: give --arrays, or leave it away")
    if not args.arrays:
        complete_stats(args, weights)
        return
    if args.mean is None or args.std is None:
        raise UsageError(
            f"arrays have no range of their own: give --mean and --std, a number each channel, "
            f"{MEASURED}"
        )
    check_stats(args)
    for low, high in zip(args.clip_min or (), args.clip_max or (), strict=False):
        if low >= high:
            raise UsageError(f"--clip_min {low:g} must be below --clip_max {high:g}")


def array_format(args: argparse.Namespace) -> ArrayFormat:
    """The format of the files that completed arguments describe."""
    return ArrayFormat.of(vars(args))


def random_view(
    args: argparse.Namespace,
    rule: Callable[..., Box],
    *,
    keep_nodata: bool = False,
) -> Callable[[BinaryIO], Tensor]:
    """The augmentation of arrays: a random part, resized, mirrored and turned as the flags say.

    Args:
        args: completed.
        rule: `random_box` or `clamped_box`.
        keep_nodata: see `array_transform`.

    Raises:
        UsageError: turns of what is not square.
    """
    size = tuple(args.input_size)
    if args.rot90 and size[0] != size[1]:
        raise UsageError(f"--rot90 needs a square --input_size, not {show_value(size)}")
    choose = partial(rule, scale=tuple(args.crop_scale))
    options = dict(hflip=args.hflip, rot90=bool(args.rot90), keep_nodata=keep_nodata)
    return array_transform(array_format(args), size, choose, **options)


def tell_kind(args: argparse.Namespace, root: Path) -> None:
    """Print how files are read and, of pictures, normalised; raises as `first_of`."""
    if not args.arrays:
        tell_stats(args)
        return
    bands = f", bands {show_value(args.bands)}" if args.bands else ""
    first = first_of(args, root)
    print_once(f"files are read as arrays{bands}, not as 8-bit pictures: {first}")


def first_of(args: argparse.Namespace, root: Path) -> str:
    """A few words on the first of a data path's arrays that can be read.

    Raises:
        UsageError: no files, or channels that are not those of the flags.
    """
    files, form = open_images(root, arrays=True), array_format(args)
    first = ""
    for index in range(min(_LOOKS, len(files))):
        try:
            with files.open(index) as file:
                picture = form.open(file)
        except ChannelsError as error:
            raise UsageError(str(error)) from error
        except (OSError, TrainingError) as error:
            first = first or f"none of the first could be read ({error})"
            continue
        width, height = picture.size
        says = "" if picture.nodata is None else f", {picture.nodata:g} is no data, as it says"
        return (
            f"{files.path(index)} is {height} x {width} of {picture.channels} channels "
            f"({picture.axes}), {picture.dtype}{says}"
        )
    return first
