"""Pretrain a VideoConvMAE: `python -m VideoConvMAE.main_pretrain --data_path DIR_OR_LIST`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from engine_pretrain import build_run, check_sizes, pretrain
from util.data.transforms import denormalize
from util.errors import UsageError
from util.run import args as arguments
from util.run.distributed import init_processes, is_main_process, print_once
from util.run.normalization import given_stats, tell_stats
from util.run.parser import Parser, add_switch, share
from util.run.pictures import Drawing, Reconstruction, reconstruct
from util.run.program import run_main
from util.run.run import Run
from util.run.setup import complete_run, train_loader
from util.run.start import find_pretraining_start
from VideoConvMAE.args import add_clip_args, complete_protocol
from VideoConvMAE.datasets import Clips
from VideoConvMAE.lists import VideoList, find_unlabeled
from VideoConvMAE.models import MASKINGS, MODELS
from VideoConvMAE.transforms import CROP_SCALES, pretrain_transform
from VideoConvMAE.visualize import clip_movie, draw_clips, load_samples

PROGRAM, MODEL = "video pretraining", "videoconvmae_base_patch16"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m VideoConvMAE.main_pretrain", description="Pretrain a VideoConvMAE."
    )
    arguments.add_data_args(
        parser,
        data="folder of videos or of folders of pictures (its train/ or train list if it has one), "
        "or a list: lines of a path, with a label or without, Kinetics' csv, Something-Something's "
        "json; labels are not used",
        follow_checkpoint=True,
    )
    add_clip_args(parser, samplings=("dense", "uniform"))
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--crop_scales",
        type=share,
        nargs="+",
        default=list(CROP_SCALES),
        metavar="SHARE",
        help="sides of the multi-scale crop, as shares of the frame's shorter side",
    )
    add_switch(group, "hflip", False, "flip half of the clips", "never flip")
    group = arguments.add_autoencoder_args(parser, MODELS, model=MODEL, ratio=0.9)
    arguments.add_inflate_arg(group)
    group.add_argument(
        "--masking",
        choices=MASKINGS,
        default="tube",
        help="tube: the same patches in all frames; random: any cubes",
    )
    recipe = dict(batch_size=32, epochs=800, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
    arguments.add_optim_args(parser, min_blr=1e-5, **recipe)
    arguments.add_run_args(parser, pictures=True)
    args = parser.parse_args(argv)
    if args.data_path is None:
        parser.error("--data_path is missing: a folder of videos, or a list of them")
    arguments.settle_model(parser, args, MODEL)
    return args


def check_crop_scales(args: argparse.Namespace) -> None:
    """Sides in descending order, none of them nothing."""
    if sorted(args.crop_scales, reverse=True) != args.crop_scales or args.crop_scales[-1] == 0:
        raise UsageError("--crop_scales takes the larger shares first, and no 0")


def build_data(args: argparse.Namespace, videos: VideoList, sampling: dict[str, object]) -> Clips:
    """The clips to train on."""
    transform = pretrain_transform(args.input_size, scales=args.crop_scales, hflip=args.hflip)
    return Clips(videos, transform, **sampling)


def main(args: argparse.Namespace) -> None:
    """Build everything, then run the epochs."""
    device = init_processes(args.device)
    start = find_pretraining_start(args, PROGRAM, MODELS, MODEL)
    complete_run(args, device)
    sampling = complete_protocol(args)
    check_crop_scales(args)
    check_sizes(args, MODELS)
    videos = find_unlabeled(args.data_path, args.video_root)
    for note in videos.notes:
        print_once(note)
    tell_stats(args)
    loader = train_loader(args, build_data(args, videos, sampling))
    run = build_run(args, device, loader, MODELS, PROGRAM, start)
    draw = None
    if is_main_process():
        samples = load_samples(videos, args).to(device)

        def draw() -> Drawing:
            return draw_clips(reconstructed(run, samples))

    pretrain(run, draw)
    if is_main_process():
        write_movie(run, samples)


def reconstructed(run: Run, samples: Tensor) -> Reconstruction:
    """The samples, masked and filled in."""
    show = partial(denormalize, stats=given_stats(run.args))
    return reconstruct(run.model, samples, run.args.mask_ratio, show=show)


def write_movie(run: Run, samples: Tensor) -> None:
    """The samples, masked and filled in, as an mp4 in the output folder."""
    path = run.args.output_dir / "reconstruction.mp4"
    clip_movie(reconstructed(run, samples), path)
    print(f"and {path}")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
