"""The learning rate: linear warm-up, then half a cosine (the MAE and ConvMAE schedule)."""

import math

from torch.optim import Optimizer


def adjust_learning_rate(
    optimizer: Optimizer,
    epoch: float,
    *,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
) -> float:
    """Set each group's rate for a fractional epoch, times the group's `lr_scale` if it has one.

    Args:
        optimizer: its groups' "lr" is set.
        epoch: epochs done so far, a fraction within an epoch.
        lr: the peak, reached after the warm-up.
        min_lr: the floor of the cosine.
        warmup_epochs: length of the linear rise from 0.
        epochs: length of the run.

    Returns:
        The rate before `lr_scale`.
    """
    if epoch < warmup_epochs:
        rate = lr * epoch / warmup_epochs
    else:
        progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        rate = min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate
