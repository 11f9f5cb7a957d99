"""Checkpoint that a classifier's run resumes or starts from."""

import argparse

from util.data.classes import check_classes
from util.data.datasets import LabeledImages
from util.errors import UsageError
from util.run.array_args import complete_arrays, follow_checkpoint, is_arrays
from util.run.geometry_args import fill_geometry_flags
from util.run.resume import LAST, find_resumable
from util.run.same_run import check_program, check_state
from util.run.setup import hold_output
from util.weights.read import KINDS, Weights, read_weights, weights_of


def find_start(args: argparse.Namespace, program: str) -> tuple[dict | None, Weights | None]:
    """Find the checkpoint to resume or to start from, and complete the arguments from it.

    Args:
        args: `--resume`, `--finetune`, and the arguments of the model.
        program: what kind of run this is.

    Returns:
        The contents of the checkpoint to resume, if any, and the weights in it or those of
        `--finetune`, if any.

    Raises:
        UsageError: a file that is no such thing, or flags that contradict it.
    """
    if args.output_dir.is_dir():
        hold_output(args.output_dir)
    content, weights = find_resumable(args.resume, args.output_dir), None
    if content:
        check_program(content, program)
        last = args.output_dir / LAST
        weights = weights_of(content, last if last.exists() else args.resume)
    elif args.finetune:
        weights = read_weights(args.finetune)
        if weights.encoder:
            raise UsageError(
                f"--finetune {args.finetune} is {KINDS[weights.kind]}: give the checkpoint of a "
                f"pretraining, or of a classifier"
            )
    adaptable = ()
    if "arrays" in args:
        follow_checkpoint(args, weights.args if weights else {})
        adaptable = ("in_chans",) if is_arrays(args) and not content else ()
    found, source = weights and weights.architecture, weights and str(weights.path)
    fill_geometry_flags(args, found, source, adaptable)
    if "arrays" in args:
        complete_arrays(args)
    return content, weights


def check_resumed(content: dict | None, args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse to go on from another run, or with other classes.

    Raises:
        UsageError: saying what differs.
    """
    if content:
        check_state(content, args, len(dataset))
        if "classes" in content:  # not in files of the original code
            check_classes(content["classes"], dataset.classes, "the run to resume", dataset.root)
