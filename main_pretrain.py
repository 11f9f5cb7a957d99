"""Pretrain a ConvMAE on a folder of images: `python main_pretrain.py --data_path DIR`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
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
    gather_objects,
    init_processes,
    is_main_process,
    print_once,
    rank,
    world_size,
    wrap_model,
)
from util.errors import UsageError
from util.loader import Loader, StepSampler
from util.logger import Meters, RunLog
from util.optim_step import OptimStep, amp_dtype
from util.resume import Checkpoints, find_resumable
from util.run import Run, run_main, seed_everything
from util.transforms import pretrain_transform
from util.visualize import load_samples, reconstruction_grid, save_loss_curve

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
    arguments.add_data_args(parser)
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--crop_scale",
        type=arguments.share,
        nargs=2,
        default=[0.2, 1.0],
        metavar=("MIN", "MAX"),
        help="area of the random crop, as a share of the image",
    )
    arguments.add_switch(group, "hflip", True, "flip half of the images", "never flip")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=arguments.ChoiceOf(MODELS),
        default="convmae_convvit_base_patch16",
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}",
    )
    group.add_argument(
        "--patch_size",
        type=arguments.positive_int,
        nargs=3,
        default=[4, 2, 2],
        metavar="STRIDE",
        help="strides of the three stages; their product is the patch's side in pixels",
    )
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
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise UsageError("--crop_scale takes the smaller share first, and more than 0")
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
    dataset = ImageFiles(args.data_path, transform)
    sampler = StepSampler(
        len(dataset), args.batch_size, args.accum_iter, rank(), world_size(), args.seed
    )
    return Loader(dataset, sampler, args.num_workers, args.pin_mem)


def build_run(args: argparse.Namespace, device: torch.device) -> tuple[Run, int, int]:
    """Data, model, optimizer and logs, with the state to go on from.

    Returns:
        The run, and the position at which it begins: epoch and steps done in it.
    """
    dtype = amp_dtype(args.amp, device)
    loader = build_data(args)
    content = find_resumable(args.resume, args.output_dir)
    if content:
        arguments.check_same_run(args, content["args"])
        check_same_images(content, len(loader.dataset))

    seed_everything(args.seed)
    model = build_model(args).to(device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    trained = wrap_model(model, device, args.compile)
    step = OptimStep(trained, optimizer, device, dtype, args.clip_grad)
    meters = Meters(("loss", "grad_norm"), device)
    parts = {"model": model, "optimizer": optimizer, "scaler": step, "meters": meters}
    extra = {"num_images": len(loader.dataset)}
    checkpoints = Checkpoints(args.output_dir, arguments.plain(args), parts, extra)
    epoch, start = checkpoints.restore(content) if content else (0, 0)
    views = gather_objects((epoch, start, len(loader.dataset)))
    if len(set(views)) > 1:
        raise UsageError(
            f"the processes see different things (epoch, step, images: {views}): "
            f"--output_dir and --data_path must be the same folders on every node"
        )
    log = RunLog(args.output_dir, args.log_dir, epoch + start / loader.steps_per_epoch)
    return Run(args, device, model, loader, step, meters, checkpoints, log), epoch, start


def check_same_images(content: Mapping, num_images: int) -> None:
    """Refuse to go on in the middle of an epoch of other images.

    Raises:
        UsageError: with both numbers.
    """
    if content["step"] and content["num_images"] != num_images:
        raise UsageError(
            f"cannot go on at step {content['step']} of an epoch of {content['num_images']} "
            f"images: there are {num_images} now; give the same images, or resume from the end "
            f"of an epoch"
        )


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs."""
    device = init_processes(args.device)
    arguments.complete(args, device.type, world_size())
    check_sizes(args)
    arguments.check_writable(args.output_dir, "--output_dir")
    arguments.check_writable(args.log_dir, "--log_dir")
    run, first, start = build_run(args, device)
    if is_main_process():
        samples = load_samples(args.data_path, args.input_size, args.in_chans).to(device)
    describe(run, first, start)

    with closing(run.log):
        for epoch in range(first, args.epochs):
            values = train_one_epoch(run, epoch, start, args.mask_ratio)
            start = 0
            if is_main_process():
                picture = reconstruction_grid(run.model, samples, args.mask_ratio)
                run.log.image(epoch + 1, "reconstruction", picture)
            run.end_epoch(epoch, values)
    if is_main_process():
        save_loss_curve(args.output_dir / "log.txt", args.output_dir / "loss.png")
        picture = reconstruction_grid(run.model, samples, args.mask_ratio)
        save_image(picture, args.output_dir / "reconstruction.png")
        print(f"done: checkpoint.pth, reconstruction.png, loss.png, log.txt in {args.output_dir}")


def describe(run: Run, first: int, start: int) -> None:
    """Print what is about to run."""
    args, geometry = run.args, run.model.geometry
    if first >= args.epochs:
        print_once(f"nothing to train: {args.output_dir} holds all {args.epochs} epochs")
        return
    count = sum(p.numel() for p in run.model.parameters()) / 1e6
    precision = str(run.step.dtype or torch.float32).removeprefix("torch.")
    begin = f"from epoch {first + 1}, step {start}" if first or start else "from the beginning"
    print_once(
        f"{args.model}: {count:.1f} M parameters, {'x'.join(map(str, geometry.img_size))} pixels, "
        f"{geometry.visible_patches(args.mask_ratio)} of {geometry.num_patches} patches visible\n"
        f"{len(run.loader.dataset)} images of {find_train_folder(args.data_path)}, "
        f"{run.loader.steps_per_epoch} steps of {args.batch_size} x {args.accum_iter} x "
        f"{world_size()} = {args.effective_batch_size} an epoch\n"
        f"{args.epochs} epochs {begin}, peak lr {args.lr:.3g}, {precision} on {run.device}"
        f"{', compiled' if args.compile else ''}, output in {args.output_dir}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
