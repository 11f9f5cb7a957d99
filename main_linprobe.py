"""Linear probe of a ConvViT: `python main_linprobe.py --data_path DIR --finetune FILE`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from build_classifier import build_probe
from engine_evaluate import evaluate_checkpoint
from engine_finetune import train_classifier
from models_convvit import MODELS
from util.data.transforms import probe_transform
from util.errors import UsageError
from util.run import args as arguments
from util.run.distributed import init_processes, world_size
from util.run.labeled_data import build_data
from util.run.parser import Ignored, Parser
from util.run.program import run_main
from util.run.setup import complete_run
from util.run.start import find_start

PROGRAM = "probing"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="main_linprobe.py",
        description="Train a linear classifier on the features of a frozen ConvViT, or evaluate "
        "it.",
    )
    layout = (
        "folder with train/ and val/, in each a folder a class or shards; or shards to train on"
    )
    arguments.add_data_args(parser, data=layout, follow_checkpoint=True)
    arguments.add_augmentation_args(parser, crop_scale=(0.08, 1.0))
    group = arguments.add_classifier_args(parser, MODELS)
    nothing_kept = "of no effect: a probe keeps nothing of its encoder for a backward pass"
    group.add_argument("--grad_checkpointing", action=Ignored, nargs=0, note=nothing_kept)
    recipe = dict(batch_size=512, epochs=90, warmup_epochs=10, blr=0.1, weight_decay=0.0)
    arguments.add_optim_args(parser, optimizer="LARS", **recipe)
    arguments.add_eval_args(parser)
    arguments.add_run_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs; or only evaluate."""
    device = init_processes(args.device)
    if args.eval:
        evaluate_checkpoint(args, device)
        return
    content, weights = find_start(args, PROGRAM)
    complete_run(args, device)
    if args.batch_size * world_size() == 1:
        raise UsageError("--batch_size 1: a probe's batch norm needs at least two images a step")
    transform = probe_transform(
        args.input_size,
        args.in_chans,
        hflip=args.hflip,
        scale=tuple(args.crop_scale),
        max_pixels=args.max_pixels,
    )
    loader, val_loader = build_data(args, transform)
    build = partial(build_probe, args, device, weights)
    train_classifier(
        args,
        device,
        content,
        loader,
        val_loader,
        build,
        program=PROGRAM,
        tables=True,
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
