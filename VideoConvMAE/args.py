"""Command lines: the arguments that the video mains share, beside those of util/run/args.py."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.parser import Parser, non_negative_int, positive_int
from VideoConvMAE.sampling import SAMPLINGS

# How videos are looked at, where neither a flag nor a checkpoint says it.
PROTOCOL = {"sampling": "dense", "stride": 4, "test_clips": 5, "test_crops": 3}


def add_clip_args(
    parser: Parser, *, samplings: Sequence[str] = SAMPLINGS
) -> argparse._ArgumentGroup:
    """Add the arguments of videos and clip sampling; returns the group.

    Args:
        parser: gets the arguments.
        samplings: to choose from.
    """
    group = parser.add_argument_group("clips")
    defaults = Architecture().with_time().flags()

    def add(name: str, help: str) -> None:
        help += f" (default: the checkpoint's, else {defaults[name]})"
        group.add_argument(f"--{name}", type=positive_int, metavar="FRAMES", help=help)

    add("num_frames", "length of a clip")
    add("tubelet", "frames of a cube, the smallest thing that is embedded")
    add("temporal_kernel", "extent in time of the convolutions of stages 1 and 2, odd")
    add_reading_args(group, samplings)
    return group


def add_reading_args(group: argparse._ArgumentGroup, samplings: Sequence[str] = SAMPLINGS) -> None:
    """Add the arguments that say which frames of which files are read, and how large."""
    group.add_argument(
        "--video_root",
        type=Path,
        metavar="DIR",
        help="what the paths of a list are relative to (default: the list's folder)",
    )
    add_sampling_args(group, samplings)
    group.add_argument(
        "--short_side",
        type=non_negative_int,
        metavar="PIXELS",
        help="larger frames are scaled down to this shorter side as they are decoded (default: "
        "10/7 of the input's, 320 of 224; 0: never)",
    )


def add_view_args(group: argparse._ArgumentGroup, default: int | None = None) -> None:
    """Add the numbers of views of a video; without a default those of the run, or the recipe's."""
    for name, what in (("test_clips", "clips of each video"), ("test_crops", "crops of each clip")):
        known = f"those of the checkpoint's run, else {PROTOCOL[name]}"
        group.add_argument(
            f"--{name}",
            type=positive_int,
            default=default,
            metavar="N",
            help=what + ("" if default else f" (default: {known})"),
        )


def add_sampling_args(
    group: argparse._ArgumentGroup | Parser, samplings: Sequence[str] = SAMPLINGS
) -> None:
    """Add the arguments of frame sampling; `complete_protocol` knows the defaults."""
    group.add_argument(
        "--sampling",
        choices=samplings,
        help="dense: every --stride-th frame of a stretch (the default); uniform: a frame of each "
        "of num_frames equal segments; still: the middle frame alone, to see what is known without "
        "motion",
    )
    group.add_argument(
        "--stride",
        type=positive_int,
        metavar="FRAMES",
        help=f"from one frame of a dense clip to the next (default: {PROTOCOL['stride']})",
    )


def complete_protocol(
    args: argparse.Namespace, known: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Fill in how clips and views are taken from videos, where no flag says it.

    Args:
        args: with `input_size` completed.
        known: the arguments of the run that a checkpoint comes from, to test as that run did.

    Returns:
        What a data set of clips takes: `length`, `sampling`, `stride`, `in_chans`, `short_side`,
        `max_pixels`.

    Raises:
        UsageError: an alpha channel is asked for.
    """
    if args.in_chans not in (1, 3):
        raise UsageError(
            f"--in_chans {args.in_chans}: videos have no alpha channel and no bands; use 3 (RGB) "
            f"or 1 (gray)"
        )
    side = round(min(args.input_size) * 10 / 7)
    for name, default in (PROTOCOL | {"short_side": side}).items():
        if getattr(args, name, default) is None:
            setattr(args, name, (known or {}).get(name, default))
    return dict(
        length=args.num_frames,
        sampling=args.sampling,
        stride=args.stride,
        in_chans=args.in_chans,
        short_side=args.short_side or None,
        max_pixels=args.max_pixels,
    )
