"""The large model with the base model's ViTDet-style recipe, its global blocks as evenly spread."""

from util.layers.architecture import SIZES

from .mask_rcnn_vitdet_convmae_b_25ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.net.update(SIZES["large"], global_blocks=[4, 10, 16, 22])
