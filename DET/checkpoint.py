"""Checkpoints of detectors: written whole, read safely, gone on from only by the same run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from omegaconf import DictConfig
from torch import nn

from models_convvit import ConvViT
from util.atomic import write_atomically
from util.data.transforms import Stats
from util.errors import UsageError
from util.run.normalization import agreed_stats, saved_stats
from util.run.resume import last_counts, random_state, set_random_state
from util.run.states import compare_moments, compare_state
from util.weights.checkpoint import load_file, save_atomically
from util.weights.load import Report, load_weights
from util.weights.read import KINDS, Weights, read_weights, weights_of

# What a checkpoint of pretraining or classification does not have.
NEW = ("*_rel_pos_bias", "blocks3.*.attn.rel_pos_[hw]")
# The parts of a detector that depend on the classes, or on whether there are masks.
TASK_LAYERS = ("roi_heads.box_predictor", "roi_heads.mask_head")


class RandomState:
    """The random number generators of this process, as a part of a checkpoint."""

    @staticmethod
    def state_dict() -> dict:
        """The state to save."""
        return random_state()

    @staticmethod
    def load_state_dict(state: Mapping) -> None:
        """Go on from what was saved."""
        set_random_state(state)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with files that a kill leaves whole and that cannot run code.

    Args:
        model: the detector.
        folder: where the files are.
        run: plain values that make the run what it is; one that differs is not gone on from.
        classes: their names, for whoever uses the model.
        **parts: further things to save and restore.

    Attributes:
        iteration: the last that is saved; None before.
    """

    def __init__(
        self, model: nn.Module, folder: str, run: Mapping, classes: list[str], **parts: object
    ) -> None:
        super().__init__(model, folder, **parts)
        self.run, self.classes = dict(run), classes
        self.iteration: int | None = None

    def save(self, name: str, **extra: object) -> None:
        """Write `name`.pth and make it the one to go on from.

        Raises:
            TrainingError: the file cannot be written; the one before stays.
        """
        if not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        state = {"model": self.model.state_dict(), **parts, **extra}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        args = {**self.run, **saved_stats(pixel_stats(self.model))}
        save_atomically({**state, "args": args, "classes": self.classes}, path)
        self.tag_last_checkpoint(path.name)
        self.iteration = extra.get("iteration")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which file is the last."""
        name = last_filename_basename.encode()
        path = Path(self.save_dir) / "last_checkpoint"
        write_atomically(path, lambda file: file.write(name))

    def resume(self, which: str = "auto") -> int:
        """Go on from a checkpoint.

        Args:
            which: "none", "auto" (the last of the folder, if there is one), or a file, see
                `last_counts`.

        Returns:
            The iterations that are done.

        Raises:
            UsageError: a checkpoint that cannot be read, or of another run.
        """
        path = self._resumable(which)
        if path is None:
            return 0
        content = load_file(path)
        there = content.get("args")
        if not isinstance(there, Mapping) or not isinstance(content.get("iteration"), int):
            raise UsageError(
                f"{path} is no checkpoint of a run of DET.train_net to go on from; to begin with "
                f"its weights give train.init_checkpoint={path} and another train.output_dir"
            )
        there = {"classes": content.get("classes"), **there}
        differing = [
            f"{name} {there.get(name)} there, {value} here"
            for name, value in {"classes": self.classes, **self.run}.items()
            if there.get(name) != value
        ]
        if differing:
            raise UsageError(
                f"{path} belongs to another run ({'; '.join(differing)}): give the same settings "
                f"to go on; a longer or another schedule is a new run, with another "
                f"train.output_dir and train.init_checkpoint={path}"
            )
        if (line := normalize_as(self.model, weights_of(content, path))).startswith("note"):
            raise UsageError(f"{path} belongs to another run: {line.removeprefix('note: ')}")
        try:
            compare_state("model", content.get("model"), self.model.state_dict())
        except ValueError as error:
            raise UsageError(
                f"{path} holds another model than the recipe describes: {error}"
            ) from error
        self.model.load_state_dict(content["model"])
        try:
            for name, part in self.checkpointables.items():
                if optimizer := getattr(part, "optimizer", None):  # torch's takes any shape
                    moments = content[name]["optimizer"]["state"]
                    compare_moments("optimizer", moments, optimizer, started=False)
                part.load_state_dict(content[name])
        except Exception as error:  # parts of another form raise nearly anything
            raise UsageError(
                f"{path} cannot be gone on from: its {name} state is damaged or of another recipe "
                f"({type(error).__name__}: {error})"
            ) from error
        self.logger.info("Going on from %s", path)
        return content["iteration"] + 1

    def _resumable(self, which: str) -> Path | None:
        """The file to go on from, see `resume`."""
        if which == "none":
            return None
        if last_counts(which, self.save_dir, self.has_checkpoint()):
            return self._last_checkpoint()
        return None if which == "auto" else Path(which)

    def _last_checkpoint(self) -> Path:
        """The file that the folder's `last_checkpoint` names."""
        note = Path(self.save_dir) / "last_checkpoint"
        try:
            path = note.parent / note.read_text(encoding="utf-8").strip()
            if path.is_file():
                return path
        except (OSError, ValueError):  # unreadable, or a name that no file can have
            path = None
        raise UsageError(
            f"{note} names no checkpoint of its folder{f': {path.name!r}' if path else ''}; write "
            f"the name of one into it, or begin anew without --resume"
        )


