"""The state of a run: what its checkpoints hold, and how it goes on from them."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from util.errors import UsageError
from util.run.distributed import gather_objects, is_main_process, print_once, rank
from util.weights.checkpoint import load_file, save_atomically

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


class Stateful(Protocol):
    """A part of a run that a checkpoint holds: model, optimizer, scaler, meters."""

    def state_dict(self) -> dict:
        """What to save."""

    def load_state_dict(self, state: dict) -> object:
        """Go on from what was saved."""


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
