"""The state of a run: what its checkpoints hold, and how it goes on from them."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from util.errors import UsageError, printable
from util.run.distributed import gather_objects, is_main_process, print_once, rank
from util.run.original import as_content, is_original, match_optimizer
from util.run.states import check_content, compare_moments, compare_state
from util.weights.checkpoint import load_file, save_atomically

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


class Stateful(Protocol):
    """A part of a run that a checkpoint holds: model, optimizer, scaler, meters."""

    def state_dict(self) -> dict:
        """The state to save."""

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
    """Go on from what `random_state` returned.

    Raises:
        UsageError: something else; no generator is changed.
    """
    try:
        name, keys, *rest = state["numpy"]
        of_numpy = (name, keys.to(torch.int64).numpy().astype(np.uint32), *rest)
        version, internal, gauss = state["python"]
        of_python = (version, tuple(internal), None if gauss is None else float(gauss))
        # Tried on generators of their own, which know best what fits.
        torch.Generator().set_state(state["torch"])
        np.random.RandomState().set_state(of_numpy)
        random.Random().setstate(of_python)
        on_gpu = isinstance(state["cuda"], Tensor) and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_rng_state(state["cuda"])
    except Exception as error:  # nearly anything, as the values may be anything
        raise UsageError(
            f"the checkpoint's random_state is not one that this program saves "
            f"({printable(error) or type(error).__name__})"
        ) from error
    torch.set_rng_state(state["torch"])
    np.random.set_state(of_numpy)
    random.setstate(of_python)


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

    def remove(self, name: str) -> None:
        """Remove a checkpoint if it is there."""
        if is_main_process():
            (self.folder / name).unlink(missing_ok=True)

    def restore(self, content: Mapping) -> tuple[int, int]:
        """Set every part to a checkpoint's state, and return its position `(epoch, step)`.

        Every part is compared with what is there before one is changed.

        Args:
            content: of a checkpoint that this run's folder holds.

        Raises:
            UsageError: a state that does not fit, saying what does not.
        """
        try:
            states = {name: self._fitting(name, part, content) for name, part in self.parts.items()}
        except ValueError as error:
            raise UsageError(f"the checkpoint to resume from does not fit: {error}") from error
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        if generators := content["random_state"]:
            # With another number of processes the states of the old ones do not fit: go on from
            # the first one's, from which the noise of a whole batch is drawn.
            set_random_state(generators[rank() if len(generators) > rank() else 0])
        return content["epoch"], content["step"]

    def _fitting(self, name: str, part: Stateful, content: Mapping) -> Mapping:
        """The state of a part in a checkpoint's contents, compared with the part's own."""
        saved, own = content.get(name), part.state_dict()
        if isinstance(part, torch.optim.Optimizer):
            if content.get("original"):
                model = self.parts["model"]
                saved = {"state": match_optimizer(saved, [*content["model"]], model, part)}
            else:
                compare_state(name, saved, own, skip=("state", "param_groups"))
                numbers = [group["params"] for group in saved["param_groups"]]
                if numbers != [group["params"] for group in own["param_groups"]]:
                    raise ValueError(f"its {name} has other groups of parameters")
            started = (content["epoch"], content["step"]) != (0, 0)
            compare_moments(name, saved["state"], part, started)
            # The settings of the groups follow from the arguments.
            return {"state": saved["state"], "param_groups": own["param_groups"]}
        if saved is None and content.get("original"):
            return content["model"] if isinstance(part, torch.nn.Module) else own
        compare_state(name, saved, own)
        return saved


def find_resumable(resume: str, folder: str | Path) -> dict | None:
    """The checkpoint that `--resume` asks for, checked to hold a training state.

    Args:
        resume: "auto" (the folder's last checkpoint, if there is one), "none", or a path, see
            `last_counts`.
        folder: `--output_dir`.

    Returns:
        The file's contents, those of the original code as `as_content` gives them; or None to
        start from the beginning.

    Raises:
        UsageError: a file that is missing, unreadable, or only weights; "none" in a folder that
            already has a checkpoint.
    """
    path = resumable_path(resume, folder)
    if path is None:
        return None
    content = load_file(path)
    if is_original(content):
        content = as_content(content, path)
    check_content(content, f"--resume {path}")
    return content


def resumable_path(resume: str, folder: str | Path) -> str | None:
    """The file that `find_resumable` reads, None to start from the beginning.

    Raises:
        UsageError: "none" in a folder that already has a checkpoint.
    """
    last = Path(folder) / LAST
    if resume == "none":
        if last.exists():
            raise UsageError(
                f"--resume none would overwrite the run in {folder}: choose another --output_dir "
                f"or move {last} away"
            )
        return None
    if last_counts(resume, folder, last.exists()):
        return str(last)
    return None if resume == "auto" else resume


def last_counts(resume: str, folder: str | Path, there: bool) -> bool:
    """True if a run goes on from its folder's last checkpoint, False if as `--resume` says.

    A file of another folder counts only until the run has a checkpoint of its own, so that the
    same command can be repeated.

    Args:
        resume: "auto" or a file.
        folder: of the run.
        there: whether it has a checkpoint.
    """
    if resume == "auto" or not there:
        return there
    elsewhere = Path(resume).absolute().parent != Path(folder).absolute()
    if elsewhere:
        print_once(f"going on in {folder}, not from --resume {resume}, which the run began with")
    return elsewhere
