"""Supervised training: fine-tuning and linear probing, their epochs and what they are built of."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from timm.data import Mixup
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine_evaluate import Evaluation, Predict, evaluate
from models_convvit import MODELS, NEW_IN_CLASSIFIER, ConvViT, convvit_from_weights
from util.data.classes import check_classes
from util.data.datasets import LabeledImages
from util.data.loader import Loader
from util.data.shards import is_shards
from util.data.transforms import center_crop_transform
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.args import derive_args
from util.run.distributed import print_once, rank, world_size
from util.run.geometry_args import described_architecture, fill_geometry_flags
from util.run.logger import count_parameters
from util.run.optim_step import amp_dtype
from util.run.program import Stopped
from util.run.resume import BEST, LAST, find_resumable
from util.run.run import Run
from util.run.same_run import check_program, check_state
from util.run.setup import eval_loader, hold_output, seed_everything, train_loader
from util.weights.inflate import inflate_weights
from util.weights.load import Report, load_weights
from util.weights.read import KINDS, Weights, read_weights, weights_of

# --- training ------------------------------------------------------------------------------------


def train_one_epoch(
    run: Run,
    epoch: int,
    start_step: int,
    criterion: nn.Module,
    trained: nn.Module,
    mixup: Mixup | None = None,
    ema: ModelEmaV3 | None = None,
) -> dict[str, float]:
    """Train a classifier for one epoch.

    Args:
        run: the run of a model that gives logits.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        criterion: from logits and labels (or mixed targets) to a mean loss.
        trained: the part of the model in training mode: all of it, or a probe's head.
        mixup: mixes images and labels of a batch.
        ema: averages the weights over steps.

    Returns:
        The epoch's means.
    """
    run.model.eval()
    trained.train()
    first = epoch * run.loader.steps_per_epoch + start_step + 1
    for number, step in enumerate(run.steps(epoch, start_step), start=first):
        for imgs, labels, _ in step.micro_batches:
            if mixup is not None:
                # The frames of a clip count as channels of one picture: [N, C * T, H, W].
                mixed, labels = mixup(imgs.flatten(1, -3), labels)
                imgs = mixed.view_as(imgs)
            with step.autocast():
                loss = criterion(run.ddp_model(imgs), labels)
            step.backward(loss)
        step.update()
        if ema is not None:
            ema.update(run.model, step=number)
    return run.means(epoch)


class Best:
    """The best accuracy of a run so far, kept in its checkpoints.

    Attributes:
        acc1: in percent; -1 before the first evaluation.
    """

    def __init__(self) -> None:
        self.acc1 = -1.0

    def improves(self, acc1: float) -> bool:
        """Take note of an accuracy; True if there was none as high."""
        better = acc1 > self.acc1
        self.acc1 = max(acc1, self.acc1)
        return better

    def state_dict(self) -> dict:
        """What to save."""
        return {"acc1": self.acc1}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what was saved."""
        self.acc1 = state["acc1"]


