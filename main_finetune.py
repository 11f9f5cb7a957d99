"""Fine-tune a ConvViT as a classifier, or evaluate one.

`python main_finetune.py --data_path DIR --finetune FILE`
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import torch
from PIL import Image
from timm.data import Mixup
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine_finetune import (
    Best,
    build_classifier,
    build_data,
    evaluate_checkpoint,
    find_start,
    fit,
    train_one_epoch,
)
from models_convvit import MODELS, ConvViT
from util import args as arguments
from util.distributed import init_processes, print_once, rank
from util.errors import UsageError
from util.logger import count_parameters
from util.run import Run, check_state, complete_run, run_main, seed_everything
from util.transforms import finetune_transform

PROGRAM = "fine-tuning"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = arguments.Parser(description="Fine-tune a ConvViT as a classifier, or evaluate one.")
    layout = "folder with train/ and val/, the images of each class in a folder of its own"
    arguments.add_data_args(parser, data=layout, follow_checkpoint=True)
    add_recipe_args(parser)
    group = arguments.add_classifier_args(parser, MODELS)
    group.add_argument(
        "--drop_path",
        type=arguments.share,
        default=0.1,
        metavar="RATE",
        help="stochastic depth, rising linearly to this rate in the last block",
    )
    recipe = dict(batch_size=64, epochs=100, warmup_epochs=5, blr=5e-4, weight_decay=0.05)
    group = arguments.add_optim_args(parser, min_lr=1e-6, **recipe)
    group.add_argument(
        "--layer_decay",
        type=arguments.share,
        default=0.65,
        metavar="FACTOR",
        help="learning rate of a layer over that of the next",
    )
    arguments.add_switch(
        group, "model_ema", False, "average the weights over steps (timm's)", "do not average"
    )
    group.add_argument(
        "--model_ema_decay",
        type=arguments.share,
        default=0.9999,
        metavar="FACTOR",
        help="weight of the past in each step of the average",
    )
    arguments.add_eval_args(parser)
    arguments.add_run_args(parser)
    return parser.parse_args(argv)


def add_recipe_args(parser: arguments.Parser) -> None:
    """Augmentation and regularisation of the images and labels."""
    group = arguments.add_augmentation_args(parser, crop_scale=(0.08, 1.0))
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm's auto-augment policy; none for none",
    )

    def share(name: str, default: float, help: str, kind: Callable = arguments.share) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=help)

    anything = arguments.non_negative_float
    share("color_jitter", 0.0, "colour jitter, used without --aa", anything)
    share("reprob", 0.25, "share of images in which a rectangle is erased")
    share("smoothing", 0.1, "label smoothing")
    share("mixup", 0.8, "mixup's alpha; 0 for none", anything)
    share("cutmix", 1.0, "cutmix's alpha; 0 for none", anything)
    share("mixup_prob", 1.0, "share of batches that are mixed")
    share("mixup_switch_prob", 0.5, "share of cutmix where both are on")


def mixes(args: argparse.Namespace) -> bool:
    """Whether images of a batch are mixed."""
    return (args.mixup > 0 or args.cutmix > 0) and args.mixup_prob > 0


def check_recipe(args: argparse.Namespace) -> None:
    """Refuse settings that do not go together, before anything is built."""
    if mixes(args) and args.batch_size % 2:
        raise UsageError(
            f"--batch_size {args.batch_size} must be even, as mixup pairs images; or give "
            f"--mixup 0 --cutmix 0"
        )
    if args.in_chans == 4 and args.aa != "none":
        raise UsageError("--aa knows no images with an alpha channel: give --aa none")


def build_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """The augmentation of the training images."""
    try:
        return finetune_transform(
            tuple(args.input_size),
            args.in_chans,
            hflip=args.hflip,
            scale=tuple(args.crop_scale),
            auto_augment=None if args.aa == "none" else args.aa,
            color_jitter=args.color_jitter,
            reprob=args.reprob,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"--aa {args.aa} is no policy that timm knows, such as rand-m9-mstd0.5-inc1 or none"
        ) from error


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """Timm's loss, and what mixes the batches of it if they are mixed."""
    if mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing), None
    return nn.CrossEntropyLoss(), None


def build_optimizer(args: argparse.Namespace, model: ConvViT) -> torch.optim.Optimizer:
    """AdamW with a learning rate that falls from layer to layer towards the input."""
    groups = param_groups_layer_decay(
        model,
        args.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=args.layer_decay,
    )
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs; or only evaluate."""
    device = init_processes(args.device)
    if args.eval:
        evaluate_checkpoint(args, device)
        return
    content, weights = find_start(args, PROGRAM)
    complete_run(args, device)
    check_recipe(args)
    train_loader, val_loader = build_data(args, build_transform(args))
    classes = train_loader.dataset.classes
    if content:
        check_state(content, args, len(train_loader.dataset))

    seed_everything(args.seed)
    model, report = build_classifier(args, weights, classes, drop_path_rate=args.drop_path)
    if report and "head.weight" in report.missing:
        trunc_normal_(model.head.weight, std=2e-5)
    model.to(device)
    ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    best = Best()
    parts = {"best": best} | ({"model_ema": ema.module} if ema else {})
    optimizer = build_optimizer(args, model)
    seed_everything((args.seed + rank()) % 2**32)  # mixup and drop path differ between processes
    run = Run.prepare(
        args, device, train_loader, model, optimizer, content,
        program=PROGRAM, parts=parts, extra={"classes": classes},
    )  # fmt: skip
    if ema:
        run.after_step = partial(ema.update, model)
    if report and not content:
        print_once(report)
    run.describe(f"{len(classes)} classes, {count_parameters(model)}")

    criterion, mixup = build_criterion(args, len(classes))
    train = partial(train_one_epoch, run, criterion=criterion, trained=model, mixup=mixup)
    with closing(run.log):
        fit(run, train, val_loader, best, ema)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
