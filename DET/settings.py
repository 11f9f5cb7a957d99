"""The values of a configuration: of which kind each must be."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from util.errors import UsageError

DEFAULT_PATCH_SIZE = (4, 2, 2)
CHANNELS = {"L": 1, "RGB": 3}  # of the formats that images are read in


def _number(low: float, above: bool = False, optional: bool = False) -> Callable[[object], bool]:
    """True for a finite number of at least, or above, `low`."""

    def fits(value: object) -> bool:
        if value is None:
            return optional
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) and (value > low if above else value >= low)

    return fits


def _whole(low: int, high: float = math.inf) -> Callable[[object], bool]:
    """True for a whole number of that range."""
    return lambda value: type(value) is int and low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_optional_text(value: object) -> bool:
    return value is None or _is_text(value)


# What must be there, whether a value fits, and how a person is told what would.
RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "data.train.json": (lambda v: _is_text(v) and bool(v), "a file"),
    "data.train.images": (lambda v: _is_text(v) and bool(v), "a folder"),
    "data.val.json": (_is_optional_text, "a file, or null for no evaluation"),
    "data.val.images": (_is_optional_text, "a folder"),
    "data.image_size": (_whole(1), "the side of a square in pixels, a whole number"),
    "dataloader.train.total_batch_size": (_whole(1), "a whole number from 1 on"),
    "dataloader.train.num_workers": (_whole(0), "a whole number from 0 on"),
    "dataloader.test.num_workers": (_whole(0), "a whole number from 0 on"),
    "optimizer.lr": (_number(0, above=True), "a number above 0"),
    "train.output_dir": (lambda v: _is_text(v) and bool(v), "a folder"),
    "train.init_checkpoint": (_is_optional_text, "a file, or '' for none"),
    "train.epochs": (_number(0, above=True), "a number above 0"),
    "train.warmup_epochs": (_number(0), "a number from 0 on"),
    "train.base_batch_size": (_whole(1), "a whole number from 1 on"),
    "train.scale_lr": (lambda v: isinstance(v, bool), "true or false"),
    "train.accum_iter": (_whole(1), "a whole number from 1 on"),
    "train.amp": (lambda v: v in ("auto", "bf16", "fp16", "none"), "auto, bf16, fp16 or none"),
    "train.clip_grad": (_number(0, above=True, optional=True), "a number above 0, or null"),
    "train.seed": (_whole(0, 2**31 - 1), "a whole number from 0 to 2147483647"),
    "train.log_period": (_whole(1), "a whole number of iterations from 1 on"),
    "train.checkpoint_epochs": (_number(0, above=True), "a number above 0"),
    "train.checkpoints_kept": (_whole(1), "a whole number from 1 on"),
    "train.eval_epochs": (_number(0, above=True), "a number above 0"),
    "model.input_format": (lambda v: v in CHANNELS, " or ".join(CHANNELS)),
    "dataloader.train.mapper.image_format": (lambda v: v in CHANNELS, " or ".join(CHANNELS)),
}


def check_settings(cfg: Mapping, path: Path) -> None:
    """Check the values that this project's programs use.

    Args:
        cfg: a configuration, its references resolved.
        path: its file, for the error.

    Raises:
        UsageError: one that is not there, or not of its kind; the image size does not fit the
            model's strides, or its channels the images'.
    """
    for part in ("model", "lr_multiplier"):
        _value(cfg, part, path)
    for key, (fits, right) in RULES.items():
        value = _value(cfg, key, path)
        if not fits(value):
            raise UsageError(f"{key}={value} must be {right}")
    if cfg["data"]["val"]["json"] and not cfg["data"]["val"]["images"]:
        raise UsageError("data.val.images must be the folder of the images of data.val.json")
    backbone = _value(cfg, "model.backbone", path)
    for encoder in backbone.values() if isinstance(backbone, Mapping) else ():
        if isinstance(encoder, Mapping) and "embed_dim" in encoder:
            _check_image_size(cfg["data"]["image_size"], encoder)
            _check_channels(cfg["model"], encoder)


def _value(cfg: Mapping, key: str, path: Path) -> object:
    node: object = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise UsageError(f"the configuration {path} lacks {key}; see those in DET/configs")
        node = node[part]
    return node


def _check_image_size(size: int, encoder: Mapping) -> None:
    patches = encoder.get("patch_size", DEFAULT_PATCH_SIZE)
    if not isinstance(patches, Sequence) or not all(type(p) is int and p > 0 for p in patches):
        return  # the model has a word on that
    stride = 2 * math.prod(patches)  # of the coarsest map but for pooling
    if size % stride:
        low = max(size // stride, 1) * stride
        raise UsageError(
            f"data.image_size={size} must be a multiple of {stride}: {low} or {low + stride}"
        )


def _check_channels(model: Mapping, encoder: Mapping) -> None:
    channels = CHANNELS[model["input_format"]]
    found = {
        "the backbone's in_chans": encoder.get("in_chans", 3),
        "the numbers of model.pixel_mean": _length(model.get("pixel_mean")),
        "the numbers of model.pixel_std": _length(model.get("pixel_std")),
    }
    for what, number in found.items():
        if number != channels:
            raise UsageError(
                f"model.input_format={model['input_format']} has {channels} channels, {what} are "
                f"{number}"
            )


def _length(value: object) -> object:
    return len(value) if isinstance(value, Sequence) else value
