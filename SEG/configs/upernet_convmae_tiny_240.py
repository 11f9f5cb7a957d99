"""UperNet on a tiny ConvMAE, images 240 pixels high: a few hundred of your own on a CPU.

Give the data by --data-path and --classes, the length by --iterations.
"""

_base_ = ["upernet_convmae_base_512_slide_160k_ade20k.py"]

crop_size = (160, 160)
scale = (480, 240)  # longest and shortest side at most

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=crop_size,
        embed_dim=(32, 64, 128),
        depth=(1, 1, 4),
        num_heads=2,
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 128], channels=64, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=128, channels=32, dropout_ratio=0.0),
    test_cfg=dict(crop_size=crop_size, stride=(106, 106)),
)

train_pipeline = [
    dict(type="LoadPicture", skip_bad=True),
    dict(type="LoadMask"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadPicture"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadMask"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(layer_decay=0.75))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=1000),
]
train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=250))
auto_scale_lr = dict(base_batch_size=8)  # what the learning rate is for
