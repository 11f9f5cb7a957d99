"""The small model with the base model's recipe."""

from util.layers.architecture import SIZES

from .convmae_base_mask_rcnn_FPN_25ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.update(SIZES["small"])
