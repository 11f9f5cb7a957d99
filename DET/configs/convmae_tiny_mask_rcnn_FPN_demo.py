"""A tiny Mask R-CNN for the demo's scenes: minutes on a CPU, from the demo's pretrained encoder."""

from util.layers.architecture import SIZES

from .common.data import data, dataloader
from .common.mask_rcnn_fpn import model
from .common.optim import cosine as lr_multiplier
from .common.optim import optimizer
from .common.train import train

_scenes = "output/demo/scenes_coco"
data.train = dict(json=f"{_scenes}/train.json", images=f"{_scenes}/train")
data.val = dict(json=f"{_scenes}/val.json", images=f"{_scenes}/val")
data.image_size = 112

# Digits are not mirrored, and the jitter is small.
data.flip = 0
dataloader.train.mapper.augmentations[0].update(min_scale=0.8, max_scale=1.25)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.evaluator.use_fast_impl = False  # pycocotools itself

# Strides as in the demo's pretrain, 2, 4 and 4; the FPN takes the last stage and its pooling.
model.backbone.bottom_up.update(
    SIZES["tiny"], patch_size=[2, 2, 1], window_size=7, global_blocks=[3], drop_path_rate=0.0
)
model.backbone.update(in_features=["s2", "s3"], out_channels=64, norm="", top_block=None)

model.proposal_generator.in_features = ["p2", "p3"]
model.proposal_generator.head.update(in_channels=64, conv_dims=[-1])
model.proposal_generator.anchor_generator.update(
    sizes=[[16], [32]], aspect_ratios=[1.0, 1.5, 2.5], strides=[4, 8]
)
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=(300, 200), post_nms_topk=(100, 50)
)
model.roi_heads.update(
    batch_size_per_image=48, box_in_features=["p2"], mask_in_features=["p2"], num_classes=10
)
model.roi_heads.box_pooler.scales = model.roi_heads.mask_pooler.scales = (1 / 4,)
model.roi_heads.box_head.update(conv_dims=[], fc_dims=[256], conv_norm="")
model.roi_heads.box_head.input_shape.channels = 64
model.roi_heads.box_predictor.input_shape.channels = 256
model.roi_heads.mask_head.update(conv_dims=[64, 64, 64], conv_norm="")
model.roi_heads.mask_head.input_shape.channels = 64

train.epochs = 5
train.warmup_epochs = 0.5
train.base_batch_size = 8
train.eval_epochs = 5
train.log_period = 25
train.output_dir = "output/demo/det"
train.init_checkpoint = "output/demo/pretrain/checkpoint.pth"
optimizer.lr = 1e-3
