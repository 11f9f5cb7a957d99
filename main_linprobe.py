"""Linear probe of a ConvViT: `python main_linprobe.py --data_path DIR --finetune FILE`."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial

from timm.layers import trunc_normal_
from torch import nn

from engine_finetune import (
    Best,
    build_classifier,
    build_data,
    check_nb_classes,
    check_resumed,
    evaluate_checkpoint,
    find_start,
    fit,
    train_one_epoch,
)
from models_convvit import MODELS
from util.data.transforms import probe_transform
from util.errors import UsageError
from util.run import args as arguments
from util.run.distributed import SyncedBatchNorm1d, init_processes, print_once, world_size
from util.run.lars import LARS
from util.run.logger import count_parameters
from util.run.parser import Parser
from util.run.program import run_main
from util.run.run import Run
from util.run.setup import complete_run, seed_everything

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
    arguments.add_classifier_args(parser, MODELS)
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
    train_loader, val_loader = build_data(args, transform)
    classes = train_loader.dataset.classes
    check_nb_classes(args, train_loader.dataset)
    check_resumed(content, args, train_loader.dataset)

    seed_everything(args.seed)
    model, report = build_classifier(args, weights and weights.without("head"), classes)
    model.requires_grad_(False)  # so nothing of the encoder is kept for a backward pass
    trunc_normal_(model.head.weight, std=0.01)
    model.head.requires_grad_(True)
    model.add_probe_norm(SyncedBatchNorm1d)
    model.to(device)
    best = Best()
    optimizer = LARS(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    run = Run.prepare(
        args, device, train_loader, model, optimizer, content,
        program=PROGRAM, parts={"best": best}, extra={"classes": classes},
    )  # fmt: skip
    if report and not content:
        print_once(report)
    run.describe(f"{len(classes)} classes, {count_parameters(model)}, the encoder frozen")

    criterion = nn.CrossEntropyLoss()
    train = partial(train_one_epoch, run, criterion=criterion, trained=model.head)
    with closing(run.report.log):
        fit(run, train, val_loader, best, predictions=args.predictions)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
