"""Command lines: `--val_share`, a share of the training files to validate on."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from util.data.holdout import held_out
from util.errors import UsageError
from util.run.distributed import print_once
from util.weights.read import Weights


def follow_share(args: argparse.Namespace, saved: Mapping[str, object]) -> None:
    """Take the share of the run to resume, where the flag is not given."""
    if getattr(args, "val_share", 0) is None:
        args.val_share = _known_share(saved)


def check_share(args: argparse.Namespace, there: Path | None) -> None:
    """Refuse a share that is none, or beside other files to validate on.

    Args:
        args: with `val_share`.
        there: what `--data_path` has to validate on, if anything.

    Raises:
        UsageError: saying which.
    """
    if not 0 < args.val_share < 1:
        raise UsageError(f"--val_share {args.val_share:g} must lie above 0 and below 1")
    other = f"--val_path {args.val_path}" if args.val_path else there
    if other:
        raise UsageError(
            f"--val_share is for data without a validation set, and there is {other}: leave one "
            f"of them away"
        )


def means_share(args: argparse.Namespace, weights: Weights, has_val: bool, has_train: bool) -> bool:
    """True if `--eval` is about the files that the run held out; takes its share and seed.

    Args:
        args: of the command line.
        weights: to evaluate.
        has_val: `--data_path` has files to validate on.
        has_train: it has a training split. Other data are the run's if their path is; they are
            evaluated whole if it is not.

    Raises:
        UsageError: a share that is not the run's, which would judge it by what it learnt from.
    """
    known = _known_share(weights.args)
    if args.val_share not in (None, known):
        held = f"held out {known:g}" if known else "held out none"
        raise UsageError(
            f"--val_share {args.val_share:g}: the run of {weights.path} {held}; leave the flag away"
        )
    if not known or args.val_path is not None or has_val:
        return False
    before = str(weights.args.get("data_path"))
    if not has_train and os.path.abspath(before) != os.path.abspath(args.data_path):
        print_once(f"note: all of {args.data_path}; the run held out a share of {before}")
        return False
    seed = weights.args.get("seed")
    args.val_share, args.seed = known, seed if type(seed) is int else args.seed
    return True


def choose_share(
    args: argparse.Namespace, paths: Sequence[str], labels: Sequence[object], root: Path, what: str
) -> np.ndarray:
    """The files to validate on, `[n]`, bool; tells how many they are.

    Args:
        args: `val_share` and `seed`.
        paths: of the files.
        labels: their classes.
        root: of the data.
        what: what the files are, such as "images".

    Raises:
        UsageError: no class is large enough to give a file.
    """
    chosen = held_out(paths, labels, args.val_share, args.seed, root)
    classes = len(set(labels))
    giving = len({label for label, held in zip(labels, chosen, strict=True) if held})
    small = f"; classes too small to give one: {classes - giving}" if giving < classes else ""
    print_once(
        f"validation: {chosen.sum()} of {len(paths)} {what} of {root}, of {giving} of {classes} "
        f"classes (--val_share {args.val_share:g}, --seed {args.seed}){small}"
    )
    return chosen


def _known_share(saved: Mapping[str, object]) -> float | None:
    value = saved.get("val_share")
    return value if type(value) is float and 0 < value < 1 else None
