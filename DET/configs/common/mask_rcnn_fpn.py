"""Mask R-CNN on ConvViTDet and an FPN, as the published repository builds it."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from DET.backbone import ConvViTDet
from util.layers.architecture import SIZES

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
_constants = model_zoo.get_config("common/data/constants.py").constants
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
# Images are padded to the size that the position tables are made for.
model.backbone.square_pad = "${data.image_size}"

model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = "SyncBN"
model.roi_heads.mask_head.conv_norm = "SyncBN"
