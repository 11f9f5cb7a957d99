"""Command lines: the argument groups that the mains share, and their checks."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from util.data.images import MAX_PIXELS
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.distributed import cores_per_process, print_once
from util.run.geometry_args import add_decoder_args, add_encoder_args, fill_geometry_flags
from util.run.normalization import add_stats_args, complete_stats
from util.run.parser import (
    ChoiceOf,
    Ignored,
    Parser,
    PathOrDefault,
    RecipeValue,
    add_switch,
    device_name,
    mask_ratio,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    share,
)

# How the tables of an evaluation begin.
PREDICTION_COLUMNS = ("path", "label", "prediction", "probability")
CONFUSION_COLUMNS = ("label", "samples", "accuracy")
# A recipe's warm-up is cut to a tenth of a run of which it would be more than this share.
_LONGEST_WARMUP = 0.2
# Of a model that no checkpoint describes.
_DEFAULT = Architecture()
_INPUT_SIZE, _PATCH_SIZE = _DEFAULT.img_size[0], _DEFAULT.flags()["patch_size"]


def add_data_args(
    parser: Parser, *, data: str, follow_checkpoint: bool = False, arrays: bool = False
) -> None:
    """Add the arguments of the data path, of normalisation and of loading.

    Args:
        parser: gets the arguments.
        data: what `--data_path` is.
        follow_checkpoint: size and channels are by default those of the checkpoint to start from.
        arrays: any number of channels, for a parser that gets the flags of arrays, too, and fills
            in their number (see `complete_arrays`).
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", action=PathOrDefault, help=data)
    default = " (default: the checkpoint's, else {})" if follow_checkpoint else ""
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        default=None if follow_checkpoint else [_INPUT_SIZE],
        metavar="PIXELS",
        help="size of the model's input: one number, or height and width"
        + default.format(_INPUT_SIZE),
    )
    follows = follow_checkpoint or arrays
    group.add_argument(
        "--in_chans",
        type=positive_int if arrays else int,
        choices=None if arrays else (1, 3, 4),
        default=None if follows else _DEFAULT.in_chans,
        metavar="N" if arrays else None,
        help="channels: 1 gray, 3 RGB, 4 RGBA"
        + (", others of arrays" if arrays else "")
        + (default or (" (default: {})" if arrays else "")).format(_DEFAULT.in_chans),
    )
    add_stats_args(group)
    group.add_argument(
        "--max_bad_images",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of files that may fail to decode; they are skipped",
    )
    group.add_argument(
        "--max_pixels",
        type=positive_int,
        default=MAX_PIXELS,
        metavar="N",
        help="a larger image counts as one that cannot be decoded; a pixel takes up to 10 bytes "
        "of memory in each worker",
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
    parser: Parser, *, crop_scale: tuple[float, float], auto_augment: str | None
) -> argparse._ArgumentGroup:
    """Augmentation and regularisation of a fine-tuning, with a recipe's defaults.

    Without `auto_augment` the policy depends on the data, and is filled in later.
    """
    group = add_augmentation_args(parser, crop_scale)
    group.add_argument(
        "--aa",
        default=auto_augment,
        metavar="POLICY",
        help="timm's auto-augment policy; none for none"
        + ("" if auto_augment else " (default: rand-m9-mstd0.5-inc1, for arrays none)"),
    )

    def add(name: str, default: float, help: str, kind: Callable = share) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=help)

    anything = non_negative_float
    add("color_jitter", 0.0, "colour jitter, used without --aa", anything)
    add("reprob", 0.25, "share of images in which rectangles are erased")
    group.add_argument(
        "--remode",
        choices=("pixel", "rand", "const"),
        default="pixel",
        help="fill of an erased rectangle: noise, one random colour, or the mean colour",
    )
    group.add_argument(
        "--recount",
        type=positive_int,
        default=1,
        metavar="N",
        help="rectangles of an image that is erased in: 1 … N",
    )
    unused = "of no effect, in the original neither: there are no augmentation splits"
    group.add_argument("--resplit", action=Ignored, nargs=0, note=unused)
    add("smoothing", 0.1, "label smoothing")
    add("mixup", 0.8, "mixup's alpha; 0 for none", anything)
    add("cutmix", 1.0, "cutmix's alpha; 0 for none", anything)
    group.add_argument(
        "--cutmix_minmax",
        type=share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="sides of cutmix's rectangle, as shares of the image's, in the place of --cutmix",
    )
    add("mixup_prob", 1.0, "share of batches that are mixed")
    add("mixup_switch_prob", 0.5, "share of cutmix where both are on")
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="one mix for the batch, one for each pair of images, or one for each image",
    )
    return group


