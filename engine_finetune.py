"""Supervised training of a classifier: one epoch, and the epochs with their evaluations."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from timm.utils import ModelEmaV3
from torch import nn

from build_classifier import Trainee
from engine_evaluate import Evaluation, evaluate
from engine_features import Predict
from util.data.loader import Loader
from util.run.distributed import print_once, rank
from util.run.labeled_data import check_nb_classes
from util.run.logger import count_parameters
from util.run.program import Stopped
from util.run.run import Run
from util.run.setup import seed_everything
from util.run.start import check_resumed


def train_one_epoch(run: Run, epoch: int, start_step: int, trainee: Trainee) -> dict[str, float]:
    """Train a classifier for one epoch.

    Args:
        run: the run of a model that gives logits.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        trainee: what it trains.

    Returns:
        The epoch's means.
    """
    run.model.eval()
    trainee.trained.train()
    first = epoch * run.loader.steps_per_epoch + start_step + 1
    for number, step in enumerate(run.steps(epoch, start_step), start=first):
        for imgs, labels, _ in step.micro_batches:
            if trainee.mixup is not None:
                # The frames of a clip count as channels of one picture: [N, C * T, H, W].
                mixed, labels = trainee.mixup(imgs.flatten(1, -3), labels)
                imgs = mixed.view_as(imgs)
            with step.autocast():
                loss = trainee.criterion(run.ddp_model(imgs), labels)
            step.backward(loss)
        step.update()
        if trainee.ema is not None:
            trainee.ema.update(run.model, step=number)
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
        """The state to save."""
        return {"acc1": self.acc1}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what was saved."""
        self.acc1 = state["acc1"]


def fit(
    run: Run,
    trainee: Trainee,
    val_loader: Loader,
    best: Best,
    *,
    predict: Predict = nn.Module.__call__,
    tables: bool = False,
) -> None:
    """Run the epochs, evaluate after each, keep the best checkpoint by accuracy.

    Args:
        run: set to where it begins.
        trainee: what it trains; its averaged weights, if any, decide which checkpoint is best.
        val_loader: labeled data in the data set's order, each item once over all processes.
        best: the best accuracy, as restored.
        predict: from the model and a batch to logits `[N, classes]`.
        tables: write those that the flags ask for of the last evaluation.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    evaluation = None
    trained_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    for epoch, start in run.epochs():
        values = train_one_epoch(run, epoch, start, trainee)
        run.save_trained(epoch)
        tests, evaluation = evaluate_epoch(run, epoch, val_loader, trainee.ema, predict)
        points = {name.removeprefix("test_"): value for name, value in tests.items()}
        run.report.log.scalars(epoch + 1, "test", points)
        is_best = best.improves(evaluation.acc1)
        evaluation.report(f", best {best.acc1:.3f}")
        values |= {**tests, "n_parameters": trained_parameters}
        run.end_epoch(epoch, values, best=is_best)
    if tables and evaluation:
        evaluation.write_tables(run.args, val_loader.dataset)


def evaluate_epoch(
    run: Run, epoch: int, val_loader: Loader, ema: ModelEmaV3 | None, predict: Predict
) -> tuple[dict[str, float], Evaluation]:
    """Evaluate the model and, if there are any, the averaged weights, which then count.

    Args:
        run: of the model.
        epoch: number of the epoch, for messages.
        val_loader: labeled data in the data set's order, each item once over all processes.
        ema: averaged weights.
        predict: from the model and a batch to logits `[N, classes]`.

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
        if ema and name == "test":
            evaluation.report(", of the weights that are not averaged")
        tests |= {f"{name}_{k}": v for k, v in evaluation.values().items()}
        plain = plain or evaluation
    if evaluation.acc1 < plain.acc1:
        print_once(
            f"note: the averaged weights are worse ({evaluation.acc1:.2f}%) than the weights "
            f"themselves ({plain.acc1:.2f}%), and it is they that decide which checkpoint is best: "
            f"for a run of this length lower --model_ema_decay or leave --model_ema away"
        )
    return tests, evaluation


def train_classifier(
    args: argparse.Namespace,
    device: torch.device,
    content: Mapping | None,
    loader: Loader,
    val_loader: Loader,
    build: Callable[[Sequence[str]], Trainee],
    *,
    program: str,
    predict: Predict = nn.Module.__call__,
    tables: bool = False,
) -> None:
    """Train a classifier to its last epoch.

    Args:
        args: completed arguments.
        device: where to run.
        content: contents of the checkpoint to resume; None to begin.
        loader: of labeled data.
        val_loader: of data with the same classes.
        build: from the names of the classes to what is trained.
        program: what kind of run this is.
        predict: from the model and a batch to logits `[N, classes]`.
        tables: write those that the flags ask for of the last evaluation.
    """
    classes = loader.dataset.classes
    check_nb_classes(args, loader.dataset)
    check_resumed(content, args, loader.dataset)
    seed_everything(args.seed)
    trainee = build(classes)
    model, ema, best = trainee.model, trainee.ema, Best()
    seed_everything((args.seed + rank()) % 2**32)  # mixup and drop path differ between processes
    run = Run.prepare(
        args,
        device,
        loader,
        model,
        trainee.optimizer,
        content,
        program=program,
        parts={"best": best, **({"model_ema": ema.module} if ema else {})},
        extra={"classes": classes},
    )
    if trainee.report and not content:
        print_once(trainee.report)
    frozen = "" if trainee.trained is model else ", the encoder frozen"
    run.describe(f"{len(classes)} classes, {count_parameters(model)}{frozen}")
    with closing(run.report.log):
        fit(run, trainee, val_loader, best, predict=predict, tables=tables)
