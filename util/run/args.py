"""Command lines: the argument groups that the mains share, and their checks."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from util.errors import UsageError
from util.layers.architecture import describe_architecture, flags_of, size_name
from util.run.distributed import cores_per_process
from util.run.parser import (
    ChoiceOf,
    Parser,
    add_switch,
    mask_ratio,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    share,
)

# Flags that a resumed run may change; any other difference is another run. The batch is compared
# as a whole (see `effective_batch_size`), so that a run can go on with other GPUs.
MAY_CHANGE = frozenset(
    {"accum_iter", "amp", "batch_size", "clip_grad", "compile", "data_path", "demo", "device"}
    | {"dist_eval", "log_dir", "max_bad_images", "num_workers", "output_dir", "pin_mem"}
    | {"predictions", "print_freq", "resume", "save_freq", "save_steps", "val_path"}
)
# Of a model that no checkpoint describes.
DEFAULT_INPUT_SIZE, DEFAULT_IN_CHANS, DEFAULT_PATCH_SIZE = 224, 3, (4, 2, 2)
DEFAULT_CLIP = {"num_frames": 16, "tubelet": 2, "temporal_kernel": 3}
# What `complete` derives from other flags.
_DERIVED = {"effective_batch_size": "batch_size x accum_iter x processes"}


def add_data_args(parser: Parser, *, data: str, follow_checkpoint: bool = False) -> None:
    """Where the images are, and how they are read.

    Args:
        parser: gets the arguments.
        data: what `--data_path` is.
        follow_checkpoint: size and channels are by default those of the checkpoint to start from.
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", type=Path, help=data)
    default = " (default: the checkpoint's, else {})" if follow_checkpoint else ""
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        default=None if follow_checkpoint else [DEFAULT_INPUT_SIZE],
        metavar="PIXELS",
        help="size of the model's input: one number, or height and width"
        + default.format(DEFAULT_INPUT_SIZE),
    )
    group.add_argument(
        "--in_chans",
        type=int,
        choices=(1, 3, 4),
        default=None if follow_checkpoint else DEFAULT_IN_CHANS,
        help="channels: 1 gray, 3 RGB, 4 RGBA" + default.format(DEFAULT_IN_CHANS),
    )
    group.add_argument(
        "--max_bad_images",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of files that may fail to decode; they are skipped",
    )
    group.add_argument(
        "--num_workers",
        type=non_negative_int,
        metavar="N",
        help="loader processes per GPU (default: the CPU cores over the processes, at most 10)",
    )
    add_switch(
        group,
        "pin_mem",
        None,
        "page-locked memory for faster transfer to the GPU (default on CUDA)",
        "plain memory",
    )


def add_augmentation_args(
    parser: Parser, crop_scale: tuple[float, float]
) -> argparse._ArgumentGroup:
    """Random crop and flip, `crop_scale` being a recipe's default; returns the group."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--crop_scale",
        type=share,
        nargs=2,
        default=list(crop_scale),
        metavar=("MIN", "MAX"),
        help="area of the random crop, as a share of the image",
    )
    add_switch(group, "hflip", True, "flip half of the images", "never flip")
    return group


def add_recipe_args(
    parser: Parser, *, crop_scale: tuple[float, float], auto_augment: str
) -> argparse._ArgumentGroup:
    """Augmentation and regularisation of a fine-tuning, with a recipe's defaults."""
    group = add_augmentation_args(parser, crop_scale)
    group.add_argument(
        "--aa",
        default=auto_augment,
        metavar="POLICY",
        help="timm's auto-augment policy; none for none",
    )

    def add(name: str, default: float, help: str, kind: Callable = share) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=help)

    anything = non_negative_float
    add("color_jitter", 0.0, "colour jitter, used without --aa", anything)
    add("reprob", 0.25, "share of images in which a rectangle is erased")
    add("smoothing", 0.1, "label smoothing")
    add("mixup", 0.8, "mixup's alpha; 0 for none", anything)
    add("cutmix", 1.0, "cutmix's alpha; 0 for none", anything)
    add("mixup_prob", 1.0, "share of batches that are mixed")
    add("mixup_switch_prob", 0.5, "share of cutmix where both are on")
    return group


def add_patch_size_arg(group: argparse._ArgumentGroup, default: Sequence[int] | None) -> None:
    """The strides of the stages; without a default they are the checkpoint's."""
    follows = "" if default else " (default: the checkpoint's, else 4 2 2)"
    group.add_argument(
        "--patch_size",
        type=positive_int,
        nargs=3,
        default=default and list(default),
        metavar="STRIDE",
        help=f"strides of the three stages; their product is the patch's side in pixels{follows}",
    )


