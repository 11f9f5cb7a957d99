"""Training and evaluation of a detector, in each process of a run."""

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from DET.checkpoint import (
    Checkpointer,
    RandomState,
    fit_heads,
    load_to_train,
    normalize_as,
    read_detector,
)
from DET.config import build, load_config
from DET.data import prepare_data
from DET.rcnn import norms_in_float32
from DET.schedule import Schedule
from DET.trainer import PeriodicEvaluation, SaveOnSignal, ShuffledStream, Trainer
from util.errors import UsageError
from util.run.distributed import StopSignal, is_main_process, rank, shield_workers, world_size
from util.run.optim_step import OptimStep, amp_dtype
from util.run.setup import hold_output, seed_everything
from util.weights.load import load_weights
from util.weights.read import read_weights

logger = logging.getLogger("DET")


def run(args: argparse.Namespace) -> None:
    """Train or evaluate as the command line says; all processes of a run call this.

    Raises:
        UsageError: a configuration, data or checkpoint that cannot be used.
        TrainingError: the run cannot go on.
    """
    cfg = load_config(args.config_file, args.overrides)
    hold_output(Path(cfg.train.output_dir), "train.output_dir")
    device = torch.device("cpu")
    if args.num_gpus:
        device = torch.device("cuda", torch.cuda.current_device())
        torch.set_float32_matmul_precision("high")  # tf32
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=rank(), name="DET")
    if args.eval_only:
        evaluate_checkpoint(cfg, device)
    else:
        train(cfg, device, args.resume)


def evaluate_checkpoint(cfg: DictConfig, device: torch.device) -> dict:
    """Evaluate the detector of `train.init_checkpoint`; its heads are as the file has them."""
    if not cfg.train.init_checkpoint:
        raise UsageError("--eval-only needs a detector: train.init_checkpoint=FILE")
    weights = read_detector(cfg.train.init_checkpoint)
    classes = prepare_data(cfg, training=False).classes
    if weights.num_classes != len(classes):
        raise UsageError(
            f"checkpoint {weights.path} detects {weights.num_classes} classes, "
            f"{cfg.data.val.json} has {len(classes)}"
        )
    if weights.classes and weights.classes != classes:
        raise UsageError(
            f"checkpoint {weights.path} detects {', '.join(weights.classes)}; "
            f"{cfg.data.val.json} has, in this order, {', '.join(classes)}"
        )
    fit_heads(cfg.model, weights)
    model = build(cfg.model, "model").to(device)
    logger.info("%s", load_weights(model, weights))
    if line := normalize_as(model, weights):
        logger.info(line)
    return evaluate(cfg, model)


def evaluate(
    cfg: DictConfig, model: nn.Module, watch: Callable[[Iterable], Iterable] = lambda loader: loader
) -> dict:
    """COCO's numbers on `data.val`, of boxes and, if there are any, of masks.

    Args:
        cfg: the configuration.
        model: the detector.
        watch: what the loader is put in, to look at its batches.
    """
    loader, evaluator = build_evaluation(cfg)
    results = inference_on_dataset(model, watch(loader), evaluator)
    if is_main_process():
        print_csv_format(results)
    return results


def build_evaluation(cfg: DictConfig) -> tuple[Iterable, DatasetEvaluator]:
    """The images of `data.val` and what judges detections in them."""
    loader = build(cfg.dataloader.test, "dataloader.test")
    return _shielded(loader), build(cfg.dataloader.evaluator, "dataloader.evaluator")


def plan(cfg: DictConfig, images: int) -> Schedule:
    """Turn epochs into iterations, and fit learning rate and warm-up to the batch.

    Args:
        cfg: completed in place: `optimizer.lr`, `lr_multiplier.warmup_length`.
        images: how many there are to train on, those without objects included.

    Raises:
        UsageError: a batch that cannot be split over processes and micro-batches, or a warm-up
            that is as long as the run.
    """
    options, batch = cfg.train, cfg.dataloader.train.total_batch_size
    if not 0 <= options.warmup_epochs < options.epochs:
        raise UsageError(
            f"train.warmup_epochs {options.warmup_epochs:g} must be less than train.epochs "
            f"{options.epochs:g}"
        )
    parts = world_size() * options.accum_iter
    if batch < 1 or batch % parts:
        raise UsageError(
            f"dataloader.train.total_batch_size {batch} is not divisible by {world_size()} "
            f"processes x {options.accum_iter} micro-batches (train.accum_iter)"
        )
    schedule = Schedule(options.epochs, images, batch)
    base = cfg.optimizer.lr
    if options.scale_lr:
        cfg.optimizer.lr = base * batch / options.base_batch_size
    cfg.lr_multiplier.warmup_length = options.warmup_epochs / options.epochs
    logger.info(
        "%s\nA step is %d processes x %d micro-batches x %d images. Learning rate %.3g (%.3g for "
        "%d images%s), warm-up %s iterations.",
        schedule, world_size(), options.accum_iter, batch // parts, cfg.optimizer.lr, base,
        options.base_batch_size, ", scaled with the batch" if options.scale_lr else ", not scaled",
        f"{schedule.iterations_of(options.warmup_epochs):,}",
    )  # fmt: skip
    return schedule


