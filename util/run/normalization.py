"""Command lines: the mean and standard deviation by which images are normalised."""

import argparse
import math

from util.data.transforms import Stats, channel_stats
from util.errors import UsageError
from util.run.distributed import print_once
from util.run.parser import finite_float, show_value
from util.weights.describe import show_stats
from util.weights.read import Weights

MEASURED = "as `python -m tools.mean_std DIR` measures them with the same flags"


def add_stats_args(group: argparse._ActionsContainer) -> None:
    """`--mean` and `--std`."""
    known = "default: the checkpoint's, else ImageNet's"
    for name, what in (("mean", "mean of the channels"), ("std", "their standard deviation")):
        group.add_argument(
            f"--{name}",
            type=finite_float,
            nargs="+",
            metavar="X",
            help=f"{what}, a number each: from 0 to 1 of 8-bit pictures ({known}), in their own "
            f"unit of arrays; `python -m tools.mean_std DIR` measures both",
        )


def complete_stats(args: argparse.Namespace, weights: Weights | None = None) -> None:
    """Fill in `--mean` and `--std` of 8-bit images and check them; None stands for ImageNet's.

    Args:
        args: with `in_chans` completed.
        weights: those that a run begins with, whose own it takes where no flag says otherwise; one
            that does is told.

    Raises:
        UsageError: numbers that are not those of as many channels, each from 0 to 1.
    """
    if args.mean is None and args.std is None:
        if weights is None or weights.stats is None:
            return
        args.mean, args.std = map(list, channel_stats(args.in_chans, weights.stats))
    check_stats(args)
    if min(args.mean) < 0 or max(*args.mean, *args.std) > 1:
        raise UsageError(
            f"--mean {show_value(args.mean)} --std {show_value(args.std)}: 8-bit images are "
            f"normalised as numbers from 0 to 1: divide by 255, {MEASURED}"
        )
    stats, imagenets = given_stats(args), channel_stats(args.in_chans)
    if weights is not None and weights.args:
        there = channel_stats(args.in_chans, weights.stats or imagenets)
        if there != stats:
            print_once(
                f"note: images are normalised by {show_stats(stats)}, those of {weights.path} were "
                f"by {show_stats(there)}"
            )
    if stats == imagenets:
        args.mean = args.std = None


def check_stats(args: argparse.Namespace) -> None:
    """Refuse a mean and a deviation that are not of the channels, of pictures or of arrays.

    Raises:
        UsageError: one is missing, or not a number for each channel, or no deviation.
    """
    for name, other in (("mean", "std"), ("std", "mean")):
        values = getattr(args, name)
        if values is None:
            raise UsageError(f"--{other} goes with --{name}: give both, {MEASURED}")
        if len(values) != args.in_chans:
            raise UsageError(
                f"--{name} takes {args.in_chans} numbers, one for each channel, not {len(values)}"
            )
    if min(args.std) <= 0:
        raise UsageError(
            f"--std {show_value(args.std)} must be above 0: "
            + (
                "leave a channel that never changes away by --bands"
                if getattr(args, "arrays", None)
                else "for a channel that never changes give 1"
            )
        )


def given_stats(args: argparse.Namespace) -> Stats | None:
    """Mean and deviation of 8-bit images by completed arguments; None: ImageNet's, or arrays."""
    if getattr(args, "arrays", None) or getattr(args, "mean", None) is None:
        return None
    return tuple(args.mean), tuple(args.std)


def tell_stats(args: argparse.Namespace) -> None:
    """Print by what 8-bit images are normalised, if not by ImageNet's numbers."""
    if stats := given_stats(args):
        print_once(f"images are normalised by {show_stats(stats)}")


def agreed_stats(own: Stats, weights: Weights) -> tuple[Stats, str]:
    """Those for a model of another library that begins with weights of a run of this one.

    Args:
        own: of the library's configuration, as numbers from 0 to 1. ImageNet's, which are every
            recipe's, give way to the run's; others were chosen, and stay.
        weights: of the run.

    Returns:
        `own` itself, or the run's; and a line for people where they differ, else "".
    """
    channels = len(own[0])
    if channels not in (1, 3, 4) or not weights.args or weights.args.get("arrays"):
        return own, ""
    imagenets = channel_stats(channels)
    there = channel_stats(channels, weights.stats or imagenets)
    if _close(own, there):
        return own, ""
    if _close(own, imagenets):
        return there, f"images are normalised by {show_stats(there)}, as those of {weights.path}"
    return own, (
        f"note: images are normalised by {show_stats(own)} (of 255), as the configuration says; "
        f"those of {weights.path} were by {show_stats(there)}"
    )


def saved_stats(own: Stats) -> dict[str, list[float] | None]:
    """`mean` and `std` for the arguments in a checkpoint of another library's model."""
    imagenets = len(own[0]) in (1, 3, 4) and _close(own, channel_stats(len(own[0])))
    mean, std = (None, None) if imagenets else map(list, own)
    return {"mean": mean, "std": std}


def _close(a: Stats, b: Stats) -> bool:
    """Equal but for what is lost in other units."""
    pairs = zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True)
    return all(math.isclose(x, y, abs_tol=1e-5) for x, y in pairs)
