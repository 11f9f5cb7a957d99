"""Classifiers ready to be trained: a model to fine-tune, or a probe of a frozen encoder."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

from models_convvit import MODELS, NEW_IN_CLASSIFIER, ConvViT, convvit_from_weights
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.distributed import SyncedBatchNorm1d
from util.run.geometry_args import described_architecture
from util.run.lars import LARS
from util.weights.inflate import inflate_weights
from util.weights.load import Report, load_weights
from util.weights.read import Weights


@dataclass
class Trainee:
    """A classifier ready to be trained.

    Attributes:
        model: the whole model.
        trained: the part of it in training mode: all of it, or a probe's head.
        optimizer: of the parameters that learn, one that honours `found_inf`.
        criterion: from logits and labels (or mixed targets) to a mean loss.
        mixup: mixes images and labels of a batch.
        ema: average of the weights over steps.
        report: how weights were matched, if it starts from some.
    """

    model: ConvViT
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    report: Report | None = None


def build_finetuning(
    args: argparse.Namespace,
    device: torch.device,
    weights: Weights | None,
    classes: Sequence[str],
    models: Mapping[str, Callable[..., ConvViT]] = MODELS,
) -> Trainee:
    """A whole model to fine-tune; arguments as `build_model` takes them."""
    model, report = build_model(args, weights, classes, models, drop_path_rate=args.drop_path)
    if report and "head.weight" in report.missing:
        trunc_normal_(model.head.weight, std=2e-5)
    model.set_grad_checkpointing(args.grad_checkpointing)
    model.to(device)
    criterion, mixup = build_criterion(args, len(classes))
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=True) if args.model_ema else None
    return Trainee(model, model, build_optimizer(args, model), criterion, mixup, ema, report)


def build_probe(
    args: argparse.Namespace,
    device: torch.device,
    weights: Weights | None,
    classes: Sequence[str],
) -> Trainee:
    """A linear probe of a frozen encoder (MAE, appendix A); arguments as `build_model` takes them.

    Batch norm without affine stands before the head.
    """
    model, report = build_model(args, weights and weights.without("head"), classes)
    model.requires_grad_(False)  # so nothing of the encoder is kept for a backward pass
    trunc_normal_(model.head.weight, std=0.01)
    model.head.requires_grad_(True)
    model.add_probe_norm(SyncedBatchNorm1d)
    model.to(device)
    optimizer = LARS(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    return Trainee(model, model.head, optimizer, nn.CrossEntropyLoss(), report=report)


def build_model(
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
        kwargs |= {"img_size": architecture.img_size, "num_heads": architecture.num_heads}
        return convvit_from_weights(weights, **kwargs)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error


def mixes(args: argparse.Namespace) -> bool:
    """True if the images of a batch are mixed."""
    return (args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)) and args.mixup_prob > 0


def check_mixing(args: argparse.Namespace) -> None:
    """Refuse settings of mixup and cutmix that timm cannot do, before anything is built.

    Raises:
        UsageError: an odd batch, or rectangles without a choice of size.
    """
    if not mixes(args):
        return
    count, what = str(args.batch_size), "images"
    if "repeats" in args:  # each clip of a batch comes so often
        count, what = f"{count} x --repeats {args.repeats}", "clips"
    if args.batch_size * getattr(args, "repeats", 1) % 2:
        raise UsageError(
            f"--batch_size {count} must be even, as mixup pairs {what}; or give "
            f"--mixup 0 --cutmix 0"
        )
    low, high = args.cutmix_minmax or (0, 1)
    if not all(int(side * low) < int(side * high) for side in args.input_size):
        raise UsageError(
            f"--cutmix_minmax {low:g} {high:g}: the smaller share comes first, and of "
            f"{args.input_size[0]}x{args.input_size[1]} pixels they must be different numbers"
        )


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """The loss of a recipe, and timm's Mixup if the recipe mixes images."""
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