def add_start_args(group: argparse._ArgumentGroup) -> None:
    """The checkpoint to start from, and the strides of the stages."""
    group.add_argument(
        "--finetune",
        action=PathOrDefault,
        metavar="FILE",
        help="checkpoint to start from; size and geometry of the model are read off it",
    )
    strides = " ".join(map(str, _PATCH_SIZE))
    group.add_argument(
        "--patch_size",
        type=positive_int,
        nargs=3,
        metavar="STRIDE",
        help="strides of the three stages; their product is the patch's side in pixels (default: "
        f"the checkpoint's, else {strides})",
    )


def add_autoencoder_args(
    parser: Parser, models: Iterable[str], *, model: str, ratio: float
) -> argparse._ArgumentGroup:
    """Add the arguments of a masked autoencoder; returns the group.

    Without `--finetune` `settle_model` gives them their defaults, `model` being that of `--model`.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=ChoiceOf(models),
        metavar="NAME",
        help=f"one of {', '.join(models)} (default: what --finetune holds, else {model})",
    )
    add_start_args(group)
    add_encoder_args(group)
    add_decoder_args(group)
    add_checkpointing_arg(group)
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
    add_switch(
        group,
        "class_token",
        None,
        "a learnable token before those of the patches, as the v2 checkpoints have it",
        "tokens of the patches alone (the default)",
    )
    group.add_argument(
        "--predict_share",
        type=share,
        metavar="SHARE",
        help="share of the removed patches to predict, others are left out of the decoder "
        "(default: all)",
    )
    add_switch(
        group,
        "complementary",
        None,
        "mask each image as often as its blocks make disjoint visible sets, 4 times at 0.75 "
        "(FastConvMAE; the default of its models)",
        "one mask an image",
    )
    return group


def add_teacher_args(parser: Parser) -> None:
    """Add the arguments of a pretraining that mimics a teacher (MR-MCMAE)."""
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--teacher",
        metavar="NAME",
        help="a frozen model that the visible tokens mimic: a timm model that gives patch tokens, "
        "such as vit_base_patch16_224.dino, or a checkpoint of this program (default: none)",
    )
    group.add_argument(
        "--teacher_checkpoint",
        action=PathOrDefault,
        metavar="FILE",
        help="weights of timm's model (default: fetched from the network)",
    )
    group.add_argument(
        "--mimic_weight",
        type=positive_float,
        metavar="W",
        help="loss = that of the pixels + W x mean squared error to the teacher's tokens "
        "(default: 1)",
    )


def settle_model(parser: Parser, args: argparse.Namespace, model: str) -> None:
    """Give the model and its input their defaults, if no checkpoint is to decide them.

    Args:
        parser: told of values that do not fit each other; it exits with 2.
        args: as parsed.
        model: the default of `--model`.
    """
    if args.finetune is None:
        args.model = args.model or model
        try:
            fill_geometry_flags(args, None)
            if "arrays" not in args:
                complete_stats(args)
        except UsageError as error:
            parser.error(str(error))


def add_checkpointing_arg(group: argparse._ArgumentGroup) -> None:
    """Memory for time."""
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute the activations within the blocks again in the backward pass: less memory, "
        "more time, the same gradients",
    )
    group.add_argument(
        "--memory_budget",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="of what a compiled step keeps for the backward pass by itself, keep so much and "
        "compute the rest again: 0.8 saved two fifths of the memory for 3%% of the time",
    )


def add_inflate_arg(group: argparse._ArgumentGroup) -> None:
    """The way in which the weights of an image model start a video model."""
    group.add_argument(
        "--inflate",
        choices=("center", "average"),
        default="center",
        help="how the kernels of an image checkpoint become a video's: centre frame or all alike",
    )


def add_classifier_args(parser: Parser, models: Iterable[str]) -> argparse._ArgumentGroup:
    """Add the arguments of a classifier; returns the group, for more arguments of the model."""
    group = parser.add_argument_group("model")
    add_start_args(group)
    group.add_argument(
        "--model",
        type=ChoiceOf(models),
        metavar="NAME",
        help=f"start from random weights: one of {', '.join(models)}",
    )
    add_encoder_args(group)
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
    group.add_argument(
        "--nb_classes",
        type=positive_int,
        metavar="N",
        help="refuse data of another number of classes (default: as many as there are)",
    )
    return group


def add_eval_args(
    parser: Parser, val: str = "images to evaluate on, a folder a class or shards"
) -> None:
    """Add the arguments of an evaluation; `val` is the help text of `--val_path`."""
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
        action=PathOrDefault,
        metavar="PATH",
        help=f"{val} (default: val of --data_path)",
    )
    group.add_argument(
        "--val_share",
        type=share,
        metavar="SHARE",
        help="where there is no val: hold out such a share of each class of the training data, "
        "chosen by --seed",
    )
    group.add_argument(
        "--predictions",
        action=PathOrDefault,
        metavar="CSV",
        help="write path, label, prediction and probability of each image of the last evaluation",
    )
    group.add_argument(
        "--confusion",
        action=PathOrDefault,
        metavar="CSV",
        help="write the confusion matrix and each class's accuracy of the last evaluation, and a "
        "picture beside it",
    )


def add_knn_args(parser: Parser) -> None:
    """Add the arguments of the k-NN accuracy that is measured as a pretraining runs."""
    group = parser.add_argument_group("k-NN accuracy")
    group.add_argument(
        "--knn_freq",
        type=non_negative_int,
        default=0,
        metavar="EPOCHS",
        help="measure it every so many epochs, and after the last; 0: never",
    )
    group.add_argument(
        "--knn_path",
        action=PathOrDefault,
        metavar="DIR",
        help="labelled images: a folder with train/ and val/, in each a folder a class or shards "
        "(default: --data_path)",
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
        default=RecipeValue(warmup_epochs),
        metavar="N",
        help="epochs of linear warm-up; by default a tenth of --epochs where the recipe's would be "
        "more than a fifth",
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


def add_finetuning_args(group: argparse._ArgumentGroup) -> None:
    """The arguments of a classifier that learns as a whole."""
    add_checkpointing_arg(group)
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


def add_run_args(parser: Parser, *, pictures: bool = False) -> None:
    """Output, resuming, device and precision; with `pictures` how often there are some."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        action=Ignored,
        metavar="FILE",
        help="flags from the args.json of another run, or from names and values as JSON or YAML; "
        "those of the command line count more",
    )
    group.add_argument(
        "--output_dir",
        action=PathOrDefault,
        default=Path("output"),
        help="checkpoints, log.txt, pictures",
    )
    group.add_argument(
        "--log_dir", action=PathOrDefault, help="TensorBoard events (default: --output_dir)"
    )
    group.add_argument(
        "--resume",
        action=PathOrDefault,
        default="auto",
        metavar="FILE",
        help="checkpoint to go on from; auto: the last in --output_dir, if any; none: begin anew",
    )
    group.add_argument(
        "--save_freq",
        type=positive_int,
        default=20,
        metavar="EPOCHS",
        help="write checkpoint-<epoch>.pth every so many epochs; the last is checkpoint.pth",
    )
    group.add_argument(
        "--keep",
        type=non_negative_int,
        default=3,
        metavar="N",
        help="of those of --save_freq the newest so many stay; 0: all",
    )
    group.add_argument(
        "--save_steps",
        type=non_negative_int,
        default=0,
        metavar="STEPS",
        help="also write checkpoint.pth every so many steps within an epoch; 0: at its end only",
    )
    if pictures:
        group.add_argument(
            "--picture_freq",
            type=non_negative_int,
            default=1,
            metavar="EPOCHS",
            help="reconstructions in TensorBoard and reconstruction.png every so many epochs, and "
            "after the last; 0: then only",
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
    add_device_args(group)
    add_switch(
        group,
        "compile",
        None,
        "torch.compile the model (default on CUDA)",
        "run without torch.compile",
    )
    _add_original_args(group)


def add_device_args(group: argparse._ArgumentGroup) -> None:
    """Device and precision."""
    group.add_argument(
        "--device",
        type=device_name,
        default="auto",
        help="where to run: auto, cuda, cuda:N for one GPU of several, mps or cpu",
    )
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "none"),
        default="auto",
        help="mixed precision; auto: bf16 where the GPU has it, else fp16 on CUDA, none elsewhere",
    )