def add_autoencoder_args(
    parser: Parser, models: Iterable[str], *, model: str, ratio: float
) -> argparse._ArgumentGroup:
    """What a masked autoencoder is built from, `ratio` being removed; returns the group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=ChoiceOf(models),
        default=model,
        metavar="NAME",
        help=f"one of {', '.join(models)}",
    )
    add_patch_size_arg(group, DEFAULT_PATCH_SIZE)
    group.add_argument(
        "--mask_ratio",
        type=mask_ratio,
        default=ratio,
        metavar="SHARE",
        help="share of the patches to remove",
    )
    add_switch(
        group,
        "norm_pix_loss",
        False,
        "predict patches normalised by their own mean and variance (the paper's recipe)",
        "predict plain pixels",
    )
    return group


def add_classifier_args(parser: Parser, models: Iterable[str]) -> argparse._ArgumentGroup:
    """What a classifier is built from; returns the group, for more arguments of the model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--finetune",
        type=Path,
        metavar="FILE",
        help="checkpoint to start from; size and geometry of the model are read off it",
    )
    group.add_argument(
        "--model",
        type=ChoiceOf(models),
        metavar="NAME",
        help=f"start from random weights: one of {', '.join(models)}",
    )
    add_patch_size_arg(group, None)
    pooling = {"dest": "global_pool", "default": True}
    group.add_argument(
        "--global_pool",
        action="store_true",
        help="classify the mean of all tokens (the default)",
        **pooling,
    )
    group.add_argument(
        "--cls_token",
        action="store_false",
        help="classify the first token, as the original does without --global_pool",
        **pooling,
    )
    return group


def add_eval_args(
    parser: Parser, val: str = "images to evaluate on, a folder a class or shards"
) -> None:
    """How a classifier is evaluated, `val` being what `--val_path` takes."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate --resume FILE (default: the best checkpoint in --output_dir)",
    )
    add_switch(
        group,
        "dist_eval",
        True,
        "evaluate in all processes, each image in one of them (the default)",
        "evaluate in the first process alone",
    )
    group.add_argument(
        "--val_path",
        type=Path,
        metavar="PATH",
        help=f"{val} (default: val of --data_path)",
    )
    group.add_argument(
        "--predictions",
        type=Path,
        metavar="CSV",
        help="write path, label, prediction and probability of each image of the last evaluation",
    )


def add_optim_args(
    parser: Parser,
    *,
    batch_size: int,
    epochs: int,
    warmup_epochs: int,
    blr: float,
    weight_decay: float,
    min_lr: float = 0.0,
    min_blr: float | None = None,
    optimizer: str = "AdamW",
) -> argparse._ArgumentGroup:
    """Batch, schedule and optimizer, with a recipe's defaults; returns the group.

    With `min_blr`, `--min_lr` is by default scaled with the batch as `--lr` is.
    """
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help="images per GPU and micro-batch; effective batch = batch_size x accum_iter x GPUs",
    )
    group.add_argument(
        "--accum_iter",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches per optimizer step",
    )
    group.add_argument(
        "--epochs", type=positive_int, default=epochs, metavar="N", help="length of the run"
    )
    group.add_argument(
        "--warmup_epochs",
        type=non_negative_float,
        default=warmup_epochs,
        metavar="N",
        help="epochs of linear warm-up",
    )
    group.add_argument(
        "--blr",
        type=positive_float,
        default=blr,
        metavar="LR",
        help="base learning rate: lr = blr x effective batch / 256",
    )
    group.add_argument(
        "--lr",
        type=positive_float,
        metavar="LR",
        help="absolute peak learning rate (default: from --blr)",
    )
    if min_blr is not None:
        group.add_argument(
            "--min_blr",
            type=non_negative_float,
            default=min_blr,
            metavar="LR",
            help="base of the learning rate at the end, scaled as --blr",
        )
    group.add_argument(
        "--min_lr",
        type=non_negative_float,
        default=min_lr if min_blr is None else None,
        metavar="LR",
        help="learning rate at the end" + (" (default: from --min_blr)" if min_blr else ""),
    )
    group.add_argument(
        "--weight_decay",
        type=non_negative_float,
        default=weight_decay,
        metavar="WD",
        help=f"{optimizer}'s, none on biases and norms",
    )
    group.add_argument(
        "--clip_grad",
        type=positive_float,
        metavar="NORM",
        help="largest gradient norm (default: no clipping)",
    )
    return group


def add_drop_path_arg(group: argparse._ArgumentGroup) -> None:
    """Stochastic depth of a classifier that is fine-tuned."""
    group.add_argument(
        "--drop_path",
        type=share,
        default=0.1,
        metavar="RATE",
        help="stochastic depth, rising linearly to this rate in the last block",
    )


def add_layer_args(group: argparse._ArgumentGroup, layer_decay: float) -> None:
    """Layer-wise learning rates, and the average of the weights."""
    group.add_argument(
        "--layer_decay",
        type=share,
        default=layer_decay,
        metavar="FACTOR",
        help="learning rate of a layer over that of the next",
    )
    add_switch(group, "model_ema", False, "average the weights over steps (timm's)", "no average")
    group.add_argument(
        "--model_ema_decay",
        type=share,
        default=0.9999,
        metavar="FACTOR",
        help="weight of the past in each step of the average",
    )


def add_run_args(parser: Parser) -> None:
    """Output, resuming, device and precision."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", type=Path, default=Path("output"), help="checkpoints, log.txt, pictures"
    )
    group.add_argument("--log_dir", type=Path, help="TensorBoard events (default: --output_dir)")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="FILE",
        help="checkpoint to go on from; auto: the last in --output_dir, if any; none: begin anew",
    )
    group.add_argument(
        "--save_freq",
        type=positive_int,
        default=20,
        metavar="EPOCHS",
        help="keep checkpoint-<epoch>.pth every so many epochs",
    )
    group.add_argument(
        "--save_steps",
        type=non_negative_int,
        default=0,
        metavar="STEPS",
        help="also write checkpoint.pth every so many steps within an epoch; 0: at its end only",
    )
    group.add_argument(
        "--print_freq",
        type=positive_int,
        default=20,
        metavar="STEPS",
        help="steps between two log lines",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of weights, masks, order and augmentation",
    )
    group.add_argument(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to run"
    )
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "none"),
        default="auto",
        help="mixed precision; auto: bf16 where the GPU has it, else fp16 on CUDA, none elsewhere",
    )
    add_switch(
        group,
        "compile",
        None,
        "torch.compile the model (default on CUDA)",
        "run without torch.compile",
    )


