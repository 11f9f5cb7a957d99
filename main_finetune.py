"""Fine-tune a ConvViT as a classifier, or evaluate one.

`python main_finetune.py --data_path DIR --finetune FILE`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO

from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from build_classifier import build_finetuning, check_mixing
from engine_evaluate import evaluate_checkpoint
from engine_finetune import train_classifier
from models_convvit import MODELS
from util.data.crop import random_box
from util.data.transforms import finetune_transform
from util.errors import UsageError
from util.run import args as arguments
from util.run.array_args import add_array_args, random_view
from util.run.distributed import init_processes
from util.run.labeled_data import build_data
from util.run.normalization import given_stats
from util.run.parser import Parser
from util.run.program import run_main
from util.run.setup import complete_run
from util.run.start import find_start

PROGRAM = "fine-tuning"
# timm's policy for 8-bit pictures; arrays have none.
AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="main_finetune.py",
        description="Fine-tune a ConvViT as a classifier, or evaluate one.",
    )
    layout = (
        "folder with train/ and val/, in each a folder a class or shards; or shards to train on"
    )
    arguments.add_data_args(parser, data=layout, follow_checkpoint=True, arrays=True)
    add_array_args(parser)
    arguments.add_recipe_args(parser, crop_scale=(0.08, 1.0), auto_augment=None)
    arguments.add_finetuning_args(arguments.add_classifier_args(parser, MODELS))
    recipe = dict(batch_size=64, epochs=100, warmup_epochs=5, blr=5e-4, weight_decay=0.05)
    group = arguments.add_optim_args(parser, min_lr=1e-6, **recipe)
    arguments.add_layer_args(group, layer_decay=0.65)
    arguments.add_eval_args(parser)
    arguments.add_run_args(parser)
    return parser.parse_args(argv)


def check_recipe(args: argparse.Namespace) -> None:
    """Fill in the policy of augmentation, and refuse settings that do not go together."""
    check_mixing(args)
    if args.arrays and (args.aa not in (None, "none") or args.color_jitter):
        flag = f"--aa {args.aa}" if args.aa not in (None, "none") else "--color_jitter"
        raise UsageError(
            f"{flag} changes colours of 8-bit pictures: leave it away for arrays; crop, flip, "
            f"--rot90, --reprob, --mixup and --cutmix take any channels"
        )
    if args.aa is None:
        args.aa = "none" if args.arrays else AUTO_AUGMENT
    if args.in_chans == 4 and args.aa != "none":
        raise UsageError("--aa knows no images with an alpha channel: give --aa none")


def build_transform(args: argparse.Namespace) -> Callable[[BinaryIO], Tensor]:
    """The augmentation of the training images."""
    if args.arrays:
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu")
        return v2.Compose([random_view(args, random_box), erase])
    try:
        return finetune_transform(
            tuple(args.input_size),
            args.in_chans,
            hflip=args.hflip,
            scale=tuple(args.crop_scale),
            auto_augment=None if args.aa == "none" else args.aa,
            color_jitter=args.color_jitter,
            reprob=args.reprob,
            max_pixels=args.max_pixels,
            remode=args.remode,
            recount=args.recount,
            stats=given_stats(args),
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"--aa {args.aa} is no policy that timm knows, such as rand-m9-mstd0.5-inc1 or none"
        ) from error


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs; or only evaluate."""
    device = init_processes(args.device)
    if args.eval:
        evaluate_checkpoint(args, device)
        return
    content, weights = find_start(args, PROGRAM)
    complete_run(args, device)
    check_recipe(args)
    loader, val_loader = build_data(args, build_transform(args))
    build = partial(build_finetuning, args, device, weights)
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
