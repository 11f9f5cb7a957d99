"""Mask R-CNN on ConvViTDet and an FPN, as the published repository builds it."""

from detectron2.config import LazyCall as L

from DET.backbone import ConvViTDet
from DET.config import detectron2_config
from DET.rcnn import MaskHead, SquareRCNN
from util.layers.architecture import SIZES

model = detectron2_config("common/models/mask_rcnn_fpn.py").model
model._target_ = SquareRCNN  # data.py pads the images
_constants = detectron2_config("common/data/constants.py").constants
model.pixel_mean = _constants.imagenet_rgb256_mean
model.pixel_std = _constants.imagenet_rgb256_std
model.input_format = "RGB"

model.backbone.bottom_up = L(ConvViTDet)(
    **SIZES["base"],
    img_size="${data.image_size}",
    window_size=16,
    global_blocks=[0, 3, 6, 10],
    drop_path_rate=0.1,
    use_act_checkpoint=False,  # true: less memory, more time
)
model.backbone.in_features = ["s0", "s1", "s2", "s3"]
model.backbone.norm = "SyncBN"

model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
# SyncBN as well, but one that takes a batch without objects.
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "naiveSyncBN_N"
model.roi_heads.mask_head._target_ = MaskHead
