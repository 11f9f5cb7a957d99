"""Training and validation images of a classifier, from the flags of a run."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from util.data.array_views import centre_transform
from util.data.classes import check_classes
from util.data.datasets import LabeledImages
from util.data.folders import find_train_folder
from util.data.loader import Loader
from util.data.shards import is_shards
from util.data.transforms import center_crop_transform, center_share
from util.errors import UsageError
from util.run.array_args import (
    array_format,
    complete_arrays,
    first_of,
    follow_checkpoint,
    tell_kind,
)
from util.run.normalization import given_stats
from util.run.setup import eval_loader, train_loader
from util.run.val_share import check_share, choose_share, means_share
from util.weights.read import Weights


def build_data(
    args: argparse.Namespace, transform: Callable[[BinaryIO], Tensor]
) -> tuple[Loader, Loader]:
    """Training and validation images of ImageNet's layout, checked to have the same classes.

    Args:
        args: completed arguments.
        transform: of the training images.

    Raises:
        UsageError: folders that are missing, or whose classes differ.
    """
    if args.data_path is None:
        raise UsageError("--data_path is missing: a folder with train/ and val/, a folder a class")
    if args.val_share is not None:
        train, val = split_images(args, transform)
        return train_loader(args, train), eval_loader(args, val, args.batch_size)
    train = args.data_path if is_shards(args.data_path) else args.data_path / "train"
    val_path = args.val_path or args.data_path / "val"
    for path in (train, val_path):
        if not path.is_dir() and not is_shards(path):
            raise UsageError(
                f"--data_path {args.data_path} has no {path.name}/: it takes train/ and val/, with "
                f"the images of each class in a folder of its own (or shards, see --val_path; or "
                f"--val_share, a share of train/)"
            )
    tell_kind(args, train)
    dataset = LabeledImages(train, transform, arrays=bool(args.arrays))
    dataset.check_complete()
    val = val_images(args)
    check_classes(dataset.classes, val.dataset.classes, dataset.root, val.dataset.root)
    return train_loader(args, dataset), val


def split_images(
    args: argparse.Namespace, transform: Callable[[BinaryIO], Tensor] | None = None
) -> tuple[LabeledImages, LabeledImages]:
    """The images to train on, and the share of each class that is held out to validate on.

    Args:
        args: completed arguments.
        transform: of the training images.

    Raises:
        UsageError: other images to validate on, no folder a class, or a share that is no image.
    """
    val = args.data_path / "val"
    check_share(args, val if val.exists() else None)
    root = find_train_folder(args.data_path)
    if not root.is_dir() or is_shards(root):
        raise UsageError(
            f"--val_share takes a folder with a folder a class, and {root} is none: of shards "
            f"write some for val/, or give --val_path"
        )
    tell_kind(args, root)
    dataset = LabeledImages(root, transform, arrays=bool(args.arrays))
    dataset.check_complete()
    paths = [dataset.path(index) for index in range(len(dataset))]
    chosen = choose_share(args, paths, dataset.labels.tolist(), root, dataset.what)
    held = dataset.part(chosen, _evaluation_view(args))
    held.left_out = ""  # the training images tell it
    return dataset.part(~chosen, transform), held


def val_images(args: argparse.Namespace, weights: Weights | None = None) -> Loader:
    """The images to evaluate on; their classes are what is there, whatever they should be.

    Args:
        args: completed; with `weights` but for the flags of arrays.
        weights: those to evaluate, whose run says how to read arrays.

    Raises:
        UsageError: no such images, or images without labels.
    """
    path = _val_path(args)
    if weights is not None:
        follow_checkpoint(args, weights.args)
        complete_arrays(args, weights)
        if args.in_chans != weights.architecture.in_chans:
            raise UsageError(
                f"{weights.path} is a model of {weights.architecture.in_chans} channels, and "
                f"--bands or --in_chans give {args.in_chans}"
            )
        whole = path == args.data_path  # there is no val/
        if means_share(args, weights, not whole, whole and (path / "train").is_dir()):
            return eval_loader(args, split_images(args)[1], args.batch_size)
        tell_kind(args, path)
    return eval_loader(args, evaluated_images(args, path), args.batch_size)


def evaluated_images(
    args: argparse.Namespace, path: Path, unlabeled: bool = False
) -> LabeledImages:
    """Images, or arrays, as they are seen in evaluation.

    Args:
        args: completed arguments.
        path: where they are.
        unlabeled: they may have no labels.

    Raises:
        UsageError: none there, none with labels, or arrays of other channels.
    """
    if args.arrays:
        first_of(args, path)  # before a model is trained
    return LabeledImages(path, _evaluation_view(args), unlabeled, bool(args.arrays))


def _evaluation_view(args: argparse.Namespace) -> Callable[[BinaryIO], Tensor]:
    size = tuple(args.input_size)
    if args.arrays:
        return centre_transform(array_format(args), size, center_share(size))
    return center_crop_transform(size, args.in_chans, args.max_pixels, given_stats(args))


def labeled_splits(args: argparse.Namespace, root: Path, flag: str) -> tuple[Loader, Loader]:
    """Images of `train/` and of `val/` as they are evaluated, to compare one with the other.

    Args:
        args: completed arguments.
        root: the folder that holds both.
        flag: the option that chose it, for messages.

    Raises:
        UsageError: folders that are missing, without labels, or whose classes differ.
    """
    for path in (root / "train", root / "val"):
        if not path.is_dir():
            raise UsageError(
                f"{flag} {root} has no {path.name}/: k-NN takes train/ and val/, in each a folder "
                f"a class or shards"
            )
    train, val = (evaluated_images(args, root / name) for name in ("train", "val"))
    check_classes(train.classes, val.classes, train.root, val.root)
    return tuple(eval_loader(args, dataset, args.batch_size) for dataset in (train, val))


def _val_path(args: argparse.Namespace) -> Path:
    """The images that `--eval` means."""
    if args.val_path is not None:
        return args.val_path
    if args.data_path is None:
        raise UsageError("--data_path is missing: a folder with val/, a folder a class in it")
    val = args.data_path / "val"
    return val if val.is_dir() else args.data_path


def check_nb_classes(args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse data of another number of classes than `--nb_classes`, if that is given.

    Raises:
        UsageError: with both numbers.
    """
    if args.nb_classes not in (None, len(dataset.classes)):
        raise UsageError(
            f"--nb_classes {args.nb_classes}: {dataset.root} has {len(dataset.classes)} classes; "
            f"leave the flag away to take those that are there"
        )
