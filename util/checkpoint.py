"""Checkpoints: written so that a kill loses nothing, read so that a hostile file runs nothing."""

import argparse
import os
import pickle
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from util.distributed import gather_objects, is_main_process, print_once, rank
from util.errors import TrainingError, UsageError

LAST = "checkpoint.pth"


class Stateful(Protocol):
    """A part of a run that a checkpoint holds: model, optimizer, scaler, meters."""

    def state_dict(self) -> dict:
        """What to save."""

    def load_state_dict(self, state: dict) -> object:
        """Go on from what was saved."""


def save_atomically(state: dict, path: Path) -> None:
    """Write a file that is whole or not there: temporary name, flush to disk, rename.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; an older file of that
            name stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch turns a failed write into a RuntimeError once its archive is open.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the previous one is intact" if path.exists() else ""
        raise TrainingError(f"cannot write {path}: {reason}{kept}") from error


def load_file(path: str | Path) -> dict:
    """Read a checkpoint's contents to the CPU. Nothing in the file can run code.

    Raises:
        UsageError: no such file, not a checkpoint, truncated, or one with objects in it other
            than tensors, plain values and argparse.Namespace.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what they hint at ends in an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises how to get round the refusal.
        culprit = re.search(r"Unsupported \S+ \S+ \S+", str(error))
        raise UsageError(
            f"checkpoint {path} is refused: it is damaged, or holds objects other than tensors and "
            f"plain values, which could run code{f' ({culprit[0]})' if culprit else ''}"
        ) from error
    except Exception as error:  # Damaged bytes make the unpickler raise nearly anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"checkpoint {path} cannot be read, it is truncated or no PyTorch file ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary")
    return content


def random_state() -> dict[str, object]:
    """The random number generators of this process, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if isinstance(state["cuda"], Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class Checkpoints:
    """The checkpoints of a run.

    A position `(epoch, step)` counts the optimizer steps done in an epoch; after the last one it
    is `(epoch + 1, 0)`.

    Args:
        folder: `--output_dir`.
        args: the run's arguments as plain values.
        parts: what to save and restore, by name: model, optimizer, scaler, meters.
        extra: further plain values to save, such as class names.
    """

    def __init__(
        self,
        folder: str | Path,
        args: Mapping[str, object],
        parts: Mapping[str, Stateful],
        extra: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.args = dict(args)
        self.parts = parts
        self.extra = dict(extra or {})

    def save(self, epoch: int, step: int, *names: str) -> None:
        """Write the state at a position under each name; all processes call this together.

        Raises:
            TrainingError: the file cannot be written.
        """
        states = gather_objects(random_state())
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"epoch": epoch, "step": step, "random_state": states, "args": self.args}
        if is_main_process():
            for name in names:
                save_atomically(content | self.extra, self.folder / name)

    def restore(self, content: Mapping) -> tuple[int, int]:
        """Set every part to a checkpoint's state, and return its position `(epoch, step)`."""
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        states = content["random_state"]
        # With another number of processes the states of the old ones do not fit: go on from the
        # first one's, from which the noise of a whole batch is drawn.
        set_random_state(states[rank() if len(states) > rank() else 0])
        return content["epoch"], content["step"]


def find_resumable(resume: str, folder: str | Path) -> dict | None:
    """The checkpoint that `--resume` asks for, checked to hold a training state.

    Args:
        resume: "auto" (the folder's last checkpoint, if there is one), "none", or a path. A path
            outside the folder counts only until the folder has a checkpoint of its own, so that
            the same command can be repeated.
        folder: `--output_dir`.

    Returns:
        The file's contents, or None to start from the beginning.

    Raises:
        UsageError: a file that is missing, unreadable, or only weights; "none" in a folder that
            already has a checkpoint.
    """
    last = Path(folder) / LAST
    if resume == "none":
        if last.exists():
            raise UsageError(
                f"--resume none would overwrite the run in {folder}: choose another --output_dir "
                f"or move {last} away"
            )
        return None
    elsewhere = resume != "auto" and Path(resume).absolute().parent != last.absolute().parent
    if last.exists() and elsewhere:
        print_once(f"going on from {last}, not from --resume {resume}, which it began with")
    if last.exists() and (elsewhere or resume == "auto"):
        resume = str(last)
    elif resume == "auto":
        return None
    content = load_file(resume)
    parts = {"model", "optimizer", "scaler", "meters"}
    missing = (parts | {"epoch", "step", "random_state", "args"}) - content.keys()
    if missing:
        raise UsageError(
            f"--resume {resume}: it holds no training state of this program "
            f"(no {', '.join(sorted(missing))})"
        )
    return content
