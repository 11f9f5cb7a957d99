"""Pretrain a ConvMAE on a folder of images: `python main_pretrain.py --data_path DIR`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from engine_knn import knn_accuracy, pooled_latent
from engine_pretrain import build_run, build_teacher, check_sizes, pretrain
from models_convmae import MODELS
from util.data.crop import random_box
from util.data.datasets import ImageFiles
from util.data.folders import find_train_folder
from util.data.loader import Loader
from util.data.transforms import denormalize, pretrain_transform
from util.demo.digits import write_digits
from util.errors import UsageError
from util.run import args as arguments
from util.run.array_args import (
    add_array_args,
    array_format,
    complete_arrays,
    random_view,
    tell_kind,
)
from util.run.distributed import init_processes, is_main_process
from util.run.labeled_data import labeled_splits
from util.run.normalization import given_stats
from util.run.parser import Parser, RecipeValue
from util.run.pictures import draw_images, load_samples, stretched
from util.run.program import run_main
from util.run.setup import complete_run, train_loader
from util.run.start import find_pretraining_start

PROGRAM, MODEL = "pretraining", "convmae_convvit_base_patch16"
# Settings of --demo: a tiny model on 32x32 digits with 4-pixel patches, minutes on two cores.
DEMO = dict(
    model="convmae_convvit_tiny_patch16",
    input_size=[32],
    in_chans=1,
    patch_size=[2, 2, 1],
    batch_size=64,
    epochs=40,
    warmup_epochs=RecipeValue(5),
    blr=8e-3,
    num_workers=0,
    print_freq=100,
    hflip=False,
    crop_scale=[0.6, 1.0],
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="main_pretrain.py", description="Pretrain a ConvMAE on a folder of images."
    )
    arguments.add_data_args(
        parser,
        data="folder of images, nested or flat, its train/ if it has one; or its shards, as "
        "'DIR/{000000..000999}.tar'",
        follow_checkpoint=True,
        arrays=True,
    )
    add_array_args(parser)
    arguments.add_augmentation_args(parser, crop_scale=(0.2, 1.0))
    arguments.add_autoencoder_args(parser, MODELS, model=MODEL, ratio=0.75)
    arguments.add_teacher_args(parser)
    recipe = dict(batch_size=64, epochs=400, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
    arguments.add_optim_args(parser, **recipe)
    arguments.add_knn_args(parser)
    arguments.add_run_args(parser, pictures=True)
    parser.add_argument(
        "--demo",
        action="store_true",
        help="pretrain a tiny model on embedded handwritten digits; other flags still override",
    )
    if "--demo" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if not args.demo and args.data_path is None:
        parser.error("--data_path is missing: a folder of images (or --demo for embedded ones)")
    if args.knn_path and not args.knn_freq:
        parser.error("--knn_path needs --knn_freq: after how many epochs to measure")
    if args.finetune is None:
        try:
            complete_arrays(args)
        except UsageError as error:
            parser.error(str(error))
    arguments.settle_model(parser, args, MODEL)
    return args


def build_data(args: argparse.Namespace) -> Loader:
    """The images and the order in which steps take them."""
    if args.demo and args.data_path is None:
        args.data_path = write_digits(args.output_dir / "digits")
    root = find_train_folder(args.data_path)
    tell_kind(args, root)
    if args.arrays:
        transform = random_view(args, random_box, keep_nodata=True)
    else:
        transform = pretrain_transform(
            args.input_size,
            args.in_chans,
            hflip=args.hflip,
            scale=tuple(args.crop_scale),
            max_pixels=args.max_pixels,
        )
    return train_loader(args, ImageFiles(root, transform, arrays=bool(args.arrays)))


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs."""
    device = init_processes(args.device)
    start = find_pretraining_start(args, PROGRAM, MODELS, MODEL)
    complete_run(args, device)
    check_sizes(args, MODELS)
    loader, splits = build_data(args), None
    if args.knn_freq:
        flag = "--knn_path" if args.knn_path else "--knn_freq without --knn_path: --data_path"
        splits = labeled_splits(args, args.knn_path or args.data_path, flag)
    teacher = build_teacher(args, device)
    run = build_run(args, device, loader, MODELS, PROGRAM, start)
    draw = measure = None
    if splits:
        options = {"predict": pooled_latent, "max_bad_images": args.max_bad_images}
        measure = partial(knn_accuracy, run.model, splits, device, run.optim.dtype, **options)
    if is_main_process():
        samples = load_samples(
            args.data_path,
            args.input_size,
            args.in_chans,
            max_pixels=args.max_pixels,
            form=array_format(args) if args.arrays else None,
            stats=given_stats(args),
        ).to(device)
        undo = partial(denormalize, stats=given_stats(args))
        show = stretched(samples, args.rgb) if args.arrays else undo
        draw = partial(draw_images, run.model, samples, args.mask_ratio, show=show)
    pretrain(run, draw, teacher, measure)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
