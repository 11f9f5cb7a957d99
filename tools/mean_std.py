"""Measure mean and standard deviation of each channel, as flags to paste.

`python -m tools.mean_std DIR`, of arrays `… DIR --in_chans 7 --clip_percentiles 1 99`
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
from util.data.picture_stats import measure_pictures
from util.errors import UsageError
from util.run.array_args import add_format_args, array_format, complete_arrays
from util.run.parser import Parser, finite_float, positive_int
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.mean_std",
        description="Measure mean and standard deviation of each channel over all pixels of 8-bit "
        "pictures, as numbers from 0 to 1, or of arrays in their own unit.",
    )
    parser.add_argument(
        "data_path",
        type=Path,
        metavar="DIR",
        help="folder, its train/ if it has one; or shards, or a list",
    )
    parser.add_argument(
        "--in_chans",
        type=positive_int,
        metavar="N",
        help="channels: 1 gray, 3 RGB, 4 RGBA, others of arrays (default: 3)",
    )
    parser.add_argument(
        "--max_files",
        type=positive_int,
        metavar="N",
        help="take so many, spread over all there are (default: all)",
    )
    parser.add_argument("--max_pixels", type=positive_int, default=MAX_PIXELS, metavar="N")
    group = add_format_args(parser)
    group.add_argument(
        "--clip_percentiles",
        type=finite_float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"set what lies beyond them to them, measured on {SAMPLES} pixels of each file",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, then print the flags of a run."""
    percentiles = args.clip_percentiles
    if percentiles and not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UsageError(
            f"--clip_percentiles {percentiles[0]:g} {percentiles[1]:g}: the smaller comes first, "
            f"both lie between 0 and 100"
        )
    args.arrays = args.arrays or (percentiles and True)  # clipped are arrays alone
    complete_arrays(args, statistics=False)
    root = find_train_folder(args.data_path)
    files = open_images(root, arrays=bool(args.arrays))
    count = min(args.max_files or len(files), len(files))
    indices = [i * len(files) // count for i in range(count)]
    if args.arrays:
        limits = tuple(percentiles) if percentiles else None
        found, bad = measure(files, array_format(args), limits, indices)
    else:
        stats, bad = measure_pictures(files, args.in_chans, args.max_pixels, indices)
        found = dict(zip(("mean", "std"), stats, strict=True))
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    kind = "as arrays" if args.arrays else "as 8-bit pictures, from 0 to 1"
    print(
        f"{count - len(bad)} of {len(files)} files of {root}, {args.in_chans} channels, {kind}",
        file=sys.stderr,
    )
    if still := [str(number) for number, std in enumerate(found["std"], 1) if not std]:
        right = "leave it away by --bands" if args.arrays else "give --std 1 for it"
        print(f"note: channel {', '.join(still)} never changes: {right}", file=sys.stderr)
    print(" ".join(f"--{n} {' '.join(f'{v:.6g}' for v in values)}" for n, values in found.items()))


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