def pixel_stats(model: nn.Module) -> Stats:
    """Mean and deviation by which a detector normalises its images, as numbers from 0 to 1."""
    mean, std = (b.double().flatten() / 255 for b in (model.pixel_mean, model.pixel_std))
    return tuple(mean.tolist()), tuple(std.tolist())


def normalize_as(model: nn.Module, weights: Weights) -> str:
    """Let a detector normalise its images as the run did that it begins with.

    `model.pixel_mean` and `model.pixel_std` of the configuration stay if they are not ImageNet's.

    Returns:
        A line for people, see `agreed_stats`.
    """
    own = pixel_stats(model)
    stats, line = agreed_stats(own, weights)
    if stats is not own:
        for buffer, values in zip((model.pixel_mean, model.pixel_std), stats, strict=True):
            buffer.copy_(255 * buffer.new_tensor(values, dtype=torch.double).view_as(buffer))
    return line


def load_encoder(model: nn.Module, weights: Weights) -> Report:
    """Load the encoder of a checkpoint of any kind into a detector; all else begins anew.

    Raises:
        UsageError: weights that do not fit, with the reason.
    """
    encoder = next(module for module in model.modules() if isinstance(module, ConvViT))
    return load_weights(encoder, weights.without_heads(), new=NEW, prefix=weights.encoder)


def load_to_train(model: nn.Module, weights: Weights) -> Report:
    """Load what a run begins with: the encoder, or of a detector all but what depends on the task.

    Raises:
        UsageError: weights that do not fit, with the reason.
    """
    if weights.kind == "detector":
        return load_weights(model, weights, new=TASK_LAYERS)
    return load_encoder(model, weights)


def read_detector(path: str | Path) -> Weights:
    """Read the weights of a trained detector.

    Raises:
        UsageError: a file that cannot be read, or holds something else.
    """
    weights = read_weights(path)
    if weights.kind != "detector":
        raise UsageError(f"checkpoint {path} is {KINDS[weights.kind]}, no trained detector")
    return weights


def fit_heads(model: DictConfig, weights: Weights) -> None:
    """Give a configuration of Mask R-CNN the classes and the heads of a detector."""
    model.roi_heads.num_classes = weights.num_classes
    if not any(name.startswith("roi_heads.mask_head.") for name in weights.state):
        boxes_only(model)


def boxes_only(model: DictConfig) -> None:
    """Take the mask head out of a configuration of Mask R-CNN."""
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads[part] = None
