"""Command lines: the arguments that the video mains share, beside those of util/run/args.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.parser import Parser, positive_int
from VideoConvMAE.sampling import SAMPLINGS


def add_clip_args(
    parser: Parser, *, samplings: Sequence[str] = SAMPLINGS, follow_checkpoint: bool = False
) -> argparse._ArgumentGroup:
    """Where the videos are, and how clips are taken from them; returns the group.

    Args:
        parser: gets the arguments.
        samplings: to choose from, the first being the default.
        follow_checkpoint: the clip's length and cubes are by default those of the checkpoint.
    """
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--video_root",
        type=Path,
        metavar="DIR",
        help="what the paths of a list are relative to (default: the list's folder)",
    )

    defaults = Architecture().with_time().flags()

    def add(name: str, help: str) -> None:
        default = defaults[name]
        follows = f" (default: the checkpoint's, else {default})" if follow_checkpoint else ""
        group.add_argument(
            f"--{name}",
            type=positive_int,
            default=None if follow_checkpoint else default,
            metavar="FRAMES",
            help=help + follows,
        )

    add("num_frames", "length of a clip")
    add("tubelet", "frames of a cube, the smallest thing that is embedded")
    add("temporal_kernel", "extent in time of the convolutions of stages 1 and 2, odd")
    add_sampling_args(group, samplings)
    return group


def add_sampling_args(
    group: argparse._ArgumentGroup | Parser, samplings: Sequence[str] = SAMPLINGS
) -> None:
    """Which frames of a video make a clip; the first of `samplings` is the default."""
    group.add_argument(
        "--sampling",
        choices=samplings,
        default=samplings[0],
        help="dense: every --stride-th frame of a stretch; uniform: a frame of each of num_frames "
        "equal segments; still: the middle frame alone, to see what is known without motion",
    )
    group.add_argument(
        "--stride",
        type=positive_int,
        default=4,
        metavar="FRAMES",
        help="from one frame of a dense clip to the next",
    )


def check_channels(args: argparse.Namespace) -> None:
    """Videos are gray or RGB.

    Raises:
        UsageError: they shall have an alpha channel.
    """
    if args.in_chans == 4:
        raise UsageError("--in_chans 4: videos have no alpha channel; use 3 (RGB) or 1 (gray)")
