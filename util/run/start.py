"""Checkpoint that a run resumes or starts from."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict

from util.data.classes import check_classes
from util.data.datasets import LabeledImages
from util.errors import UsageError
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
    content = _find_resumed(args, program)
    weights = _weights(args, content)
    if weights:
        fill_geometry_flags(args, weights.architecture, str(weights.path), [*weights.guessed])
    else:
        fill_geometry_flags(args, None)
    return content, weights


def find_pretraining_start(
    args: argparse.Namespace, program: str, models: Iterable[str], model: str
) -> tuple[dict | None, Weights | None]:
    """As `find_start` for a pretraining, whose decoder comes from the checkpoint as well.

    Args:
        args: as `settle_model` leaves them: without `--finetune` they are complete.
        program: what kind of run this is.
        models: the names of `--model`.
        model: the one by default.
    """
    content = _find_resumed(args, program)
    if args.finetune is None:
        return content, None
    weights = _weights(args, content)
    architecture = weights.architecture
    fill_geometry_flags(args, architecture, str(weights.path), [*weights.guessed])
    if weights.kind == "autoencoder" and architecture.ndim == (3 if "num_frames" in args else 2):
        for name, value in asdict(weights.decoder).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if architecture.class_token and "class_token" in args:
        args.class_token = True
    if args.model is None:  # the encoder's and the decoder's sizes are flags by now
        of_size = [name for name in models if f"_{architecture.size_name}_" in name]
        there = weights.args.get("model")
        args.model = there if there in models else next(iter(of_size), model)
    return content, weights


def _find_resumed(args: argparse.Namespace, program: str) -> dict | None:
    """The checkpoint to resume, if any."""
    if args.output_dir.is_dir():
        hold_output(args.output_dir)
    content = find_resumable(args.resume, args.output_dir)
    if content:
        check_program(content, program)
    return content


def _weights(args: argparse.Namespace, content: dict | None) -> Weights | None:
    """The weights in the checkpoint to resume, else those of `--finetune`, if any."""
    if content:
        last = args.output_dir / LAST
        return weights_of(content, last if last.exists() else args.resume)
    if not args.finetune:
        return None
    weights = read_weights(args.finetune)
    if weights.encoder:
        raise UsageError(
            f"--finetune {args.finetune} is {KINDS[weights.kind]}: give the checkpoint of a "
            f"pretraining, or of a classifier"
        )
    return weights


def check_resumed(content: dict | None, args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse to go on from another run, or with other classes.

    Raises:
        UsageError: saying what differs.
    """
    if content:
        check_state(content, args, len(dataset))
        if "classes" in content:  # not in files of the original code
            check_classes(content["classes"], dataset.classes, "the run to resume", dataset.root)
