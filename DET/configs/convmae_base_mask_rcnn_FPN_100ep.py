"""The published repository's recipe for 100 epochs."""

from .convmae_base_mask_rcnn_FPN_25ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.epochs = 100
