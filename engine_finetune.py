"""Supervised training and evaluation: what fine-tuning and linear probing share."""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from models_convvit import MODELS, NEW_IN_CLASSIFIER, ConvViT, convvit_from_weights
from util.data.classes import NO_LABEL, check_classes
from util.data.datasets import LabeledImages
from util.data.loader import BadImages, Loader
from util.data.shards import is_shards
from util.data.transforms import center_crop_transform
from util.errors import UsageError
from util.layers.architecture import constructor_args
from util.run.args import complete, complete_architecture
from util.run.distributed import gather_objects, is_main_process, print_once, rank, world_size
from util.run.logger import count_parameters
from util.run.optim_step import amp_dtype
from util.run.resume import BEST, LAST, find_resumable
from util.run.run import Run, check_program, check_state, eval_loader, seed_everything, train_loader
from util.weights.inflate import inflate_weights
from util.weights.load import Report, load_weights
from util.weights.read import KINDS, Weights, read_weights, weights_of

# From a model and a batch to logits.
Predict = Callable[[nn.Module, Tensor], Tensor]

# --- training ------------------------------------------------------------------------------------


def train_one_epoch(
    run: Run,
    epoch: int,
    start_step: int,
    criterion: nn.Module,
    trained: nn.Module,
    mixup: Mixup | None = None,
) -> dict[str, float]:
    """Train a classifier for one epoch.

    Args:
        run: the run of a model that gives logits.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        criterion: from logits and labels (or mixed targets) to a mean loss.
        trained: the part of the model in training mode: all of it, or a probe's head.
        mixup: mixes images and labels of a batch.

    Returns:
        The epoch's means.
    """
    run.model.eval()
    trained.train()

    def forward(imgs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        if mixup is not None:
            # The frames of a clip count as channels of one picture: [N, C * T, H, W].
            mixed, labels = mixup(imgs.flatten(1, -3), labels)
            imgs = mixed.view_as(imgs)
        return criterion(run.step.model(imgs), labels)

    return run.train_epoch(epoch, start_step, forward)


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
    """
    args, evaluation = run.args, None
    for epoch, start in run.epochs():
        values = train(epoch, start)
        models = {"test": run.model} | ({"test_ema": ema.module} if ema else {})
        for name, model in models.items():
            if model is not run.model:
                print_once("With the averaged weights (EMA):")
            evaluation = evaluate(
                model, val_loader, run.device, run.step.dtype, args.max_bad_images, predict
            )
            evaluation.report()
            values |= {f"{name}_{k}": v for k, v in evaluation.values().items()}
        tests = {name: value for name, value in values.items() if name.startswith("test")}
        run.log.scalars(epoch + 1, tests)
        values["n_parameters"] = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        is_best = best.improves(evaluation.acc1)
        print_once(f"Max accuracy: {best.acc1:.2f}%")
        run.end_epoch(epoch, values, best=is_best)
    if predictions and evaluation:
        evaluation.write(predictions, val_loader.dataset)


def mixes(args: argparse.Namespace) -> bool:
    """Whether images of a batch are mixed."""
    return (args.mixup > 0 or args.cutmix > 0) and args.mixup_prob > 0


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """Timm's loss, and what mixes the batches of it if they are mixed."""
    if mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
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
    check_resumed(content, args, loader.dataset)
    seed_everything(args.seed)
    model, report = build_classifier(args, weights, classes, models, drop_path_rate=args.drop_path)
    if report and "head.weight" in report.missing:
        trunc_normal_(model.head.weight, std=2e-5)
    model.to(device)
    ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    best = Best()
    parts = {"best": best} | ({"model_ema": ema.module} if ema else {})
    optimizer = build_optimizer(args, model)
    seed_everything((args.seed + rank()) % 2**32)  # mixup and drop path differ between processes
    run = Run.prepare(
        args, device, loader, model, optimizer, content,
        program=program, parts=parts, extra={"classes": classes},
    )  # fmt: skip
    if ema:
        run.after_step = partial(ema.update, model)
    if report and not content:
        print_once(report)
    run.describe(f"{len(classes)} classes, {count_parameters(model)}")

    criterion, mixup = build_criterion(args, len(classes))
    train = partial(train_one_epoch, run, criterion=criterion, trained=model, mixup=mixup)
    with closing(run.log):
        fit(run, train, val_loader, best, ema, predict=predict, predictions=predictions)


# --- evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a model says of a data set, in the order of its images, those that failed left out.

    Attributes:
        indices: `[n]`, places in the data set.
        losses: `[n]`, cross entropy.
        top1, top5: `[n]`, whether the label is (among the five of) the model's best.
        predictions: `[n]`, the best class.
        probabilities: `[n]`, the model's for it.
        what: what the data set is of.
        labeled: whether the labels are known; without, accuracy and loss mean nothing.
    """

    indices: Tensor
    losses: Tensor
    top1: Tensor
    top5: Tensor
    predictions: Tensor
    probabilities: Tensor
    what: str = "images"
    labeled: bool = True

    @property
    def acc1(self) -> float:
        """Accuracy in percent."""
        return 100 * self.top1.double().mean().item()

    @property
    def acc5(self) -> float:
        """Share of labels among the five best, in percent."""
        return 100 * self.top5.double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return self.losses.double().mean().item()

    def values(self) -> dict[str, float]:
        """For the logs, by MAE's names."""
        return {"loss": self.loss, "acc1": self.acc1, "acc5": self.acc5}

    def report(self) -> None:
        """Print the original's lines."""
        if not self.labeled:
            print_once(f"no labels, so no accuracy on the {len(self.indices)} {self.what}")
            return
        print_once(f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}")
        print_once(
            f"Accuracy of the network on the {len(self.indices)} test {self.what}: {self.acc1:.1f}%"
        )

    def write(self, path: Path, dataset: LabeledImages) -> None:
        """Write path, label, prediction and its probability of each image as CSV."""
        if not is_main_process():
            return
        columns = (self.indices, self.predictions, self.probabilities)
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "prediction", "probability"])
            for index, prediction, probability in zip(*(c.tolist() for c in columns), strict=True):
                label = dataset.classes[dataset.labels[index]] if self.labeled else ""
                row = [dataset.path(index), label, dataset.classes[prediction]]
                table.writerow([*row, f"{probability:.6f}"])
        print(f"predictions of {len(self.indices)} {self.what} in {path}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    dtype: torch.dtype | None = None,
    max_bad_images: float = 1.0,
    predict: Predict = nn.Module.__call__,
) -> Evaluation:
    """Evaluate a classifier on every image once, over any number of processes.

    All processes call this together and get the result of all, which is that of one process.
    An image that cannot be decoded is named and left out.

    Args:
        model: the bare model, in evaluation mode afterwards.
        loader: of `LabeledImages` in the order of an `EvalSampler`.
        device: where the model is.
        dtype: autocast type; None for full precision.
        max_bad_images: share of the images that may be left out.
        predict: from the model and a batch to logits, such as `mean_over_views`.

    Raises:
        TrainingError: more are.
    """
    model.eval()
    rows, bad = [], set()
    hidden = not (is_main_process() and sys.stderr.isatty())
    batches = tqdm(loader.epoch(0), "evaluate", len(loader.sampler), disable=hidden, leave=False)
    for imgs, labels, indices, failed in batches:
        bad.update(failed)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = predict(model, imgs.to(device, non_blocking=True))
        # A bad file's place holds another image, so its row is taken out again.
        keep = torch.tensor([i not in bad for i in indices.tolist()])
        rows.append([c[keep] for c in (indices, *judge(logits.float().cpu(), labels))])
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return _merge(gather_objects((columns, sorted(bad))), loader.dataset, max_bad_images)