def fit(
    run: Run,
    train: Callable[[int, int], dict[str, float]],
    val_loader: Loader,
    best: Best,
    ema: ModelEmaV3 | None = None,
    *,
    predict: Predict = nn.Module.__call__,
    predictions: Path | None = None,
) -> None:
    """Run the epochs, evaluate after each, keep the best checkpoint by accuracy.

    Args:
        run: set to where it begins.
        train: one epoch, from its number and the steps already done in it to the epoch's means.
        val_loader: see `evaluate`.
        best: the best accuracy, as restored.
        ema: averaged weights; if given they decide which checkpoint is best.
        predict: see `evaluate`.
        predictions: where to write those of the last evaluation.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    evaluation = None
    trained_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    for epoch, start in run.epochs():
        values = train(epoch, start)
        run.save_trained(epoch)
        tests, evaluation = evaluate_epoch(run, epoch, val_loader, ema, predict)
        run.report.log.scalars(epoch + 1, tests)
        is_best = best.improves(evaluation.acc1)
        print_once(f"Max accuracy: {best.acc1:.2f}%")
        values |= {**tests, "n_parameters": trained_parameters}
        run.end_epoch(epoch, values, best=is_best)
    if predictions and evaluation:
        evaluation.write(predictions, val_loader.dataset)


def evaluate_epoch(
    run: Run, epoch: int, val_loader: Loader, ema: ModelEmaV3 | None, predict: Predict
) -> tuple[dict[str, float], Evaluation]:
    """Evaluate the model and, if there are any, the averaged weights, which then count.

    Args:
        run: of the model.
        epoch: number of the epoch, for messages.
        val_loader: see `evaluate`.
        ema: averaged weights.
        predict: see `evaluate`.

    Returns:
        The numbers of both for the logs, and the evaluation that counts.

    Raises:
        Stopped: a signal came; the trained epoch is saved.
    """
    tests, plain = {}, None
    for name, model in {"test": run.model, "test_ema": ema and ema.module}.items():
        if model is None:
            continue
        evaluation = evaluate(
            model,
            val_loader,
            run.device,
            run.optim.dtype,
            run.args.max_bad_images,
            predict,
            stopping=lambda: run.stop.received > 0,
        )
        if evaluation is None:
            raise Stopped(run.stopped_at(f"the evaluation of epoch {epoch + 1}"))
        if name == "test_ema":
            print_once("With the averaged weights (EMA):")
        evaluation.report()
        tests |= {f"{name}_{k}": v for k, v in evaluation.values().items()}
        plain = plain or evaluation
    if evaluation.acc1 < plain.acc1:
        print_once(
            f"note: the averaged weights are worse ({evaluation.acc1:.2f}%) than the weights "
            f"themselves ({plain.acc1:.2f}%), and it is they that decide which checkpoint is best: "
            f"for a run of this length lower --model_ema_decay or leave --model_ema away"
        )
    return tests, evaluation


def mixes(args: argparse.Namespace) -> bool:
    """Whether images of a batch are mixed."""
    return (args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)) and args.mixup_prob > 0


def check_mixing(args: argparse.Namespace) -> None:
    """Refuse settings of mixup and cutmix that timm cannot do, before anything is built.

    Raises:
        UsageError: an odd batch, or rectangles without a choice of size.
    """
    if not mixes(args):
        return
    if args.batch_size % 2:
        raise UsageError(
            f"--batch_size {args.batch_size} must be even, as mixup pairs images; or give "
            f"--mixup 0 --cutmix 0"
        )
    low, high = args.cutmix_minmax or (0, 1)
    if not all(int(side * low) < int(side * high) for side in args.input_size):
        raise UsageError(
            f"--cutmix_minmax {low:g} {high:g}: the smaller share comes first, and of "
            f"{args.input_size[0]}x{args.input_size[1]} pixels they must be different numbers"
        )


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """Timm's loss, and what mixes the batches of it if they are mixed."""
    if mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing), None
    return nn.CrossEntropyLoss(), None


def build_optimizer(args: argparse.Namespace, model: ConvViT) -> torch.optim.Optimizer:
    """AdamW with a learning rate that falls from layer to layer towards the input."""
    groups = param_groups_layer_decay(
        model,
        args.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=args.layer_decay,
    )
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def finetune(
    args: argparse.Namespace,
    device: torch.device,
    content: Mapping | None,
    weights: Weights | None,
    loader: Loader,
    val_loader: Loader,
    *,
    program: str,
    models: Mapping[str, Callable[..., ConvViT]] = MODELS,
    predict: Predict = nn.Module.__call__,
    predictions: Path | None = None,
) -> None:
    """Train a classifier to its last epoch.

    Args:
        args: completed arguments.
        device: where to run.
        content: see `find_start`.
        weights: see `find_start`.
        loader: of labeled data.
        val_loader: of data with the same classes.
        program: what kind of run this is.
        models: what `--model` names.
        predict: see `evaluate`.
        predictions: where to write those of the last evaluation.
    """
    classes = loader.dataset.classes
    check_nb_classes(args, loader.dataset)
    check_resumed(content, args, loader.dataset)
    seed_everything(args.seed)
    model, report = build_classifier(args, weights, classes, models, drop_path_rate=args.drop_path)
    if report and "head.weight" in report.missing:
        trunc_normal_(model.head.weight, std=2e-5)
    model.to(device)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=True)
    best = Best()
    parts = {"best": best} | ({"model_ema": ema.module} if ema else {})
    optimizer = build_optimizer(args, model)
    seed_everything((args.seed + rank()) % 2**32)  # mixup and drop path differ between processes
    run = Run.prepare(
        args, device, loader, model, optimizer, content,
        program=program, parts=parts, extra={"classes": classes},
    )  # fmt: skip
    if report and not content:
        print_once(report)
    run.describe(f"{len(classes)} classes, {count_parameters(model)}")

    criterion, mixup = build_criterion(args, len(classes))
    train = partial(train_one_epoch, run, criterion=criterion, trained=model, mixup=mixup, ema=ema)
    with closing(run.report.log):
        fit(run, train, val_loader, best, ema, predict=predict, predictions=predictions)


# --- building ------------------------------------------------------------------------------------


def find_start(args: argparse.Namespace, program: str) -> tuple[dict | None, Weights | None]:
    """What a run goes on or starts from; fills in the arguments that the checkpoint decides.

    Args:
        args: `--resume`, `--finetune`, and the arguments of the model.
        program: what kind of run this is.

    Returns:
        The contents of the checkpoint to resume, if any, and the weights in it or those of
        `--finetune`, if any.

    Raises:
        UsageError: a file that is no such thing, or flags that contradict it.
    """
    if args.output_dir.is_dir():
        hold_output(args.output_dir)
    content, weights = find_resumable(args.resume, args.output_dir), None
    if content:
        check_program(content, program)
        weights = weights_of(content, args.output_dir / LAST)
    elif args.finetune:
        weights = read_weights(args.finetune)
        if weights.encoder:
            raise UsageError(
                f"--finetune {args.finetune} is {KINDS[weights.kind]}: give the checkpoint of a "
                f"pretraining, or of a classifier"
            )
    fill_geometry_flags(args, weights and weights.architecture, weights and str(weights.path))
    return content, weights


def check_resumed(content: dict | None, args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse to go on from another run, or with other classes.

    Raises:
        UsageError: saying what differs.
    """
    if content:
        check_state(content, args, len(dataset))
        if "classes" in content:  # not in files of the original code
            check_classes(content["classes"], dataset.classes, "the run to resume", dataset.root)


def build_classifier(
    args: argparse.Namespace,
    weights: Weights | None,
    classes: Sequence[str],
    models: Mapping[str, Callable[..., ConvViT]] = MODELS,
    **kwargs,
) -> tuple[ConvViT, Report | None]:
    """The model to train: with a checkpoint's weights, or random ones.

    A head of the right width is kept only if its classes are the same, as far as is known. The
    weights of an image model are inflated for a video model, as `--inflate` says.

    Args:
        args: completed arguments.
        weights: to start from; None for random ones.
        classes: names of the classes.
        models: what `--model` names.
        **kwargs: further arguments of `ConvViT`.

    Returns:
        The model, and how the weights were matched if there are any.
    """
    kwargs |= {"num_classes": len(classes), "global_pool": args.global_pool}
    start = weights.architecture if weights else Architecture.named(args.model)
    architecture = described_architecture(args, start)
    try:
        if weights is None:
            return models[args.model](**architecture.kwargs(), **kwargs), None
        if weights.classes and list(weights.classes) != list(classes):
            weights = weights.without("head")
        if weights.architecture.ndim < architecture.ndim:
            model = ConvViT(**architecture.kwargs(), **kwargs)
            inflated = inflate_weights(weights, model, args.inflate)
            return model, load_weights(model, inflated, new=NEW_IN_CLASSIFIER)
        return convvit_from_weights(weights, img_size=architecture.img_size, **kwargs)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error


def val_images(args: argparse.Namespace, weights: Weights | None = None) -> Loader:
    """The images to evaluate on; their classes are what is there, whatever they should be.

    Raises:
        UsageError: no such images, or see `LabeledImages`.
    """
    transform = center_crop_transform(tuple(args.input_size), args.in_chans, args.max_pixels)
    return eval_loader(args, LabeledImages(_val_path(args), transform), args.batch_size)


def build_data(
    args: argparse.Namespace, transform: Callable[[BinaryIO], Tensor]
) -> tuple[Loader, Loader]:
    """Training and validation images of ImageNet's layout, checked to have the same classes.

    Args:
        args: completed arguments.
        transform: of the training images.

    Raises:
        UsageError: folders that are missing, or whose classes differ.
    """
    if args.data_path is None:
        raise UsageError("--data_path is missing: a folder with train/ and val/, a folder a class")
    train = args.data_path if is_shards(args.data_path) else args.data_path / "train"
    val_path = args.val_path or args.data_path / "val"
    for path in (train, val_path):
        if not path.is_dir() and not is_shards(path):
            raise UsageError(
                f"--data_path {args.data_path} has no {path.name}/: it takes train/ and val/, with "
                f"the images of each class in a folder of its own (or shards, see --val_path)"
            )
    dataset = LabeledImages(train, transform)
    dataset.check_complete()
    val = val_images(args)
    check_classes(dataset.classes, val.dataset.classes, dataset.root, val.dataset.root)
    return train_loader(args, dataset), val


def evaluate_checkpoint(
    args: argparse.Namespace,
    device: torch.device,
    load: Callable[[argparse.Namespace, Weights], Loader] = val_images,
    predict: Predict = nn.Module.__call__,
) -> Evaluation:
    """`--eval`: the accuracy of a trained classifier or probe, refused if it cannot be right.

    Args:
        args: of the command line.
        device: where to run.
        load: from completed arguments and what the checkpoint holds to the data.
        predict: see `evaluate`.

    Raises:
        UsageError: a checkpoint that is no trained classifier, or classes that are not its own.
    """
    weights = read_weights(_evaluated(args))
    if weights.kind not in ("classifier", "probe"):
        raise UsageError(
            f"--eval: {weights.path} is {KINDS[weights.kind]}: it has no trained head; "
            f"fine-tune or probe it first, and evaluate the checkpoint of that run"
        )
    fill_geometry_flags(args, weights.architecture, str(weights.path))
    derive_args(args, device.type, world_size())
    dtype = amp_dtype(args.amp, device)
    architecture = described_architecture(args, weights.architecture)
    if architecture.ndim != weights.architecture.ndim:
        raise UsageError(f"--eval: {weights.path} is an image model: fine-tune it on videos first")
    loader = load(args, weights)
    check_nb_classes(args, loader.dataset)
    check_outputs(weights, loader.dataset)
    model, report = convvit_from_weights(weights, img_size=architecture.img_size)
    print_once(report)
    model.to(device)
    evaluation = evaluate(model, loader, device, dtype, args.max_bad_images, predict)
    evaluation.report()
    if args.predictions:
        evaluation.write(args.predictions, loader.dataset)
    return evaluation


def _val_path(args: argparse.Namespace) -> Path:
    """The images that `--eval` means."""
    if args.val_path is not None:
        return args.val_path
    if args.data_path is None:
        raise UsageError("--data_path is missing: a folder with val/, a folder a class in it")
    val = args.data_path / "val"
    return val if val.is_dir() else args.data_path


def _evaluated(args: argparse.Namespace) -> Path:
    """The checkpoint that `--eval` means."""
    if args.finetune:
        raise UsageError(
            "--eval evaluates a trained classifier as it is: give its checkpoint as --resume FILE, "
            "without --finetune"
        )
    if args.resume not in ("auto", "none"):
        return Path(args.resume)
    for name in (BEST, LAST):
        if (args.output_dir / name).exists():
            return args.output_dir / name
    raise UsageError(
        f"--eval: which checkpoint? {args.output_dir} has none: give --resume FILE, or the "
        f"--output_dir of a run"
    )


def check_nb_classes(args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse data of another number of classes than `--nb_classes`, if that is given.

    Raises:
        UsageError: with both numbers.
    """
    if args.nb_classes not in (None, len(dataset.classes)):
        raise UsageError(
            f"--nb_classes {args.nb_classes}: {dataset.root} has {len(dataset.classes)} classes; "
            f"leave the flag away to take those that are there"
        )


def check_outputs(weights: Weights, dataset: LabeledImages) -> None:
    """Refuse to compare labels with the outputs of a model that means other classes by them.

    Raises:
        UsageError: classes of another number, other names or another order.
    """
    if weights.classes:
        check_classes(weights.classes, dataset.classes, f"checkpoint {weights.path}", dataset.root)
    elif weights.num_classes != len(dataset.classes):
        raise UsageError(
            f"checkpoint {weights.path} tells {weights.num_classes} classes apart, "
            f"{dataset.root} has {len(dataset.classes)} classes"
        )
    else:
        print_once(
            f"note: {weights.path} does not name its classes; its outputs are taken to be those "
            f"of {dataset.root} in sorted order"
        )
