"""Command lines: the flags of a model's geometry, and the checkpoint that decides them."""

import argparse
from collections.abc import Collection

from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.parser import show_value

# Position tables are resized to these, whatever a checkpoint was trained with.
_RESIZABLE = ("input_size", "num_frames")


def fill_geometry_flags(
    args: argparse.Namespace,
    found: Architecture | None,
    source: str = "",
    adaptable: Collection[str] = (),
) -> None:
    """Fill in the flags of a classifier's geometry; those of a video's clips if there are such.

    Args:
        args: those that were given stay.
        found: read off the checkpoint to start from; None for random weights.
        source: the file it was read off, for messages.
        adaptable: flags that may differ from the checkpoint, whose weights are adapted.

    Raises:
        UsageError: flags that describe another model than the checkpoint's, or no model.
    """
    if found is None and args.model is None:
        raise UsageError(
            "what to start from? --finetune FILE for a checkpoint, or --model NAME for "
            "random weights"
        )
    if found and found.ndim == 3 and "num_frames" not in args:
        raise UsageError(f"{source} holds a video model: use python -m VideoConvMAE.main_finetune")
    if found and args.model and Architecture.named(args.model).size_name != found.size_name:
        raise UsageError(f"--model {args.model} is not what {source} holds: {found}")
    there = found.flags() if found else {}
    known = found or Architecture.named(args.model)
    if known.ndim == 2 and "num_frames" in args:
        known = known.with_time()
    for name, value in known.flags().items():
        if name not in args:
            continue
        given = getattr(args, name)
        kept = name in there and name not in (*_RESIZABLE, *adaptable)
        if kept and given not in (None, there[name]):
            raise UsageError(
                f"--{name} {show_value(given)} is not what {source} holds: "
                f"{show_value(there[name])}; leave the flag away to take it from there"
            )
        setattr(args, name, value if given is None else given)


def described_architecture(args: argparse.Namespace, start: Architecture) -> Architecture:
    """The architecture `start` with what the flags give.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    try:
        return start.with_flags(vars(args))
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error
