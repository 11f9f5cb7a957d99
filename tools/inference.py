"""Frozen models for the programs that run one on files: arguments, model, data set."""

import argparse
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from engine_evaluate import mean_over_views
from engine_features import Predict, encode, encode_views
from models_convvit import ConvViT, convvit_from_weights
from util.data.datasets import LabeledImages
from util.data.folders import find_train_folder
from util.data.loader import Loader
from util.data.samplers import EvalSampler
from util.errors import UsageError
from util.run import args as arguments
from util.run.array_args import (
    add_array_args,
    complete_arrays,
    follow_checkpoint,
    is_arrays,
    tell_kind,
)
from util.run.distributed import init_processes, print_once
from util.run.geometry_args import described_architecture, fill_geometry_flags
from util.run.labeled_data import evaluated_images
from util.run.optim_step import amp_dtype
from util.run.parser import Parser, positive_int
from util.weights.read import KINDS, Weights, read_weights
from VideoConvMAE.args import add_reading_args, add_view_args, complete_protocol

DATA = "folder of images, nested or flat; shards; a .txt with a path a line; or one image. For a "
DATA += "video model: a folder of videos, a list of them, or one video"
_OF_VIDEOS = ("video_root", "sampling", "stride", "short_side")
_VIEWS = ("test_clips", "test_crops")


def add_inference_args(parser: Parser, *, data: str = DATA, views: int | None = 1) -> None:
    """Add the arguments of a program that runs a frozen model on files.

    Args:
        parser: gets the arguments.
        data: text of `--data_path`.
        views: clips of a video and crops of a clip; None for those that `--eval` takes.
    """
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="of pretraining, fine-tuning or probing; the published ones too",
    )
    arguments.add_data_args(parser, data=data, follow_checkpoint=True, arrays=True)
    add_array_args(parser, training=False)
    clips = parser.add_argument_group("videos")
    add_reading_args(clips)
    add_view_args(clips, views)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=positive_int, default=64, metavar="N", help="images per process"
    )
    arguments.add_device_args(group)
    parser.set_defaults(model=None)  # the checkpoint's


@dataclass(frozen=True)
class Frozen:
    """A model to run, as its checkpoint and the flags say.

    Attributes:
        args: completed.
        weights: the checkpoint's.
        model: filled with them, on `device`.
        device: of this process.
        dtype: autocast type; None for full precision.
    """

    args: argparse.Namespace
    weights: Weights
    model: ConvViT
    device: torch.device
    dtype: torch.dtype | None

    @property
    def is_video(self) -> bool:
        """True for a model of clips."""
        return self.weights.architecture.ndim == 3

    @property
    def batch_size(self) -> int:
        """Samples of a batch: as many views at a time as `--batch_size`."""
        views = self.args.test_clips * self.args.test_crops if self.is_video else 1
        return max(1, self.args.batch_size // views)

    @property
    def logits(self) -> Predict:
        """From samples of `dataset` to logits."""
        return mean_over_views if self.is_video else torch.nn.Module.__call__

    def features(self, stage: int = 3, tokens: bool = False) -> Predict:
        """From samples of `dataset` to what `encode` gives."""
        return partial(encode_views if self.is_video else encode, stage=stage, tokens=tokens)

    def dataset(self, path: Path, labeled: bool = False) -> LabeledImages:
        """The files of a path as they are seen in evaluation; `labels` where there are any.

        Args:
            path: a folder, a list, shards or one file.
            labeled: files without labels are an error.

        Raises:
            UsageError: nothing there.
        """
        args = self.args
        if self.is_video:
            return _views(args, path, labeled)
        return evaluated_images(args, path, unlabeled=not labeled)

    def loader(self, dataset: LabeledImages, sampler: EvalSampler) -> Loader:
        """Samples of `dataset`, as the flags say; tells which files are left out."""
        if dataset.left_out:
            print_once(dataset.left_out, error=True)
        return Loader(dataset, sampler, self.args.num_workers, self.args.pin_mem)


def open_frozen(args: argparse.Namespace) -> Frozen:
    """The model of `--checkpoint`; completes the arguments.

    Raises:
        UsageError: a file that holds no encoder, or flags that do not fit it.
    """
    if args.data_path is None:
        raise UsageError("--data_path is missing: the files to look at")
    device = init_processes(args.device)
    dtype = amp_dtype(args.amp, device)
    weights = read_weights(args.checkpoint)
    if weights.encoder:
        raise UsageError(
            f"--checkpoint {weights.path} is {KINDS[weights.kind]}: give the checkpoint of a "
            f"pretraining, or of a classifier"
        )
    if weights.architecture.ndim == 3:
        args.num_frames = None  # the checkpoint's
    elif given := _given_for_videos(args):
        raise UsageError(f"--{given[0]} is for videos, and {weights.path} is an image model")
    if weights.architecture.ndim == 2:
        follow_checkpoint(args, weights.args)
    elif is_arrays(args):
        raise UsageError(f"flags of arrays are for images, and {weights.path} is a video model")
    fill_geometry_flags(args, weights.architecture, str(weights.path), [*weights.guessed])
    complete_arrays(args, weights)
    tell_kind(args, find_train_folder(args.data_path) if args.arrays else args.data_path)
    arguments.derive_loading(args, device.type)
    if weights.architecture.ndim == 3:
        complete_protocol(args, weights.args)
    size = described_architecture(args, weights.architecture).img_size
    model, report = convvit_from_weights(weights, img_size=size)
    print_once(report)
    return Frozen(args, weights, model.to(device), device, dtype)


def _given_for_videos(args: argparse.Namespace) -> list[str]:
    """The flags that mean nothing for images."""
    read = [name for name in _OF_VIDEOS if getattr(args, name) is not None]
    return read + [name for name in _VIEWS if getattr(args, name) not in (None, 1)]


def _views(args: argparse.Namespace, path: Path, labeled: bool) -> LabeledImages:
    if find_spec("av") is None:
        raise UsageError(
            "PyAV, which reads videos, is missing: pip install -r requirements-video.txt"
        )
    from VideoConvMAE.inference import views_of

    return views_of(args, path, labeled)
