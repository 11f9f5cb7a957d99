"""Pretrain a ConvMAE on a folder of images: `python main_pretrain.py --data_path DIR`."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

import torch
from timm.optim import param_groups_weight_decay
from torchvision.utils import save_image

from engine_pretrain import train_one_epoch
from models_convmae import MODELS, MaskedAutoencoderConvViT
from models_convvit import Geometry
from util import args as arguments
from util.datasets import ImageFiles, find_train_folder
from util.demo_data import write_digits
from util.distributed import (
    init_processes,
    is_main_process,
    rank,
    world_size,
)
from util.errors import UsageError
from util.loader import Loader, StepSampler
from util.logger import count_parameters
from util.resume import find_resumable
from util.run import Run, check_program, check_state, complete_run, run_main, seed_everything
from util.transforms import pretrain_transform
from util.visualize import load_samples, reconstruction_grid, save_loss_curve

PROGRAM = "pretraining"
# Settings of --demo: a tiny model on 32x32 digits with 4-pixel patches, minutes on two cores.
DEMO = dict(
    model="convmae_convvit_tiny_patch16",
    input_size=[32],
    in_chans=1,
    patch_size=[2, 2, 1],
    batch_size=64,
    epochs=40,
    warmup_epochs=5,
    blr=8e-3,
    num_workers=0,
    print_freq=100,
    hflip=False,
    crop_scale=[0.6, 1.0],
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = arguments.Parser(description="Pretrain a ConvMAE on a folder of images.")
    arguments.add_data_args(
        parser, data="folder of images, nested or flat; its train/ if it has one"
    )
    arguments.add_augmentation_args(parser, crop_scale=(0.2, 1.0))
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=arguments.ChoiceOf(MODELS),
        default="convmae_convvit_base_patch16",
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}",
    )
    arguments.add_patch_size_arg(group, arguments.DEFAULT_PATCH_SIZE)
    group.add_argument(
        "--mask_ratio",
        type=arguments.mask_ratio,
        default=0.75,
        metavar="SHARE",
        help="share of the patches to remove",
    )
    arguments.add_switch(
        group,
        "norm_pix_loss",
        False,
        "predict patches normalised by their own mean and variance (the paper's recipe)",
        "predict plain pixels",
    )
    recipe = dict(batch_size=64, epochs=400, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
    arguments.add_optim_args(parser, **recipe)
    arguments.add_run_args(parser)
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
    return args


def build_model(args: argparse.Namespace) -> MaskedAutoencoderConvViT:
    """The model that the arguments describe.

    Raises:
        UsageError: a geometry that the model cannot have.
    """
    try:
        return MODELS[args.model](
            img_size=tuple(args.input_size),
            patch_size=tuple(args.patch_size),
            in_chans=args.in_chans,
            norm_pix_loss=args.norm_pix_loss,
        )
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes that do not fit each other, before anything is built."""
    try:
        geometry = Geometry.of(args.input_size, args.patch_size)
        geometry.visible_patches(args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size, --mask_ratio: {error}") from error


def build_data(args: argparse.Namespace) -> Loader:
    """The images and the order in which steps take them."""
    if args.demo and args.data_path is None:
        args.data_path = write_digits(args.output_dir / "digits")
    transform = pretrain_transform(
        args.input_size, args.in_chans, hflip=args.hflip, scale=tuple(args.crop_scale)
    )
    dataset = ImageFiles(find_train_folder(args.data_path), transform, args.in_chans)
    sampler = StepSampler(
        len(dataset), args.batch_size, args.accum_iter, rank(), world_size(), args.seed
    )
    return Loader(dataset, sampler, args.num_workers, args.pin_mem)


def build_run(args: argparse.Namespace, device: torch.device) -> Run:
    """Data, model, optimizer and logs, set to the state to go on from."""
    loader = build_data(args)
    content = find_resumable(args.resume, args.output_dir)
    if content:
        check_program(content, PROGRAM)
        check_state(content, args, len(loader.dataset))
    seed_everything(args.seed)
    model = build_model(args).to(device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    return Run.prepare(args, device, loader, model, optimizer, content, program=PROGRAM)


def title(run: Run) -> str:
    """What is pretrained, in a line."""
    geometry = run.model.geometry
    pixels = "x".join(map(str, geometry.img_size))
    visible = geometry.visible_patches(run.args.mask_ratio)
    return (
        f"{run.args.model}: {count_parameters(run.model)}, {pixels} pixels, "
        f"{visible} of {geometry.num_patches} patches visible"
    )


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs."""
    device = init_processes(args.device)
    complete_run(args, device)
    check_sizes(args)
    run = build_run(args, device)
    if is_main_process():
        samples = load_samples(args.data_path, args.input_size, args.in_chans).to(device)
    run.describe(title(run))

    with closing(run.log):
        for epoch, start in run.epochs():
            values = train_one_epoch(run, epoch, start, args.mask_ratio)
            if is_main_process():
                picture = reconstruction_grid(run.model, samples, args.mask_ratio)
                run.log.image(epoch + 1, "reconstruction", picture)
            run.end_epoch(epoch, values)
    if is_main_process():
        save_loss_curve(args.output_dir / "log.txt", args.output_dir / "loss.png")
        picture = reconstruction_grid(run.model, samples, args.mask_ratio)
        save_image(picture, args.output_dir / "reconstruction.png")
        print(f"done: checkpoint.pth, reconstruction.png, loss.png, log.txt in {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
