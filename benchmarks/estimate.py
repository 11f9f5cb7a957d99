"""Estimate hours and GPU-hours of a pretraining: `python -m benchmarks.estimate --help`.

From images/s of one GPU that were measured: `python -m benchmarks.pretrain_step` prints them; a
run's own log line has them for all its GPUs together.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from util.run.logger import markdown_table
from util.run.parser import Parser, positive_float, positive_int, share

IMAGENET_1K = 1_281_167


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    Attributes:
        hours: from its beginning to its end.
        gpu_hours: the same times the GPUs.
    """

    hours: float
    gpu_hours: float


def estimate(
    images_per_s: float, epochs: int, images: int, gpus: int, efficiency: float = 1.0
) -> Estimate:
    """Time and GPU-hours of a run.

    Args:
        images_per_s: of one GPU.
        epochs: length of the run.
        images: of an epoch.
        gpus: how many.
        efficiency: images/s of all GPUs over `gpus` times those of one.
    """
    hours = epochs * images / (images_per_s * gpus * efficiency) / 3600
    return Estimate(hours, hours * gpus)


def duration(hours: float) -> str:
    """Hours, and days where that is easier to read."""
    return f"{hours:,.1f} h" + (f" ({hours / 24:.1f} days)" if hours >= 48 else "")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m benchmarks.estimate",
        description="Hours and GPU-hours of a pretraining, from measured images/s.",
    )
    add = parser.add_argument
    add(
        "--images_per_s",
        type=positive_float,
        required=True,
        metavar="N",
        help="of one GPU, as measured",
    )
    add("--gpus", type=positive_int, default=8, metavar="N", help="how many")
    add("--epochs", type=positive_int, nargs="+", default=[400, 1600], metavar="N", help="of a run")
    add(
        "--images",
        type=positive_int,
        default=IMAGENET_1K,
        metavar="N",
        help="of an epoch; by default those of ImageNet-1K",
    )
    add(
        "--efficiency",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="of several GPUs, as benchmarks.scaling measures it",
    )
    args = parser.parse_args(argv)
    if args.efficiency == 0:
        parser.error("--efficiency must be above 0")
    return args


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    args = parse_args(argv)
    print(
        f"{args.images:,} images an epoch, {args.gpus} GPUs of {args.images_per_s:g} images/s "
        f"each, efficiency {args.efficiency:g}\n"
    )
    rows = [["epochs", "time", "GPU-hours"]]
    for epochs in args.epochs:
        cost = estimate(args.images_per_s, epochs, args.images, args.gpus, args.efficiency)
        rows.append([str(epochs), duration(cost.hours), f"{cost.gpu_hours:,.0f}"])
    print(markdown_table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
