"""Command lines: the flags of a model's geometry, and the checkpoint that decides them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from util.errors import UsageError
from util.layers.architecture import BLOCK_FLAGS, Architecture
from util.run.parser import add_switch, odd_int, positive_float, positive_int, show_value

# Position tables are resized to these, whatever a checkpoint was trained with.
_RESIZABLE = ("input_size", "num_frames")


def add_encoder_args(group: argparse._ArgumentGroup) -> None:
    """The flags of the encoder's blocks; not given they are the checkpoint's or `--model`'s."""

    def add(name: str, kind: Callable, metavar: str, help: str, nargs: int | None = None) -> None:
        help += " (default: the checkpoint's, else --model's)"
        group.add_argument(f"--{name}", type=kind, nargs=nargs, metavar=metavar, help=help)

    add("embed_dim", positive_int, "WIDTH", "widths of the three stages", 3)
    add("depth", positive_int, "BLOCKS", "blocks of the three stages", 3)
    add("num_heads", positive_int, "N", "attention heads of stage 3")
    add("mlp_ratio", positive_float, "X", "MLPs' hidden width over the stage's, a stage each", 3)
    add("kernel_size", odd_int, "PIXELS", "extent in space of the convolutions of stages 1 and 2")


def add_decoder_args(group: argparse._ArgumentGroup) -> None:
    """The flags of an autoencoder's decoder; not given they are `--model`'s."""
    for name, metavar, help in (
        ("decoder_embed_dim", "WIDTH", "width of the decoder"),
        ("decoder_depth", "BLOCKS", "blocks of the decoder"),
        ("decoder_num_heads", "N", "attention heads of the decoder"),
    ):
        help += " (default: the checkpoint's, else --model's)"
        group.add_argument(f"--{name}", type=positive_int, metavar=metavar, help=help)
    add_switch(
        group,
        "multi_scale",
        None,
        "fuse stages 1 and 2 into what the decoder sees (default: as --model does)",
        "decode stage 3 alone",
    )


def fill_geometry_flags(
    args: argparse.Namespace,
    found: Architecture | None,
    source: str = "",
    guessed: Sequence[str] = (),
) -> None:
    """Fill in the flags of a model's geometry; those of a video's clips if there are such.

    Args:
        args: those that were given stay.
        found: read off the checkpoint to start from; None for random weights.
        source: the file it was read off, for messages.
        guessed: flags of which the file says nothing, see `Weights.guessed`: those given count.

    Raises:
        UsageError: flags that describe another model than the checkpoint's, or no model.
    """
    if found is None and args.model is None:
        raise UsageError(
            "what to start from? --finetune FILE for a checkpoint, or --model NAME for "
            "random weights"
        )
    if found and found.ndim == 3 and "num_frames" not in args:
        main = "main_pretrain" if "mask_ratio" in args else "main_finetune"
        raise UsageError(f"{source} holds a video model: use python -m VideoConvMAE.{main}")
    blocks = {name: getattr(args, name, None) for name in BLOCK_FLAGS}
    named = Architecture.named(args.model).with_blocks(blocks) if args.model else None
    there = found.flags() if found else {}
    if found and blocks["mlp_ratio"]:
        written = replace(found, mlp_ratio=tuple(blocks["mlp_ratio"]))
        if written.hidden_dim == found.hidden_dim:  # the same in other words
            there["mlp_ratio"] = blocks["mlp_ratio"]
    known = found or named
    if known.ndim == 2 and "num_frames" in args:
        known = known.with_time()
    for name, value in known.flags().items():
        if name not in args:
            continue
        given = getattr(args, name)
        fixed = name in there and name not in (*_RESIZABLE, *guessed)
        if fixed and given not in (None, there[name]):
            raise UsageError(
                f"--{name} {show_value(given)} is not what {source} holds: "
                f"{show_value(there[name])}; leave the flag away to take it from there"
            )
        setattr(args, name, value if given is None else given)
    if found and named and not named.has_blocks(found):
        raise UsageError(f"--model {args.model} is not what {source} holds: {found}")
    _checked(known.with_blocks({name: getattr(args, name, None) for name in BLOCK_FLAGS}))


def _checked(architecture: Architecture) -> Architecture:
    """Itself, if its blocks can be made.

    Raises:
        UsageError: saying why they cannot.
    """
    try:
        architecture.check_blocks()
    except ValueError as error:
        raise UsageError(f"--embed_dim, --num_heads, --mlp_ratio: {error}") from error
    return architecture


def described_architecture(args: argparse.Namespace, start: Architecture) -> Architecture:
    """The architecture `start` with what the flags give.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    try:
        return _checked(start.with_blocks(vars(args))).with_flags(vars(args))
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error
