"""Measures of an encoder: k-NN and logistic regression on frozen features, and fine-tuning."""

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import main_finetune
import main_pretrain
from benchmarks.proof.arms import Arm, plain_state
from build_classifier import Trainee, build_criterion, build_finetuning, build_optimizer
from engine_evaluate import evaluate
from engine_finetune import train_one_epoch as finetune_one_epoch
from engine_pretrain import build_run
from engine_pretrain import train_one_epoch as pretrain_one_epoch
from models_convvit import LAYER_NORM, ConvViT, convvit_from_weights
from util.data.datasets import LabeledImages
from util.data.loader import Loader
from util.data.samplers import EvalSampler
from util.data.transforms import eval_transform
from util.layers.architecture import Architecture
from util.run.labeled_data import build_data
from util.run.resume import find_resumable
from util.run.run import Run
from util.run.run_log import read_log
from util.run.setup import complete_run, seed_everything
from util.run.start import check_resumed, find_pretraining_start
from util.weights.read import read_weights

NEIGHBOURS = 20  # of k-NN
EVAL_BATCH = 256


def pretrain(arm: Arm, args: argparse.Namespace, device: torch.device) -> None:
    """Pretrain an arm by the engine of `main_pretrain.py`, going on from its last checkpoint.

    Args:
        arm: which.
        args: of `main_pretrain.py`, `model` being a name with the size in it.
        device: where.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    models = {args.model: arm.factory(size_of(args.model))}
    from_there = find_pretraining_start(args, main_pretrain.PROGRAM, models, args.model)
    complete_run(args, device)
    loader = main_pretrain.build_data(args)
    run = build_run(args, device, loader, models, main_pretrain.PROGRAM, from_there)
    run.describe(arm.what)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with closing(run.report.log):
        for epoch, start in run.epochs():
            began = clock()
            values = pretrain_one_epoch(run, epoch, start, args.mask_ratio)
            if not start:  # a whole epoch
                values["seconds"] = clock() - began
            run.end_epoch(epoch, values)


def size_of(model: str) -> str:
    """The size in a model's name."""
    return model.rpartition("_")[2]


def seconds_an_epoch(folder: Path) -> float | None:
    """The median over the epochs of a run that were trained in one go.

    On a CPU it is processor time, which other work on the machine changes least.
    """
    seconds = [row["seconds"] for row in read_log(folder / "log.txt")[0] if "seconds" in row]
    return median(seconds) if seconds else None


# ---- encoders ------------------------------------------------------------------------------------


def convvit(checkpoint: Path | None, args: argparse.Namespace, **kwargs) -> ConvViT:
    """The encoder of a ConvMAE as a classifier; with random weights if there is no checkpoint.

    Args:
        checkpoint: of a pretraining.
        args: completed arguments of the run; `model` says the size.
        **kwargs: further arguments of `ConvViT`.
    """
    if checkpoint:
        return convvit_from_weights(read_weights(checkpoint), **{"num_classes": 0, **kwargs})[0]
    architecture = Architecture.named(args.model).with_flags(vars(args))
    return ConvViT(**{**architecture.kwargs(), "num_classes": 0, **kwargs})


def plain_vit(
    checkpoint: Path | None, args: argparse.Namespace, num_classes: int = 0, drop_path: float = 0.0
) -> VisionTransformer:
    """The same of a plain MAE: timm's ViT, which classifies the mean of the patch tokens."""
    architecture = Architecture.named(args.model).with_flags(vars(args))
    geometry = architecture.geometry
    model = VisionTransformer(
        img_size=geometry.img_size,
        patch_size=geometry.stride(3),
        in_chans=architecture.in_chans,
        embed_dim=architecture.embed_dim[2],
        depth=architecture.depth[2] + 1,
        num_heads=architecture.num_heads,
        num_classes=num_classes,
        drop_path_rate=drop_path,
        global_pool="avg",
        norm_layer=LAYER_NORM,
    )
    if checkpoint:
        state = plain_state(read_weights(checkpoint).state, geometry.grid(3))
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith(("head.", "fc_norm.")) for name in missing):
            raise ValueError(f"{checkpoint} is no plain MAE of this size: {missing} {unexpected}")
    return model


def encoder(arm: Arm, checkpoint: Path | None, args: argparse.Namespace, **kwargs) -> nn.Module:
    """The encoder of an arm, see `convvit` and `plain_vit`."""
    return (plain_vit if arm.family == "plain" else convvit)(checkpoint, args, **kwargs)


# ---- frozen features -----------------------------------------------------------------------------


