"""Measures of an encoder: k-NN and logistic regression on frozen features, and fine-tuning."""

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
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
from engine_pretrain import build_run, build_teacher
from engine_pretrain import train_one_epoch as pretrain_one_epoch
from models_convvit import LAYER_NORM, ConvViT, convvit_from_weights
from util.data.datasets import LabeledImages
from util.data.loader import Loader
from util.data.samplers import EvalSampler
from util.data.transforms import channel_stats, eval_transform
from util.layers.architecture import Architecture
from util.run.labeled_data import build_data
from util.run.program import Stopped
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
    teacher = build_teacher(args, device)
    run = build_run(args, device, loader, models, main_pretrain.PROGRAM, from_there)
    if teacher:
        teacher.see_through(*channel_stats(args.in_chans), run.model.geometry.grid(3))
    run.describe(arm.what)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with closing(run.report.log):
        for epoch, start in run.epochs():
            began = clock()
            values = pretrain_one_epoch(run, epoch, start, args.mask_ratio, teacher=teacher)
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


def without_table(model: nn.Module) -> nn.Module:
    """A copy of an encoder that knows no positions: its table is zero."""
    bare = copy.deepcopy(model)
    with torch.no_grad():
        bare.pos_embed.zero_()
    return bare


@torch.no_grad()
def features(
    models: Mapping[str, nn.Module], root: Path, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Frozen features of all pictures of a split, whole and unaugmented.

    Args:
        models: encoders by what is behind "last" and "scales" in the names of their features.
        root: of the split.
        args: completed arguments of the pretraining.
        device: where.

    Returns:
        last and scales of `pooled` of each encoder, and the labels, `[N]`.
    """
    dataset = LabeledImages(root, eval_transform(args.input_size, args.in_chans))
    found, labels = {}, []
    for model in models.values():
        model.eval().to(device)
    loader = Loader(dataset, EvalSampler(len(dataset), EVAL_BATCH), args.num_workers)
    for imgs, targets, *_ in loader.epoch(0):
        labels.append(targets)
        imgs = imgs.to(device)
        for name, model in models.items():
            for kind, means in zip(("last", "scales"), pooled(model, imgs), strict=True):
                found.setdefault(kind + name, []).append(means.cpu())
    parts = {name: torch.cat(means).numpy() for name, means in found.items()}
    return parts, torch.cat(labels).numpy()


def knn(train: tuple[np.ndarray, np.ndarray], test: np.ndarray) -> np.ndarray:
    """Classes of features `[n, C]` by their nearest neighbours among labelled ones: `[n]`."""
    judge = KNeighborsClassifier(min(NEIGHBOURS, len(train[1])), metric="cosine")
    return make_pipeline(StandardScaler(), judge).fit(*train).predict(test)


def regression(train: tuple[np.ndarray, np.ndarray], test: np.ndarray) -> np.ndarray:
    """Classes of features `[n, C]` by a logistic regression on labelled ones: `[n]`."""
    judge = LogisticRegression(max_iter=1000)
    return make_pipeline(StandardScaler(), judge).fit(*train).predict(test)


def verdict_of(right: np.ndarray | Tensor) -> dict[str, object]:
    """Accuracy in percent, and which pictures are right: a bit each, as hexadecimal digits.

    Args:
        right: `[n]`, bool.
    """
    right = np.asarray(right, dtype=bool)
    accuracy, digits = 100 * right.mean().item(), np.packbits(right).tobytes().hex()
    return {"accuracy": accuracy, "pictures": len(right), "right": digits}


def probe(
    model: nn.Module,
    data: Path,
    args: argparse.Namespace,
    device: torch.device,
    bare: bool = False,
) -> dict[str, dict]:
    """Accuracy of k-NN and logistic regression on frozen features, of each kind.

    Args:
        model: the encoder.
        data: with `train/` and `val/`.
        args: completed arguments of the pretraining.
        device: where.
        bare: without the position table, too.

    Returns:
        `verdict_of` by "<judge>_<kind>", such as "knn_scales" and "regression_last_bare".
    """
    models = {"": model} | ({"_bare": without_table(model)} if bare else {})
    train, test = (features(models, data / split, args, device) for split in ("train", "val"))
    return {
        f"{judge.__name__}_{kind}": verdict_of(judge((known, train[1]), test[0][kind]) == test[1])
        for kind, known in train[0].items()
        for judge in (knn, regression)
    }


def curve(
    arm: Arm, folder: Path, data: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Accuracy of k-NN on all scales of the checkpoints on the way, by the epochs done."""
    paths = {int(p.stem.partition("-")[2]) + 1: p for p in folder.glob("checkpoint-*.pth")}
    models = {f"_{n}": encoder(arm, path, args) for n, path in paths.items() if n < args.epochs}
    train, test = (features(models, data / split, args, device) for split in ("train", "val"))
    found = {}
    for name in models:
        right = knn((train[0]["scales" + name], train[1]), test[0]["scales" + name]) == test[1]
        found[name[1:]] = 100 * right.mean().item()
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
) -> dict[str, object]:
    """Fine-tune as `main_finetune.py` does, and judge once, at the end.

    Args:
        arm: whose encoder it is.
        checkpoint: of its pretraining; None for random weights.
        args: of `main_finetune.py`.
        device: where.

    Returns:
        `verdict_of` of the test pictures.

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
    evaluation = evaluate(
        model, val_loader, device, run.optim.dtype, stopping=lambda: run.stop.received > 0
    )
    if evaluation is None:
        raise Stopped(run.stopped_at("the evaluation"))
    return verdict_of(evaluation.top1)