def mean_over_views(model: nn.Module, views: Tensor) -> Tensor:
    """Average a classifier's probabilities over several views of each sample.

    Args:
        model: from `[N, …]` to logits `[N, classes]`.
        views: `[N, V, …]`.

    Returns:
        `[N, classes]`, the logarithms of the mean probabilities, which are logits of these.
    """
    log_probabilities = model(views.flatten(0, 1)).float().log_softmax(dim=-1)
    return log_probabilities.unflatten(0, views.shape[:2]).logsumexp(1) - math.log(views.shape[1])


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss, top 1, top 5, prediction and probability of each row of logits `[n, classes]`."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(5, logits.shape[1])).indices  # [n, 5]
    hits = best == labels.unsqueeze(1)
    probabilities = logits.softmax(dim=1).gather(1, best[:, :1]).squeeze(1)
    return losses, hits[:, 0], hits.any(dim=1), best[:, 0], probabilities


def _merge(
    parts: Sequence[tuple[list[Tensor], list[int]]], dataset: LabeledImages, max_bad: float
) -> Evaluation:
    """The parts of all processes in the order of the data set."""
    bad_images = BadImages(lambda text: print_once(text, error=True))
    for _, bad in parts:
        bad_images.add(bad, dataset)
    bad_images.check(bad_images.count, len(dataset), max_bad, dataset.what)
    filled = [columns for columns, _ in parts if columns]
    columns = [torch.cat(column) for column in zip(*filled, strict=True)]
    if not len(columns[0]):
        raise UsageError(f"none of the {dataset.what} of {dataset.root} can be decoded")
    order = columns[0].argsort()
    labeled = bool((dataset.labels != NO_LABEL).all())
    return Evaluation(*(column[order] for column in columns), dataset.what, labeled)


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
    complete_architecture(args, weights and weights.architecture, weights and str(weights.path))
    return content, weights


def check_resumed(content: dict | None, args: argparse.Namespace, dataset: LabeledImages) -> None:
    """Refuse to go on from another run, or with other classes.

    Raises:
        UsageError: saying what differs.
    """
    if content:
        check_state(content, args, len(dataset))
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
    geometry = constructor_args(vars(args))
    try:
        if weights is None:
            return models[args.model](**geometry, **kwargs), None
        if weights.classes and list(weights.classes) != list(classes):
            weights = weights.without("head")
        if len(weights.architecture["img_size"]) < len(geometry["img_size"]):
            model = ConvViT(**{**weights.architecture, **geometry, **kwargs})
            inflated = inflate_weights(weights, model, args.inflate)
            return model, load_weights(model, inflated, new=NEW_IN_CLASSIFIER)
        return convvit_from_weights(weights, img_size=geometry["img_size"], **kwargs)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error


def val_images(args: argparse.Namespace, weights: Weights | None = None) -> Loader:
    """The images to evaluate on; their classes are what is there, whatever they should be.

    Raises:
        UsageError: no such images, or see `LabeledImages`.
    """
    transform = center_crop_transform(tuple(args.input_size), args.in_chans)
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
    complete_architecture(args, weights.architecture, str(weights.path))
    complete(args, device.type, world_size())
    dtype = amp_dtype(args.amp, device)
    size = constructor_args(vars(args))["img_size"]
    if len(size) != len(weights.architecture["img_size"]):
        raise UsageError(f"--eval: {weights.path} is an image model: fine-tune it on videos first")
    loader = load(args, weights)
    check_outputs(weights, loader.dataset)
    model, report = convvit_from_weights(weights, img_size=size)
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
    if args.finetune or args.model:
        raise UsageError(
            "--eval evaluates a trained classifier as it is: give its checkpoint as --resume FILE, "
            "without --finetune or --model"
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
