"""A tiny Mask R-CNN, images of 320 pixels: a few hundred of your own on a CPU."""

from util.layers.architecture import SIZES

from .common.data import data, dataloader
from .common.mask_rcnn_fpn import model
from .common.optim import cosine as lr_multiplier
from .common.optim import optimizer
from .common.train import train

data.image_size = 320
dataloader.train.mapper.augmentations[0].update(min_scale=0.5, max_scale=1.5)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 1

model.backbone.bottom_up.update(
    SIZES["tiny"], window_size=10, global_blocks=[3], drop_path_rate=0.0
)
model.backbone.update(out_channels=64, norm="")

# Objects are from 1/20 to the whole of the image's side.
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
model.proposal_generator.head.update(in_channels=64, conv_dims=[-1])
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=(500, 300), post_nms_topk=(200, 200)
)
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_head.update(conv_dims=[], fc_dims=[256], conv_norm="")
model.roi_heads.box_head.input_shape.channels = 64
model.roi_heads.box_predictor.input_shape.channels = 256
model.roi_heads.mask_head.update(conv_dims=[64, 64], conv_norm="")
model.roi_heads.mask_head.input_shape.channels = 64

train.base_batch_size = 8
train.warmup_epochs = 1
train.log_period = 25
optimizer.lr = 1e-3