def complete_architecture(
    args: argparse.Namespace, architecture: Mapping[str, object] | None, source: str = ""
) -> None:
    """Fill in the flags of a classifier's geometry; those of a video's clips if there are such.

    Args:
        args: those that were given stay.
        architecture: read off the checkpoint to start from; None for random weights.
        source: what it was read off, for messages.

    Raises:
        UsageError: flags that describe another model than the checkpoint's, or no model.
    """
    if architecture is None and args.model is None:
        raise UsageError(
            "what to start from? --finetune FILE for a checkpoint, or --model NAME for "
            "random weights"
        )
    there = flags_of(architecture) if architecture else {}
    if "num_frames" in there and "num_frames" not in args:
        raise UsageError(f"{source} holds a video model: use python -m VideoConvMAE.main_finetune")
    if architecture and args.model and args.model.split("_")[1] != size_name(architecture):
        raise UsageError(
            f"--model {args.model} is not what {source} holds: "
            f"{describe_architecture(architecture)}"
        )
    defaults = {"input_size": [DEFAULT_INPUT_SIZE], "in_chans": DEFAULT_IN_CHANS}
    defaults |= {"patch_size": list(DEFAULT_PATCH_SIZE)}
    defaults |= DEFAULT_CLIP if "num_frames" in args else {}
    for name, default in defaults.items():
        given, known = getattr(args, name), there.get(name)
        resizable = name in ("input_size", "num_frames")
        if not resizable and known is not None and given not in (None, known):
            raise UsageError(
                f"--{name} {_show(given)} is not what {source} holds: {_show(known)}; leave the "
                f"flag away to take it from there"
            )
        setattr(args, name, given or known or default)


def complete(args: argparse.Namespace, device_type: str, processes: int) -> None:
    """Fill in what depends on the machine: sizes, learning rate, workers, switches.

    Raises:
        UsageError: values that do not go together.
    """
    if len(args.input_size) > 2:
        raise UsageError(f"--input_size takes one or two numbers, not {len(args.input_size)}")
    if "crop_scale" in args and not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise UsageError("--crop_scale takes the smaller share first, and more than 0")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}"
        )
    args.input_size = tuple(args.input_size if len(args.input_size) == 2 else args.input_size * 2)
    args.effective_batch_size = args.batch_size * args.accum_iter * processes
    if args.lr is None:
        args.lr = args.blr * args.effective_batch_size / 256
    if args.min_lr is None:
        args.min_lr = args.min_blr * args.effective_batch_size / 256
    if args.min_lr > args.lr:
        raise UsageError(
            f"--min_lr {args.min_lr:g} must not be above the learning rate, {args.lr:g}"
        )
    if args.num_workers is None:
        args.num_workers = min(10, max(1, cores_per_process()))
    for switch in ("compile", "pin_mem"):
        if getattr(args, switch) is None:
            setattr(args, switch, device_type == "cuda")
    args.log_dir = args.log_dir or args.output_dir


def plain(args: argparse.Namespace) -> dict[str, object]:
    """The arguments as plain values, as checkpoints hold them."""

    def value(v: object) -> object:
        if isinstance(v, Path):
            return str(v)
        return [value(x) for x in v] if isinstance(v, list | tuple) else v

    return {name: value(v) for name, v in vars(args).items()}


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
    for name in ("lr", "min_lr"):
        if name in names and {name.replace("lr", "blr"), "effective_batch_size"} & set(names):
            names.remove(name)  # follows from them
    differing = [
        f"{_DERIVED.get(name, f'--{name}')} {_show(saved.get(name))} there, {_show(now[name])} here"
        for name in names
    ]
    if differing:
        raise UsageError(
            f"the checkpoint to resume from belongs to another run ({'; '.join(differing)}): give "
            f"the same flags, or another --output_dir to start a new run"
        )


def _show(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder and try to write in it.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written: {error.strerror}") from error
