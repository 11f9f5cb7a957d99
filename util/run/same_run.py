"""Checks that a checkpoint belongs to the run that resumes it."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from util.errors import UsageError
from util.layers.architecture import BLOCK_FLAGS
from util.layers.decoder import Decoder
from util.run.original import comparable_args
from util.run.parser import show_value
from util.weights.read import weights_of

# Flags that a resumed run may change; any other difference is another run. The batch is compared
# as a whole (see `effective_batch_size`), so that a run can go on with other GPUs.
MAY_CHANGE = frozenset(
    {"accum_iter", "amp", "batch_size", "clip_grad", "compile", "confusion", "data_path", "demo"}
    | {
        "device",
        "dist_eval",
        "grad_checkpointing",
        "inflate",
        "keep",
        "knn_freq",
        "knn_path",
        "log_dir",
    }
    | {"max_bad_images", "max_pixels", "memory_budget", "nb_classes", "num_workers", "output_dir"}
    | {
        "picture_freq",
        "pin_mem",
        "predictions",
        "print_freq",
        "resume",
        "rgb",
        "save_freq",
        "save_steps",
    }
    | {"teacher_checkpoint", "test_clips", "test_crops", "val_path", "video_root"}
)
# The flags of a model's size, which `--model` stands for.
GEOMETRY = (*BLOCK_FLAGS, *(field.name for field in fields(Decoder)))
# What `derive_args` takes from other flags.
_DERIVED = {
    "effective_batch_size": "batch_size x accum_iter x processes",
    "teacher_digest": "weights of the teacher",
    "mimic_dim": "width of the teacher",
}


def plain(args: argparse.Namespace) -> dict[str, object]:
    """The arguments as plain values, as checkpoints hold them; not once more those given."""

    def value(v: object) -> object:
        if isinstance(v, Path):
            return str(v)
        return [value(x) for x in v] if isinstance(v, list | tuple) else v

    return {name: value(v) for name, v in vars(args).items() if name != "given"}


def hyperparameters(args: argparse.Namespace) -> dict[str, object]:
    """The arguments that TensorBoard shows, lists as one types them."""
    values = {n: v for n, v in plain(args).items() if n not in ("log_dir", "output_dir", "resume")}
    return {n: show_value(v) if isinstance(v, list) else v for n, v in values.items()}


def check_same_run(args: argparse.Namespace, saved: dict[str, object]) -> None:
    """Refuse to resume a checkpoint of a run with another model or schedule.

    Args:
        args: this run's arguments, completed.
        saved: the checkpoint's.

    Raises:
        UsageError: naming every flag that differs, with both values.
    """
    now = plain(args)
    names = [n for n, v in now.items() if n not in MAY_CHANGE and saved.get(n) != v]
    if now.get("teacher_digest") and "teacher_digest" not in names:  # whatever its file is called
        names = [name for name in names if name != "teacher"]
    if "model" in names:  # what follows from it
        names = [name for name in names if name not in GEOMETRY]
    for name in ("lr", "min_lr"):
        if name in names and {name.replace("lr", "blr"), "effective_batch_size"} & set(names):
            names.remove(name)  # follows from them
    differing = [
        f"{_DERIVED.get(name, f'--{name}')} {show_value(saved.get(name))} there, "
        f"{show_value(now[name])} here"
        for name in names
    ]
    if differing:
        raise UsageError(
            f"the checkpoint to resume from belongs to another run ({'; '.join(differing)}): give "
            f"the same flags, or another --output_dir to start a new run (with the checkpoint as "
            f"--finetune from its weights: so 400 epochs go on to 800)"
        )


def changed_data(args: argparse.Namespace, saved: Mapping[str, object]) -> str:
    """The flags by which a run gets other data than it began with, with both values; or nothing."""
    now = plain(args)
    return "; ".join(
        f"--{name} {saved[name]} there, {now[name]} here"
        for name in ("data_path", "val_path", "video_root", "knn_path")
        if isinstance(saved.get(name), str)
        and isinstance(now.get(name), str)
        and os.path.abspath(saved[name]) != os.path.abspath(now[name])
    )


def check_program(content: Mapping, program: str) -> None:
    """Refuse to go on from the state of another kind of run.

    Args:
        content: the checkpoint to resume from.
        program: what kind of run this is, such as "pretraining".

    Raises:
        UsageError: saying what to do instead.
    """
    other = content.get("program", program)
    if other != program:
        raise UsageError(
            f"the checkpoint to resume from belongs to a {other} run, and this is {program}: give "
            f"another --output_dir, and the checkpoint as --finetune to start from its weights"
        )


def check_state(content: Mapping, args: argparse.Namespace, num_images: int) -> None:
    """Refuse to go on from the state of another run.

    Args:
        content: the checkpoint to resume from.
        args: this run's arguments, completed.
        num_images: images of the data set.

    Raises:
        UsageError: saying what differs.
    """
    saved = _with_blocks(content["args"], content)
    if content.get("original"):
        saved = comparable_args(saved, plain(args))
    check_same_run(args, saved)
    if content["step"] and content["num_images"] != num_images:
        raise UsageError(
            f"cannot go on at step {content['step']} of an epoch of {content['num_images']} "
            f"images: there are {num_images} now; give the same images, or resume from the end "
            f"of an epoch"
        )


def _with_blocks(saved: Mapping[str, object], content: Mapping) -> dict[str, object]:
    """A run's arguments; the flags of its blocks that they do not name are read off the shapes."""
    if saved.keys() >= {*BLOCK_FLAGS}:
        return dict(saved)
    weights = weights_of(content, "to resume from")
    flags = weights.architecture.flags()
    blocks = {name: flags[name] for name in BLOCK_FLAGS}
    decoder = asdict(weights.decoder) if weights.kind == "autoencoder" else {}
    return {**blocks, **decoder, **saved}