def train(cfg: DictConfig, device: torch.device, resume: str) -> None:
    """Train a detector, with checkpoints and evaluation on the way.

    Args:
        cfg: the configuration.
        device: where to run.
        resume: see `Checkpointer.resume`.
    """
    options = cfg.train
    dtype = amp_dtype(options.amp, device)
    split = prepare_data(cfg, training=True)
    if cfg.data.val.json:
        build_evaluation(cfg)  # settings of it that cannot be are told now, not after an epoch
    records = build(cfg.dataloader.train.dataset, "dataloader.train.dataset")
    schedule = plan(cfg, split.images)

    model = build(cfg.model, "model").to(device)
    norms_in_float32(model)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info("%.1f M parameters, %s on %s", count, dtype or torch.float32, device)
    cfg.optimizer.params.model = model
    optimizer = build(cfg.optimizer, "optimizer")
    ddp = dict(cfg.train.ddp, device_ids=[device.index] if device.type == "cuda" else None)
    trained = create_ddp_model(model, **ddp)

    step = OptimStep(trained, optimizer, device, dtype, options.clip_grad)
    trainer = Trainer(trained, None, step, options.accum_iter, options.log_period)
    parts = {"trainer": trainer, "random": RandomState()}
    checkpointer = Checkpointer(
        model, options.output_dir, describe_run(cfg, schedule), split.classes, **parts
    )
    start = checkpointer.resume(resume)
    if start == 0:
        begin(cfg, model)
    elif world_size() > 1:  # the file has the random state of the main process alone
        seed_everything(options.seed + start + rank())
    if start == schedule.iterations:
        logger.info("Nothing to train: %s holds all iterations", options.output_dir)
        if cfg.data.val.json:
            evaluate(cfg, model)
        return
    trainer.data_loader = build_loader(cfg, records, schedule, start)
    register_hooks(cfg, trainer, checkpointer, schedule, model)
    trainer.train(start, schedule.iterations)


def build_loader(
    cfg: DictConfig, records: list[dict], schedule: Schedule, start: int
) -> Iterable[list[dict]]:
    """Micro-batches without end, from where `start` iterations end."""
    options = {
        "dataset": records,
        "sampler": ShuffledStream(len(records), cfg.train.seed, start * schedule.batch_size),
        "total_batch_size": schedule.batch_size // cfg.train.accum_iter,
        # Its own generator, because an iterator draws a number where it begins.
        "seed": cfg.train.seed + start + rank(),
    }
    loader = build({**cfg.dataloader.train, **options}, "dataloader.train")
    return _shielded(loader)


def _shielded(loader: Iterable) -> Iterable:
    """A loader of Detectron2 whose workers leave signals to the run."""
    inner = loader
    while not isinstance(inner, DataLoader) and hasattr(inner, "dataset"):
        inner = inner.dataset
    if isinstance(inner, DataLoader):
        shield_workers(inner)
    return loader


def begin(cfg: DictConfig, model: nn.Module) -> None:
    """Load what a new run begins with."""
    if cfg.train.init_checkpoint:
        weights = read_weights(cfg.train.init_checkpoint)
        logger.info("%s", load_to_train(model, weights))
        if line := normalize_as(model, weights):
            logger.info(line)
    else:
        logger.warning("Training from random weights: train.init_checkpoint is not given")


def describe_run(cfg: DictConfig, schedule: Schedule) -> dict[str, object]:
    """Model and schedule of a run as plain values; a checkpoint of another run is refused."""
    return {
        "input_size": cfg.data.image_size,
        "epochs": schedule.epochs,
        "images": schedule.images,
        "batch_size": schedule.batch_size,
        "lr": cfg.optimizer.lr,
        "warmup_epochs": cfg.train.warmup_epochs,
        "seed": cfg.train.seed,
    }


def register_hooks(
    cfg: DictConfig,
    trainer: Trainer,
    checkpointer: Checkpointer,
    schedule: Schedule,
    model: nn.Module,
) -> None:
    """Learning rate, checkpoints, evaluation, logs and signals."""
    options = cfg.train
    main = is_main_process()
    save_period = schedule.iterations_of(options.checkpoint_epochs)
    saving = hooks.PeriodicCheckpointer(
        checkpointer, save_period, max_to_keep=options.checkpoints_kept
    )
    eval_period = schedule.iterations_of(options.eval_epochs)
    stop, device = StopSignal(), trainer.step.device
    evaluating = PeriodicEvaluation(
        eval_period, lambda watch: evaluate(cfg, model, watch), checkpointer, stop, device
    )
    writing = hooks.PeriodicWriter(
        default_writers(options.output_dir, schedule.iterations), options.log_period
    )
    everywhere = [
        # Times all iterations: the writers divide by zero where a run stops that has no time yet.
        hooks.IterationTimer(warmup_iter=0),
        hooks.LRScheduler(scheduler=build(cfg.lr_multiplier, "lr_multiplier")),
    ]
    trainer.register_hooks(
        [
            *everywhere,
            saving if main else None,
            evaluating if cfg.data.val.json else None,
            writing if main else None,
            SaveOnSignal(checkpointer, stop, device, options.log_period),
        ]
    )
