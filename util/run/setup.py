"""Before a model is built: seeds, checks of the arguments, loaders."""

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from util.data.classes import some, unseen
from util.data.datasets import FileDataset
from util.data.loader import Loader
from util.data.samplers import EvalSampler, StepSampler
from util.data.shards import is_shards
from util.errors import UsageError
from util.run.args import check_tables, check_writable, derive_args
from util.run.compiler import settle_compile
from util.run.distributed import is_main_process, print_once, rank, world_size
from util.run.lock import hold
from util.run.optim_step import amp_dtype
from util.run.same_run import plain

_held: set[Path] = set()


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike in all processes; `seed` is below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def complete_run(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the arguments and check all that can be checked before anything is built.

    `args.given` becomes what they were before, for the run's record. The output folder is this
    run's until the process ends.

    Raises:
        UsageError: values that do not go together or that this machine cannot do; another run
            has the output folder.
    """
    given = plain(args)
    derive_args(args, device.type, world_size())
    settle_compile(args, given["compile"], device)
    amp_dtype(args.amp, device)
    check_outside_data(args)
    hold_output(args.output_dir)
    check_writable(args.log_dir, "--log_dir")
    check_tables(args)
    args.given = given | {"warmup_epochs": args.warmup_epochs}


def hold_output(folder: Path, flag: str = "--output_dir") -> None:
    """Make the output folder this run's until the process ends; before a checkpoint is read.

    Args:
        folder: made if it is not there.
        flag: the option that chose it, for messages.

    Raises:
        UsageError: it cannot be written, or another run has it.
    """
    if folder not in _held:
        check_writable(folder, flag)
        hold(folder, flag)
        _held.add(folder)


def check_outside_data(args: argparse.Namespace) -> None:
    """Refuse to write a run's pictures among the data, before any folder is made.

    Raises:
        UsageError: `--output_dir` lies in a folder that is read as a whole.
    """
    what = "videos" if "num_frames" in args else "images"
    output = args.output_dir.resolve()
    for root in (args.data_path, getattr(args, "val_path", None)):
        for folder in _folders_read(root, what) if root else ():
            if output.is_relative_to(folder.resolve()):
                raise UsageError(
                    f"--output_dir {args.output_dir} lies within the data, {folder}: its pictures "
                    f"would be taken for {what}; choose a folder outside"
                )


def _folders_read(root: Path, what: str) -> list[Path]:
    """The folders below a data path in which every file is looked at: none of shards or lists."""
    if not root.is_dir():
        return []
    splits = [root / name for name in ("train", "val", "validation", "test")]
    if not (root / "train").is_dir():
        has_list = what == "videos" and any(root.glob("train.*"))
        splits = [*splits[1:]] if has_list else [root]
    return [folder for folder in splits if folder.is_dir() and not is_shards(folder)]


def train_loader(args: argparse.Namespace, dataset: FileDataset) -> Loader:
    """A data set in the order in which steps take it."""
    sampler = StepSampler(
        len(dataset),
        args.batch_size,
        args.accum_iter,
        rank(),
        world_size(),
        args.seed,
        group_sizes=dataset.group_sizes,
    )
    return _loader(args, dataset, sampler)


def eval_loader(
    args: argparse.Namespace, dataset: FileDataset, batch_size: int, *, tell: bool = True
) -> Loader:
    """Every sample of a data set once, each in one process; tells which classes none is of.

    Args:
        args: completed arguments.
        dataset: to take the samples from.
        batch_size: of the loader.
        tell: False if what there is to tell of the data has been said already.
    """
    labels = getattr(dataset, "labels", ()) if tell else ()  # of unlabelled files there are none
    missing = unseen(labels, dataset.classes) if len(labels) else []
    if 0 < len(missing) < len(dataset.classes):
        print_once(
            f"note: {len(missing)} of {len(dataset.classes)} classes have none of the "
            f"{dataset.what} of {dataset.root} ({some(missing)}): nothing tells how they do",
            error=True,
        )
    if getattr(args, "dist_eval", True):  # a flag of the classifiers' mains
        sampler = EvalSampler(len(dataset), batch_size, rank(), world_size())
    else:
        sampler = EvalSampler(len(dataset) * is_main_process(), batch_size)
    return _loader(args, dataset, sampler)


def _loader(
    args: argparse.Namespace, dataset: FileDataset, sampler: StepSampler | EvalSampler
) -> Loader:
    """A loader as the flags say; tells which files of the data path are left out."""
    if dataset.left_out:
        print_once(f"{dataset.root}: {dataset.left_out}", error=True)
    return Loader(dataset, sampler, args.num_workers, args.pin_mem)
