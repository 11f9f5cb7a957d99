"""UperNet on ConvMAE-B, ADE20K: the published recipe."""

_base_ = [
    "_base_/upernet_convmae.py",
    "_base_/ade20k.py",
    "_base_/schedule_160k.py",
    "_base_/runtime.py",
]

crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    test_cfg=dict(crop_size=crop_size, stride=(341, 341)),
)
