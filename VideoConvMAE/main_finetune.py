"""Fine-tune a VideoConvViT for action recognition, or test one.

`python -m VideoConvMAE.main_finetune --data_path DIR --finetune FILE`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from build_classifier import build_finetuning, check_mixing
from engine_evaluate import Evaluation, evaluate_checkpoint, mean_over_views
from engine_finetune import train_classifier
from util.data.loader import Loader
from util.errors import UsageError
from util.run import args as arguments
from util.run.distributed import init_processes, print_once, wait_for_all
from util.run.normalization import complete_stats, given_stats, tell_stats
from util.run.parser import Parser, positive_int
from util.run.program import run_main
from util.run.resume import BEST, LAST
from util.run.setup import complete_run, eval_loader, train_loader
from util.run.start import find_start
from util.run.val_share import check_share, choose_share, means_share
from util.weights.read import Weights
from VideoConvMAE.args import add_clip_args, add_view_args, complete_protocol
from VideoConvMAE.datasets import LabeledClips, Views
from VideoConvMAE.lists import (
    TEST_SPLIT,
    VideoList,
    class_numbers,
    find_path,
    find_split,
    find_videos,
)
from VideoConvMAE.models import CLASSIFIERS
from VideoConvMAE.transforms import finetune_transform, views_transform

PROGRAM = "video fine-tuning"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m VideoConvMAE.main_finetune",
        description="Fine-tune a VideoConvViT for action recognition, or test one.",
    )
    arguments.add_data_args(
        parser,
        data="folder with train and val: folders with a folder of videos for each class, or lists "
        "(train.csv, train.txt, train.json …) of `path label` or `path,label`, Kinetics' csv, "
        "Something-Something's json; with --val_path also the list to train on",
        follow_checkpoint=True,
    )
    add_clip_args(parser)
    group = arguments.add_recipe_args(
        parser, crop_scale=(0.08, 1.0), auto_augment="rand-m7-n4-mstd0.5-inc1"
    )
    group.add_argument(
        "--repeats",
        type=positive_int,
        default=1,
        metavar="N",
        help="repeated augmentation: how often a decoded clip is augmented in a batch",
    )
    group = arguments.add_classifier_args(parser, CLASSIFIERS)
    arguments.add_inflate_arg(group)
    arguments.add_finetuning_args(group)
    recipe = dict(batch_size=8, epochs=100, warmup_epochs=5, blr=1e-3, weight_decay=0.05)
    group = arguments.add_optim_args(parser, min_blr=1e-6, **recipe)
    arguments.add_layer_args(group, layer_decay=0.75)
    arguments.add_eval_args(parser, "videos to validate and test on, a folder a class or a list")
    add_view_args(parser.add_argument_group("test"))
    arguments.add_run_args(parser)
    return parser.parse_args(argv)


def videos_to_train_on(args: argparse.Namespace) -> VideoList:
    """`train` of `--data_path`; or all of that list, if the others are in `--val_path`."""
    if args.data_path is not None and args.data_path.is_dir():
        return find_split(args.data_path, ("train",), args.video_root)
    if args.data_path is None or (args.val_path is None and args.val_share is None):
        raise UsageError(
            "--data_path takes a folder with train and val, as folders or as lists (train.csv …); "
            "or the list to train on, with another one in --val_path, or --val_share"
        )
    return find_videos(args.data_path, args.video_root)


def videos_to_validate_on(args: argparse.Namespace) -> VideoList:
    """`--val_path`, or `val` of `--data_path`."""
    if args.val_path is not None:
        return find_videos(args.val_path, args.video_root)
    return find_split(args.data_path, TEST_SPLIT, args.video_root)


def split_videos(args: argparse.Namespace) -> tuple[VideoList, VideoList, list[str]]:
    """The videos to train on, the share of each class that is held out, and the classes.

    Raises:
        UsageError: other videos to validate on, none with labels, or a share that is no video.
    """
    videos = videos_to_train_on(args)
    check_share(args, find_path(args.data_path, TEST_SPLIT))
    classes = videos.classes
    labels = class_numbers(videos, classes)
    source = videos.source
    root = source if source.is_dir() else args.video_root or source.parent
    chosen = choose_share(args, videos.paths, labels, root, "videos").tolist()

    def part(held: bool) -> VideoList:
        rows = [i for i, of_val in enumerate(chosen) if of_val == held]
        paths, names = ([column[i] for i in rows] for column in (videos.paths, videos.labels))
        notes = () if held else videos.notes
        return replace(videos, paths=paths, labels=names, notes=notes)

    return part(False), part(True), classes


def videos_to_test(args: argparse.Namespace, weights: Weights) -> VideoList:
    """`--val_path`, `val` of `--data_path`, what the run held out, or all of that path."""
    if args.val_path is None and args.data_path is None:
        raise UsageError("--data_path is missing: a folder with train and val, or a list to test")
    root = args.data_path
    has_val, has_train = (find_path(root, names) is not None for names in (TEST_SPLIT, ("train",)))
    if means_share(args, weights, has_val, has_train):
        return split_videos(args)[1]
    if args.val_path is not None or (args.data_path.is_dir() and any(args.data_path.glob("val*"))):
        return videos_to_validate_on(args)
    return find_videos(args.data_path, args.video_root)


def views_loader(
    args: argparse.Namespace,
    videos: VideoList,
    classes: Sequence[str],
    clips: int,
    crops: int,
    *,
    tell: bool = True,
) -> Loader:
    """All views of every video once; as many views at a time as training has clips."""
    transform = views_transform(tuple(args.input_size), crops, given_stats(args))
    unlabeled = args.eval and args.predictions is not None
    dataset = Views(
        videos, classes, transform, clips=clips, unlabeled=unlabeled, **complete_protocol(args)
    )
    return eval_loader(args, dataset, max(1, args.batch_size // (clips * crops)), tell=tell)


def load_test(args: argparse.Namespace, weights: Weights, *, tell: bool = True) -> Loader:
    """All views by which a trained model is tested, as the run that trained it says.

    The classes are the model's own if it names them. A run that tests itself has said what there
    is to `tell` of the videos.
    """
    complete_stats(args, weights)
    complete_protocol(args, weights.args)
    videos = videos_to_test(args, weights)
    if tell:
        tell_notes(videos)
    classes = weights.classes or videos.classes
    return views_loader(args, videos, classes, args.test_clips, args.test_crops, tell=tell)


def tell_notes(videos: VideoList) -> None:
    """Print what was left out of a list or a folder."""
    for note in videos.notes:
        print_once(note)


def build_data(args: argparse.Namespace) -> tuple[Loader, Loader]:
    """Clips to train on; one view of each video to validate on."""
    if args.val_share is not None:
        train, val, classes = split_videos(args)
    else:
        train, val = videos_to_train_on(args), videos_to_validate_on(args)
        classes = train.classes
    for videos in (train, val):
        tell_notes(videos)
    transform = finetune_transform(
        tuple(args.input_size),
        args.in_chans,
        hflip=args.hflip,
        scale=tuple(args.crop_scale),
        auto_augment=None if args.aa == "none" else args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        stats=given_stats(args),
    )
    tell_stats(args)
    sampling = complete_protocol(args)
    dataset = LabeledClips(train, classes, transform, repeats=args.repeats, **sampling)
    return train_loader(args, dataset), views_loader(args, val, classes, 1, 1)


def main(args: argparse.Namespace) -> Evaluation:
    """Train, then test the best and the last weights on all views; or only test some.

    Returns:
        The test of the best weights, or of those that `--eval` is about.
    """
    device = init_processes(args.device)
    if args.eval:
        return test(args, device)
    train(args, device)
    wait_for_all()  # for the last checkpoint
    best = test_of_run(args, device, "best", BEST)
    test_of_run(args, device, "last", LAST, predictions=None, confusion=None)
    return best


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Build everything, then run the epochs."""
    content, weights = find_start(args, PROGRAM)
    complete_run(args, device)
    complete_protocol(args)
    check_mixing(args)
    loader, val_loader = build_data(args)
    build = partial(build_finetuning, args, device, weights, models=CLASSIFIERS)
    train_classifier(
        args,
        device,
        content,
        loader,
        val_loader,
        build,
        program=PROGRAM,
        predict=mean_over_views,
    )


def test(args: argparse.Namespace, device: torch.device, *, tell: bool = True) -> Evaluation:
    """Test a checkpoint on all views, and say which these were; `tell` also of the videos."""
    load = partial(load_test, tell=tell)
    evaluation = evaluate_checkpoint(args, device, load, mean_over_views)
    stride = f", stride {args.stride}" if args.sampling == "dense" else ""
    size = "x".join(map(str, args.input_size))
    print_once(
        f"tested on {args.test_clips} clips x {args.test_crops} crops of {args.num_frames} frames "
        f"({args.sampling} sampling{stride}) at {size}"
    )
    return evaluation


def test_of_run(
    args: argparse.Namespace, device: torch.device, which: str, name: str, **changed: object
) -> Evaluation:
    """Test one of a finished run's checkpoints.

    Args:
        args: of the run.
        device: where to run.
        which: epoch the weights are of, for people.
        name: of the checkpoint.
        **changed: arguments that differ.
    """
    print_once(f"Test of the {which} epoch's weights, {name}:")
    start = dict(eval=True, resume=str(args.output_dir / name), finetune=None, model=None)
    return test(argparse.Namespace(**{**vars(args), **start, **changed}), device, tell=False)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
