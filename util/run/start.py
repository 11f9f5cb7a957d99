"""Checkpoint that a run resumes or starts from."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict

from util.data.classes import check_classes
from util.data.datasets import LabeledImages
from util.errors import UsageError
from util.run.array_args import complete_arrays, follow_checkpoint, is_arrays
from util.run.distributed import print_once
from util.run.geometry_args import fill_geometry_flags
from util.run.normalization import complete_stats
from util.run.parser import RecipeValue
from util.run.resume import LAST, find_resumable
from util.run.same_run import check_program, check_state
from util.run.setup import hold_output
from util.run.val_share import follow_share
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
    _complete(args, content, weights)
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
    _complete(args, content, weights)
    if weights.kind == "autoencoder" and architecture.ndim == (3 if "num_frames" in args else 2):
        for name, value in asdict(weights.decoder).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if architecture.class_token and getattr(args, "class_token", False) is None:
        args.class_token = True
    if not content and weights.kind == "autoencoder":
        _tell_other_targets(args, weights)
    if args.model is None:  # the encoder's and the decoder's sizes are flags by now
        of_size = [name for name in models if f"_{architecture.size_name}_" in name]
        there = weights.args.get("model")
        args.model = there if there in models else next(iter(of_size), model)
    return content, weights


def _tell_other_targets(args: argparse.Namespace, weights: Weights) -> None:
    """Say so where a decoder that is taken along was trained for something else."""
    for name in ("norm_pix_loss", "masking", "complementary"):
        there, here = weights.args.get(name) or None, getattr(args, name, None) or None
        if there != here:
            print_once(
                f"note: {weights.path} was pretrained with {name} {there or 'off'}, this run has "
                f"{name} {here or 'off'}"
            )


def _find_resumed(args: argparse.Namespace, program: str) -> dict | None:
    """The checkpoint to resume, if any."""
    if args.output_dir.is_dir():
        hold_output(args.output_dir)
    content = find_resumable(args.resume, args.output_dir)
    if content:
        check_program(content, program)
        saved = content.get("args") or {}
        warmup = saved.get("warmup_epochs")
        if isinstance(args.warmup_epochs, RecipeValue) and isinstance(warmup, int | float):
            args.warmup_epochs = float(warmup)  # not given: the run's own
        follow_share(args, saved)
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


def _complete(args: argparse.Namespace, content: dict | None, weights: Weights | None) -> None:
    """Fill in the flags of the geometry, of arrays and of normalisation."""
    free = [*weights.guessed] if weights else []
    if "arrays" in args:
        follow_checkpoint(args, weights.args if weights else {})
        free += ["in_chans"] if is_arrays(args) and not content else []
    if weights:
        fill_geometry_flags(args, weights.architecture, str(weights.path), free)
    else:
        fill_geometry_flags(args, None)
    if "arrays" in args:
        complete_arrays(args, weights)
        there = weights.architecture.in_chans if weights else args.in_chans
        if args.in_chans not in (1, there) and there not in (1, 3):
            raise UsageError(
                f"{weights.path} is a model of {there} channels, and this run has {args.in_chans}: "
                f"only a model of one or three starts one of others"
            )
    else:
        complete_stats(args, weights)


def check_resumed(content: dict | None, args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse to go on from another run, or with other classes.

    Raises:
        UsageError: saying what differs.
    """
    if content:
        check_state(content, args, len(dataset))
        if "classes" in content:  # not in files of the original code
            check_classes(content["classes"], dataset.classes, "the run to resume", dataset.root)