def _add_original_args(group: argparse._ArgumentGroup) -> None:
    """Flags of the original's command lines whose part the launcher or the checkpoint has."""
    launcher = (
        "of no effect, the processes are those of torchrun's, torch.distributed.launch's or "
        "SLURM's environment"
    )
    for name in ("--world_size", "--dist_url", "--dist_backend"):
        group.add_argument(name, action=Ignored, note=launcher)
    group.add_argument("--dist_on_itp", action=Ignored, nargs=0, note=launcher)
    # torch.distributed.launch gives it to every process, beside the environment.
    group.add_argument("--local_rank", "--local-rank", action=Ignored)
    position = "of no effect, a run goes on where its checkpoint says"
    group.add_argument("--start_epoch", action=Ignored, note=position)


def derive_args(args: argparse.Namespace, device_type: str, processes: int) -> None:
    """Fill in what depends on the machine: sizes, learning rate, workers, switches.

    Raises:
        UsageError: values that do not go together.
    """
    derive_loading(args, device_type)
    if "crop_scale" in args and not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise UsageError("--crop_scale takes the smaller share first, and more than 0")
    if isinstance(args.warmup_epochs, RecipeValue):
        recipe, args.warmup_epochs = args.warmup_epochs, float(args.warmup_epochs)
        if recipe > _LONGEST_WARMUP * args.epochs and not getattr(args, "eval", False):
            args.warmup_epochs = args.epochs / 10
            print_once(
                f"note: --warmup_epochs {args.warmup_epochs:g}, a tenth of --epochs {args.epochs}; "
                f"the recipe's {recipe:g} are for longer runs"
            )
    if args.warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup_epochs {args.warmup_epochs:g} must be less than --epochs {args.epochs}"
        )
    args.effective_batch_size = args.batch_size * args.accum_iter * processes
    derived = f" = --blr {args.blr:g} x effective batch {args.effective_batch_size} / 256"
    if args.lr is None:
        args.lr = args.blr * args.effective_batch_size / 256
    else:
        derived = ""
    if args.min_lr is None:
        args.min_lr = args.min_blr * args.effective_batch_size / 256
    if args.min_lr > args.lr and not getattr(args, "eval", False):
        raise UsageError(
            f"--min_lr {args.min_lr:g} must not be above the peak learning rate, {args.lr:g}"
            f"{derived}"
        )
    if args.compile is None:
        args.compile = device_type == "cuda"
    args.log_dir = args.log_dir or args.output_dir


