"""Estimate time, GPU-hours and cores of a run: `python -m benchmarks.estimate --help`.

Arithmetic from images/s that were measured: `python -m benchmarks.pretrain_step` prints those of a
GPU, a run's own log line those of all its GPUs together, `python -m benchmarks.loader` those of a
core that reads and augments. The efficiency of several GPUs is measured, too
(`benchmarks.scaling`), or follows from the bytes that a ring all-reduce of the gradients sends.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from util.run.logger import markdown_table
from util.run.parser import Parser, positive_float, positive_int, share

IMAGENET_1K = 1_281_167
# Of forward and backward, by their arithmetic; gradients can be sent while it lasts.
BACKWARD_SHARE = 2 / 3


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


def ring_seconds(gradient_bytes: float, gpus: int, bytes_per_s: float) -> float:
    """Seconds of a ring all-reduce: each GPU sends 2 (n - 1) / n of the gradients.

    Args:
        gradient_bytes: of all gradients.
        gpus: n.
        bytes_per_s: that one GPU sends to the next. In a ring through several nodes that is what a
            node's whole network sends, because the rings of its adapters share the gradients.
    """
    return 2 * (gpus - 1) / gpus * gradient_bytes / bytes_per_s


def overlapped(step: float, reduce: float) -> tuple[float, float]:
    """Efficiency of a step that waits for all of an all-reduce, or for what outlasts its backward.

    Args:
        step: seconds of a GPU alone.
        reduce: seconds of the all-reduce.

    Returns:
        The least and the most.
    """
    return step / (step + reduce), step / (step + max(0, reduce - BACKWARD_SHARE * step))


def duration(hours: float) -> str:
    """Hours, and days where that is easier to read."""
    return f"{hours:,.1f} h" + (f" ({hours / 24:.1f} days)" if hours >= 48 else "")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m benchmarks.estimate",
        description="Hours, GPU-hours and cores of a pretraining, from measured images/s.",
    )
    add = parser.add_argument
    add(
        "--images_per_s",
        type=positive_float,
        nargs="+",
        required=True,
        metavar="N",
        help="of one GPU, as measured; several for several kinds of GPU",
    )
    add("--gpus", type=positive_int, nargs="+", default=[8], metavar="N", help="how many")
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
        metavar="SHARE",
        help="of several GPUs, as benchmarks.scaling measures it (default: 1)",
    )
    add(
        "--loader_images_per_s",
        type=positive_float,
        nargs="+",
        default=[],
        metavar="N",
        help="of one core that reads and augments, as benchmarks.loader measures it: how many "
        "cores keep a GPU fed",
    )
    group = parser.add_argument_group(
        "efficiency by arithmetic, from a ring all-reduce of the gradients, without latency"
    )
    add = group.add_argument
    add("--gradient_mb", type=positive_float, metavar="MB", help="4 x million parameters")
    add("--batch_size", type=positive_int, metavar="N", help="images of a step and GPU")
    add("--gpus_per_node", type=positive_int, default=8, metavar="N", help="default: 8")
    add(
        "--node_gb_per_s",
        type=positive_float,
        metavar="GB/S",
        help="that a GPU sends to another of its node",
    )
    add(
        "--network_gb_per_s",
        type=positive_float,
        metavar="GB/S",
        help="that a node sends to another through all its adapters",
    )
    args = parser.parse_args(argv)
    if args.efficiency == 0:
        parser.error("--efficiency must be above 0")
    if args.gradient_mb:
        if args.efficiency:
            parser.error("--efficiency and --gradient_mb: give one of them")
        needed = {"--batch_size": args.batch_size}
        if min(args.gpus) <= args.gpus_per_node:
            needed["--node_gb_per_s"] = args.node_gb_per_s
        if max(args.gpus) > args.gpus_per_node:
            needed["--network_gb_per_s"] = args.network_gb_per_s
        if missing := [name for name, value in needed.items() if value is None]:
            parser.error(f"--gradient_mb needs {' and '.join(missing)}, too")
    elif given := [
        name
        for name in ("batch_size", "node_gb_per_s", "network_gb_per_s")
        if getattr(args, name) is not None
    ]:
        parser.error(f"--{given[0]} says nothing without --gradient_mb")
    return args


def efficiencies(args: argparse.Namespace, rate: float, gpus: int) -> tuple[float, float]:
    """The least and the most efficiency of so many GPUs of `rate` images/s each."""
    if not args.gradient_mb:
        return (args.efficiency or 1.0,) * 2
    link = args.node_gb_per_s if gpus <= args.gpus_per_node else args.network_gb_per_s
    reduce = ring_seconds(args.gradient_mb * 1e6, gpus, link * 1e9)
    return overlapped(args.batch_size / rate, reduce)


def span(low: str, high: str) -> str:
    """A range, or one value where both ends are the same."""
    return low if low == high else f"{low} – {high}"


def run_table(args: argparse.Namespace) -> str:
    """A row for each kind of GPU, number of them and length of a run."""
    rows = [["images/s a GPU", "GPUs", "efficiency", "epochs", "time", "GPU-hours"]]
    for rate in args.images_per_s:
        for gpus in args.gpus:
            shares = efficiencies(args, rate, gpus)
            for epochs in args.epochs:
                slow, fast = (estimate(rate, epochs, args.images, gpus, s) for s in shares)
                rows.append(
                    [
                        *(f"{rate:g}", str(gpus), span(*(f"{s:.3g}" for s in shares)), str(epochs)),
                        span(duration(fast.hours), duration(slow.hours)),
                        span(f"{fast.gpu_hours:,.0f}", f"{slow.gpu_hours:,.0f}"),
                    ]
                )
    return markdown_table(rows)


def cores_table(rates: Sequence[float], loader_rates: Sequence[float]) -> str:
    """Cores that keep one GPU fed: images/s of the GPU over those of a core, rounded up."""
    rows = [["images/s a GPU", *(f"cores at {rate:g} images/s" for rate in loader_rates)]]
    for rate in rates:
        rows.append([f"{rate:g}", *(str(math.ceil(rate / core)) for core in loader_rates)])
    return markdown_table(rows)


def main(argv: Sequence[str]) -> None:
    """Print the tables."""
    args = parse_args(argv)
    print(f"arithmetic, not measured: {args.images:,} images an epoch\n")
    print(run_table(args))
    if args.loader_images_per_s:
        print(f"\n{cores_table(args.images_per_s, args.loader_images_per_s)}")


if __name__ == "__main__":
    main(sys.argv[1:])
