"""The large model with the base model's recipe, its global blocks as evenly spread."""

from util.layers.architecture import SIZES

from .convmae_base_mask_rcnn_FPN_25ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.update(SIZES["large"], global_blocks=[0, 7, 14, 22])
