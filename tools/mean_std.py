"""Measure mean, standard deviation and percentiles of each channel, as flags to paste.

`python -m tools.mean_std DIR --in_chans 7 --clip_percentiles 1 99`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.data.array_stats import SAMPLES, measure
from util.data.datasets import open_images
from util.data.folders import find_train_folder
from util.data.images import MAX_PIXELS
from util.errors import UsageError
from util.run.array_args import add_format_args, array_format, complete_arrays, finite_float
from util.run.parser import Parser, positive_int
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.mean_std",
        description="Measure mean and standard deviation of each channel of a folder of arrays.",
    )
    parser.add_argument(
        "data_path", type=Path, metavar="DIR", help="folder, its train/ if it has one; or shards"
    )
    group = add_format_args(parser)
    group.add_argument("--in_chans", type=positive_int, metavar="N", help="channels (default: 3)")
    group.add_argument(
        "--clip_percentiles",
        type=finite_float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"set what lies beyond them to them, measured on {SAMPLES} pixels of each file",
    )
    group.add_argument("--max_pixels", type=positive_int, default=MAX_PIXELS, metavar="N")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, then print the flags of a run."""
    percentiles = args.clip_percentiles
    if percentiles and not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UsageError(
            f"--clip_percentiles {percentiles[0]:g} {percentiles[1]:g}: the smaller comes first, "
            f"both lie between 0 and 100"
        )
    args.arrays = True
    complete_arrays(args, statistics=False)
    root = find_train_folder(args.data_path)
    files = open_images(root, arrays=True)
    found, bad = measure(files, array_format(args), tuple(percentiles) if percentiles else None)
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{len(files) - len(bad)} files of {root}, {args.in_chans} channels", file=sys.stderr)
    if still := [str(number) for number, std in enumerate(found["std"], 1) if not std]:
        print(
            f"note: channel {', '.join(still)} never changes: leave it away by --bands",
            file=sys.stderr,
        )
    print(" ".join(f"--{n} {' '.join(f'{v:.6g}' for v in values)}" for n, values in found.items()))


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
