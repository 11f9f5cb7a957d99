"""Feature maps of the three stages and attention of the last, as colours, by any checkpoint.

`python -m tools.features --checkpoint FILE --data_path DIR --output features.png`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from engine_features import attention_map
from tools.inference import add_inference_args, open_frozen
from util.data.datasets import LabeledImages
from util.data.files import is_one_of, reason_of
from util.data.transforms import denormalize
from util.errors import UsageError
from util.run.args import check_png
from util.run.distributed import print_once
from util.run.feature_pictures import feature_grid, pca_colors, scale_colors
from util.run.normalization import given_stats
from util.run.parser import Parser, positive_int
from util.run.pictures import stretched
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.features",
        description="Draw images or clips, the features of the three stages (their first three "
        "principal components as red, green and blue) and the attention of the last block.",
    )
    add_inference_args(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--output", type=Path, required=True, metavar="PNG", help="to write")
    group.add_argument(
        "--max_files", type=positive_int, default=6, metavar="N", help="spread over all there are"
    )
    group.add_argument(
        "--columns", type=positive_int, default=8, metavar="N", help="frames of a clip to show"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load, run the model, draw."""
    check_png(args.output)
    frozen = open_frozen(args)
    dataset = frozen.dataset(args.data_path)
    if is_one_of(args.output, map(dataset.path, range(len(dataset)))):
        raise UsageError(f"--output {args.output} is one of the {dataset.what}: give another name")
    samples = load_spread(dataset, args.max_files)
    if frozen.is_video:
        samples = samples.flatten(0, 1)  # [N, views, C, T, H, W]
    model = frozen.model.eval()
    stages, attention = [], []
    for batch in samples.split(args.batch_size):
        x = batch.to(frozen.device)
        enabled = frozen.dtype is not None
        with torch.inference_mode(), torch.autocast(x.device.type, frozen.dtype, enabled):
            maps = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
            attention.append(attention_map(model, x).float().cpu())
        stages.append([grid.float().cpu() for grid in maps])
    maps = [pca_colors(torch.cat(grids)) for grids in zip(*stages, strict=True)]
    undo = partial(denormalize, stats=given_stats(args))
    show = stretched(samples, args.rgb) if args.arrays else undo
    maps.append(scale_colors(torch.cat(attention)))
    save_image(feature_grid(samples, maps, args.columns, show), args.output)
    print_once(
        f"{len(samples)} {dataset.what}: original, stages 1, 2, 3, attention in {args.output}"
    )


def load_spread(dataset: LabeledImages, count: int) -> Tensor:
    """At most `count` samples at equal distances; those that cannot be decoded are named.

    Returns:
        `[n, …]`, of `dataset.load`.

    Raises:
        UsageError: not one can be decoded.
    """
    count, samples = min(count, len(dataset)), []
    for index in (i * len(dataset) // count for i in range(count)):
        try:
            samples.append(dataset.load(index))
        except OSError as error:
            path = dataset.path(index)
            print_once(f"{path} cannot be decoded: skipped ({reason_of(error, path)})", error=True)
    if not samples:
        raise UsageError(f"none of the {count} {dataset.what} tried can be decoded")
    return torch.stack(samples)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
