"""Checkpoints of a run to go on from: of the same run, and whole."""

from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from SEG.data import class_names
from SEG.masks import ignored_numbers
from SEG.options import show_ignore, trained_classes
from util.data.classes import check_classes
from util.errors import UsageError
from util.run.states import compare_moments, compare_state

# What mmengine reads of a checkpoint as it goes on from it, and of which kind that must be.
_ENTRIES = {"state_dict": Mapping, "optimizer": Mapping, "message_hub": Mapping, "meta": Mapping}


def check_resumable(path: Path, content: Mapping, config: Config) -> None:
    """Refuse to go on from what is no checkpoint of this run.

    Args:
        path: of the checkpoint, for messages.
        content: what it holds.
        config: of the run.

    Raises:
        UsageError: a checkpoint that lacks something, or of a run with other classes or another
            accumulation.
    """
    for name, kind in _ENTRIES.items():
        if not isinstance(content.get(name), kind):
            what = "damaged" if name in content else "missing"
            raise UsageError(
                f"{path} cannot be gone on from, its {name} is {what}: give another --work-dir, "
                f"and the checkpoint as --pretrained to begin with its weights"
            )
    meta = content["meta"]
    if not all(type(meta.get(name)) is int and meta[name] >= 0 for name in ("iter", "epoch")):
        raise UsageError(f"{path} cannot be gone on from: it does not say how far the run was")
    before, now = meta.get("accum_iter", 1), config.optim_wrapper.get("accumulative_counts", 1)
    if before != now:
        raise UsageError(
            f"{path} is of a run with --accum-iter {before}, which counts its iterations, not "
            f"{now}: give the same, or another --work-dir and the checkpoint as --pretrained"
        )
    _check_classes(path, meta, config.train_dataloader.dataset)


def _check_classes(path: Path, meta: Mapping, dataset: Mapping) -> None:
    """Refuse to go on with other classes, or with masks that mean something else."""
    trained = trained_classes(meta)
    if trained is None or dataset.get("classes") is None:
        return
    names, ignored = trained
    check_classes(names, class_names(dataset["classes"]), str(path), "--classes")
    if ignored is not None and ignored != ignored_numbers(dataset):
        raise UsageError(f"{path} is of a run {show_ignore(ignored)}: its masks are read so")


@HOOKS.register_module()
class ResumeHook(Hook):
    """Compares the state to go on from with model and optimizer before they take it over.

    mmengine would load what fits and leave the rest as it is.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by the runner with the contents of the file.

        Raises:
            UsageError: a state of another form, saying where it differs.
        """
        if not runner._resume:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        saved = checkpoint["optimizer"]
        try:
            compare_state("model", checkpoint["state_dict"], model.state_dict())
            if not isinstance(saved.get("state"), Mapping):
                raise ValueError("its optimizer lacks the state")
            compare_moments(
                "optimizer", saved["state"], runner.optim_wrapper.optimizer, started=True
            )
        except ValueError as error:
            raise UsageError(
                f"{runner._load_from} cannot be gone on from with this config: {error}"
            ) from error
