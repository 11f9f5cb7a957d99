"""Hooks of mmengine's loops: atomic checkpoints of plain values, pictures of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook, ParamSchedulerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import Tensor, nn

from util.atomic import write_atomically
from util.data.images import load_image
from util.errors import TrainingError
from util.run.normalization import saved_stats
from util.run.optim_step import MAX_SKIPPED_IN_A_ROW


@register_backend("atomic")
class AtomicBackend(LocalBackend):
    """Writes files that are whole or not there: a kill leaves the older checkpoint."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        """Write bytes to a file."""
        write_atomically(Path(filepath), lambda file: file.write(obj))


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Keeps to tensors and plain values in checkpoints, which can be read without running code.

    The history of the logged numbers, which only smooths them, is left out.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by the runner with what it is about to write."""
        hub = checkpoint["message_hub"]
        info = hub["runtime_info"]
        kept = {key: value for key, value in hub["resumed_keys"].items() if key in info}
        checkpoint["message_hub"] = plain(
            {"log_scalars": {}, "runtime_info": info, "resumed_keys": kept}
        )
        accum_iter = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        args = _normalization(runner.model)
        checkpoint["meta"] = plain({**checkpoint["meta"], "accum_iter": accum_iter, "args": args})


def _normalization(model: nn.Module) -> dict[str, list[float] | None]:
    """Mean and deviation by which a segmentor normalises its images, as a run's arguments."""
    model = model.module if is_model_wrapper(model) else model
    preprocessor = getattr(model, "data_preprocessor", None)
    if getattr(preprocessor, "mean", None) is None:
        return {}
    parts = (preprocessor.mean, preprocessor.std)
    return saved_stats(tuple(tuple((p.double().flatten() / 255).tolist()) for p in parts))


@HOOKS.register_module()
class StepSchedulerHook(ParamSchedulerHook):
    """Steps the schedules of the learning rate once an optimizer step, not once a micro-batch."""

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Called by the runner after each micro-batch."""
        if (runner.iter + 1) % runner.optim_wrapper._accumulative_counts == 0:
            super().after_train_iter(runner, *args, **kwargs)


def plain(value: object) -> object:
    """Numpy's numbers and arrays in nested containers as Python's own."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run whose loss was not finite ten times in a row.

    Single such steps are skipped by the gradient scaler of mixed precision.
    """

    in_a_row: Tensor | float = 0.0

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> None:
        """Called by the runner with the losses of a step; waits for the device now and then."""
        bad = ~outputs["loss"].detach().isfinite()
        self.in_a_row = (self.in_a_row + bad) * bad
        if self.every_n_train_iters(runner, 10) and self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row: go on from the "
                f"last checkpoint (--resume) with --amp bf16 or none, or with --cfg-options "
                f"optim_wrapper.clip_grad.max_norm=1"
            )


@HOOKS.register_module()
class OverlayHook(Hook):
    """Writes a picture for each tested image: the image, the truth and the prediction.

    Args:
        folder: where to.
        root: what the pictures' names are relative to.
    """

    def __init__(self, folder: str, root: str) -> None:
        self.folder, self.root = Path(folder), Path(root)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Sequence[SegDataSample] = (),
    ) -> None:
        """Called by the runner with the predictions for a batch."""
        colours = runner.test_dataloader.dataset.metainfo["palette"]
        for sample in outputs:
            image = np.asarray(load_image(sample.img_path))
            maps = [sample.gt_sem_seg, sample.pred_sem_seg]
            panels = [overlay(image, m.data[0].cpu().numpy(), colours) for m in maps]
            path = self.folder / Path(sample.img_path).relative_to(self.root).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([image, *panels], axis=1)).save(path)


def overlay(image: np.ndarray, classes: np.ndarray, colours: Sequence[Sequence[int]]) -> np.ndarray:
    """An image with its classes over it, two parts of colour to one of image; none where ignored.

    Args:
        image: `[H, W, 3]`, uint8.
        classes: `[H, W]`, the class of each pixel.
        colours: `[r, g, b]` of each class.

    Returns:
        `[H, W, 3]`, uint8.
    """
    known = (classes < len(colours))[..., None]
    paint = np.asarray(colours, np.uint16)[np.minimum(classes, len(colours) - 1)]
    return np.where(known, (image.astype(np.uint16) + 2 * paint) // 3, image).astype(np.uint8)