def derive_loading(args: argparse.Namespace, device_type: str) -> None:
    """Fill in what `add_data_args` leaves to the machine: size, workers, memory.

    Raises:
        UsageError: a size of three numbers.
    """
    if len(args.input_size) > 2:
        raise UsageError(f"--input_size takes one or two numbers, not {len(args.input_size)}")
    args.input_size = tuple(args.input_size if len(args.input_size) == 2 else args.input_size * 2)
    if args.num_workers is None:
        args.num_workers = min(10, max(1, cores_per_process()))
    if args.pin_mem is None:
        args.pin_mem = device_type == "cuda"


def check_tables(args: argparse.Namespace) -> None:
    """Refuse tables of an evaluation that could not be written at its end.

    Raises:
        UsageError: a file that cannot be written or holds something else, or a matrix that is to
            be no CSV.
    """
    if getattr(args, "predictions", None):
        check_file_writable(args.predictions, "--predictions", ",".join(PREDICTION_COLUMNS))
    if getattr(args, "confusion", None):
        if args.confusion.suffix != ".csv":
            raise UsageError(
                f"--confusion {args.confusion} must end in .csv; the picture ends in .png"
            )
        check_file_writable(args.confusion, "--confusion", ",".join(CONFUSION_COLUMNS))


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


def check_folder_of(path: Path, flag: str) -> None:
    """Refuse a file to write whose folder is not there.

    Raises:
        UsageError: naming the file.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {flag} {path} does not exist")


def check_png(path: Path, flag: str = "--output") -> None:
    """Refuse a picture to write that has another ending, or whose folder is not there.

    Raises:
        UsageError: naming the picture.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{flag} {path} must end in .png")
    check_folder_of(path, flag)


def check_file_writable(path: Path, flag: str, head: str) -> None:
    """Try to write a file that is to come, and leave what is there as it is.

    Args:
        path: the file.
        flag: the option that names it.
        head: how such a file begins; one that begins otherwise is not written over.

    Raises:
        UsageError: it is a folder or holds something else, or cannot be made or written.
    """
    check_folder_of(path, flag)
    try:
        there = path.exists()
        if not there or path.is_file() or path.is_dir():  # a pipe would wait for its reader
            open(path, "ab").close()
        if path.is_file():
            with open(path, "rb") as file:
                begin = file.read(len(head))
            if begin and begin != head.encode():
                raise UsageError(f"{flag} {path} holds something else: give another name")
        if not there:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror}") from error
