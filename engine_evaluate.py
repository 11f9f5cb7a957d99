"""Evaluation of classifiers: every image once, over any number of processes."""

import argparse
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_features import Predict, check_bad_files, each_output
from models_convvit import convvit_from_weights
from util.data.classes import NO_LABEL, check_classes
from util.data.datasets import LabeledImages
from util.data.loader import Loader
from util.errors import TrainingError, UsageError
from util.run.args import PREDICTION_COLUMNS, check_tables, derive_args
from util.run.confusion import confusion_matrix, write_confusion
from util.run.distributed import gather_objects, is_main_process, print_once, world_size
from util.run.geometry_args import described_architecture, fill_geometry_flags
from util.run.labeled_data import check_nb_classes, val_images
from util.run.optim_step import amp_dtype
from util.run.resume import BEST, LAST
from util.weights.read import KINDS, Weights, read_weights


@dataclass(frozen=True)
class Evaluation:
    """A model's predictions on a data set, in its order, without the images that failed.

    Attributes:
        indices: `[n]`, places in the data set.
        losses: `[n]`, cross entropy.
        top1, top5: `[n]`, whether the label is (among the five of) the model's best.
        predictions: `[n]`, the best class.
        probabilities: `[n]`, the model's for it.
        what: what the data set is of.
        labeled: whether the labels are known; without, accuracy and loss mean nothing.
        num_classes: of the data set.
    """

    indices: Tensor
    losses: Tensor
    top1: Tensor
    top5: Tensor
    predictions: Tensor
    probabilities: Tensor
    what: str = "images"
    labeled: bool = True
    num_classes: int = 1000

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

    def report(self, more: str = "") -> None:
        """Print one line that begins as the original's; of five classes or fewer without top 5.

        Args:
            more: end of the line.
        """
        if not self.labeled:
            print_once(f"no labels, so no accuracy on the {len(self.indices)} {self.what}")
            return
        if broken := int((~self.losses.isfinite()).sum()):
            print_once(
                f"warning: the model's outputs for {broken} of {len(self.indices)} {self.what} are "
                f"not finite: they count as wrong",
                error=True,
            )
        top5 = f"Acc@5 {self.acc5:.3f} " if self.num_classes > 5 else ""
        print_once(
            f"* Acc@1 {self.acc1:.3f} {top5}loss {self.loss:.3f} on the {len(self.indices)} test "
            f"{self.what}{more}"
        )

    def write_tables(self, args: argparse.Namespace, dataset: LabeledImages) -> None:
        """Write what `--predictions` and `--confusion` ask for."""
        if args.predictions:
            self.write(args.predictions, dataset)
        if args.confusion:
            self.write_confusion(args.confusion, dataset)

    def write(self, path: Path, dataset: LabeledImages) -> None:
        """Write path, label, prediction and its probability of each image as CSV.

        Raises:
            TrainingError: the file cannot be written.
        """
        if not is_main_process():
            return
        columns = (self.indices, self.predictions, self.probabilities)
        try:
            with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                table = csv.writer(file)
                table.writerow(PREDICTION_COLUMNS)
                for index, prediction, p in zip(*(c.tolist() for c in columns), strict=True):
                    label = dataset.classes[dataset.labels[index]] if self.labeled else ""
                    row = [dataset.path(index), label, dataset.classes[prediction]]
                    table.writerow([*row, f"{p:.6f}"])
        except OSError as error:
            raise TrainingError(
                f"the predictions cannot be written to {path}: {error.strerror}; --eval with "
                f"--predictions gives them again"
            ) from error
        print(f"predictions of {len(self.indices)} {self.what} in {path}")

    def write_confusion(self, path: Path, dataset: LabeledImages) -> None:
        """Write the confusion matrix and each class's accuracy as CSV, and a picture beside it.

        Raises:
            UsageError: the labels are not known.
        """
        if not is_main_process():
            return
        if not self.labeled:
            raise UsageError(f"--confusion: the {self.what} of {dataset.root} have no labels")
        matrix = confusion_matrix(
            dataset.labels[self.indices.numpy()], self.predictions.numpy(), len(dataset.classes)
        )
        write_confusion(path, matrix, dataset.classes)
        print(f"confusion matrix in {path} and {path.with_suffix('.png')}")


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    dtype: torch.dtype | None = None,
    max_bad_images: float = 1.0,
    predict: Predict = nn.Module.__call__,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
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
        stopping: whether this process was asked to stop, looked at before each batch.

    Returns:
        The evaluation; None if any process was asked to stop.

    Raises:
        TrainingError: more are.
    """
    rows, bad = [], {}
    for batch in each_output(model, loader, device, dtype, predict, stopping):
        bad.update(batch.bad)
        rows.append((batch.indices, *judge(batch.rows, batch.labels)))
    if any(gather_objects(stopping())):
        return None
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return _merge(gather_objects((columns, bad)), loader.dataset, max_bad_images)


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
    """Loss, top 1, top 5, prediction and probability of each row of logits `[n, classes]`.

    A row that is not finite says nothing, so it is wrong; its loss is not finite either.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(5, logits.shape[1])).indices  # [n, 5]
    hits = (best == labels.unsqueeze(1)) & logits.isfinite().all(dim=1, keepdim=True)
    probabilities = logits.softmax(dim=1).gather(1, best[:, :1]).squeeze(1)
    return losses, hits[:, 0], hits.any(dim=1), best[:, 0], probabilities


def _merge(
    parts: Sequence[tuple[list[Tensor], Mapping[int, str]]], dataset: LabeledImages, max_bad: float
) -> Evaluation:
    """The parts of all processes in the order of the data set."""
    filled = [columns for columns, _ in parts if columns]
    columns = [torch.cat(column) for column in zip(*filled, strict=True)]
    bad = {index: reason for _, of_process in parts for index, reason in of_process.items()}
    check_bad_files(bad, dataset, max_bad, len(columns[0]) > 0)
    order = columns[0].argsort()
    labeled = bool((dataset.labels != NO_LABEL).all())
    return Evaluation(
        *(column[order] for column in columns), dataset.what, labeled, len(dataset.classes)
    )


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
        predict: from the model and a batch to logits `[N, classes]`.

    Raises:
        UsageError: a checkpoint that is no trained classifier, or classes that are not its own.
    """
    check_tables(args)
    weights = read_weights(_evaluated(args))
    if weights.kind not in ("classifier", "probe"):
        raise UsageError(
            f"--eval: {weights.path} is {KINDS[weights.kind]}: it has no trained head; "
            f"fine-tune or probe it first, and evaluate the checkpoint of that run"
        )
    fill_geometry_flags(args, weights.architecture, str(weights.path), [*weights.guessed])
    derive_args(args, device.type, world_size())
    dtype = amp_dtype(args.amp, device)
    architecture = described_architecture(args, weights.architecture)
    if architecture.ndim != weights.architecture.ndim:
        raise UsageError(f"--eval: {weights.path} is an image model: fine-tune it on videos first")
    loader = load(args, weights)
    check_nb_classes(args, loader.dataset)
    check_outputs(weights, loader.dataset)
    given = dict(img_size=architecture.img_size, num_heads=architecture.num_heads)
    model, report = convvit_from_weights(weights, **given)
    print_once(report)
    model.to(device)
    evaluation = evaluate(model, loader, device, dtype, args.max_bad_images, predict)
    evaluation.report()
    evaluation.write_tables(args, loader.dataset)
    return evaluation


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