def pooled(model: nn.Module, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Features of images `[N, C, H, W]`: means over the tokens, normalised without weights.

    Returns:
        last: `[N, C3]` of the last block's tokens, patches alone.
        scales: `[N, …]`, of the three stages, or of a plain ViT's first, middle and last block.
    """
    if isinstance(model, ConvViT):
        *grids, tokens = model.forward_stages(imgs)
        maps = [grid.flatten(1, -2) for grid in grids] + [tokens]
    else:
        depth = len(model.blocks)
        maps = model.forward_intermediates(
            imgs, [0, depth // 2, depth - 1], norm=False, output_fmt="NLC", intermediates_only=True
        )
    means = [F.layer_norm(x, x.shape[-1:], eps=1e-6).mean(dim=1) for x in maps]
    return means[-1], torch.cat(means, dim=1)


@torch.no_grad()
def features(
    model: nn.Module, root: Path, args: argparse.Namespace, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frozen features of all pictures of a split, whole and unaugmented.

    Returns:
        last and scales of `pooled`, and the labels, `[N]`.
    """
    dataset = LabeledImages(root, eval_transform(args.input_size, args.in_chans))
    model.eval().to(device)
    parts = []
    loader = Loader(dataset, EvalSampler(len(dataset), EVAL_BATCH), args.num_workers)
    for imgs, labels, *_ in loader.epoch(0):
        last, scales = pooled(model, imgs.to(device))
        parts.append((last.cpu(), scales.cpu(), labels))
    return tuple(torch.cat(column).numpy() for column in zip(*parts, strict=True))


def probe(model: nn.Module, data: Path, args: argparse.Namespace, device: torch.device) -> dict:
    """Accuracy in percent of k-NN and logistic regression on frozen features, of each kind."""
    train, test = (features(model, data / split, args, device) for split in ("train", "val"))
    found = {}
    for kind, place in (("last", 0), ("scales", 1)):
        for name, judge in (
            ("knn", KNeighborsClassifier(min(NEIGHBOURS, len(train[2])), metric="cosine")),
            ("regression", LogisticRegression(max_iter=1000)),
        ):
            fitted = make_pipeline(StandardScaler(), judge).fit(train[place], train[2])
            found[f"{name}_{kind}"] = 100 * fitted.score(test[place], test[2])
    return found


def curve(
    arm: Arm, folder: Path, data: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, dict]:
    """`probe` of the checkpoints on the way, by the number of epochs done."""
    found = {}
    for path in folder.glob("checkpoint-*.pth"):
        epochs = int(path.stem.partition("-")[2]) + 1
        if epochs < args.epochs:
            found[str(epochs)] = probe(encoder(arm, path, args), data, args, device)
    return found


# ---- fine-tuning ---------------------------------------------------------------------------------


def build_plain(
    args: argparse.Namespace, device: torch.device, checkpoint: Path | None, classes: Sequence[str]
) -> Trainee:
    """A plain ViT to fine-tune as `build_finetuning` does a ConvViT."""
    model = plain_vit(checkpoint, args, len(classes), args.drop_path)
    if checkpoint:
        trunc_normal_(model.head.weight, std=2e-5)
    model.to(device)
    criterion, mixup = build_criterion(args, len(classes))
    return Trainee(model, model, build_optimizer(args, model), criterion, mixup)


def finetune(
    arm: Arm, checkpoint: Path | None, args: argparse.Namespace, device: torch.device
) -> float:
    """Fine-tune as `main_finetune.py` does, and judge once, at the end.

    Args:
        arm: whose encoder it is.
        checkpoint: of its pretraining; None for random weights.
        args: of `main_finetune.py`.
        device: where.

    Returns:
        Accuracy in percent.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    complete_run(args, device)
    loader, val_loader = build_data(args, main_finetune.build_transform(args))
    classes = loader.dataset.classes
    content = find_resumable(args.resume, args.output_dir)
    check_resumed(content, args, loader.dataset)
    seed_everything(args.seed)
    if arm.family == "plain":
        trainee = build_plain(args, device, checkpoint, classes)
    else:
        weights = read_weights(checkpoint) if checkpoint else None
        models = {args.model: lambda **kwargs: ConvViT(**kwargs)}
        trainee = build_finetuning(args, device, weights, classes, models)
    model, optimizer = trainee.model, trainee.optimizer
    extra = {"classes": classes}
    run = Run.prepare(
        args, device, loader, model, optimizer, content, program=main_finetune.PROGRAM, extra=extra
    )
    run.describe(f"{arm.what}: {len(classes)} classes")
    with closing(run.report.log):
        for epoch, start in run.epochs():
            run.end_epoch(epoch, finetune_one_epoch(run, epoch, start, trainee))
    return evaluate(model, val_loader, device, run.optim.dtype).acc1
