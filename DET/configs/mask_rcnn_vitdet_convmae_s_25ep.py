"""The small model with the base model's ViTDet-style recipe."""

from util.layers.architecture import SIZES

from .mask_rcnn_vitdet_convmae_b_25ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.net.update(SIZES["small"])
