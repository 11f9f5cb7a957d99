"""Mask R-CNN on one feature map and ViTDet's simple feature pyramid."""

from detectron2.config import LazyCall as L

from DET.backbone import SingleScaleConvViTDet
from DET.config import detectron2_config
from DET.rcnn import MaskHead
from util.layers.architecture import SIZES

model = detectron2_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net = L(SingleScaleConvViTDet)(
    **SIZES["base"],
    img_size="${data.image_size}",
    pretrain_img_size=224,
    window_size=14,
    global_blocks=[1, 4, 7, 10],
    drop_path_rate=0.1,
    use_act_checkpoint=False,  # true: less memory, more time
)
model.backbone.in_feature = "last_feat"
# Images are padded to the size that the position tables are made for.
model.backbone.square_pad = "${data.image_size}"
model.roi_heads.mask_head._target_ = MaskHead
