"""UperNet on the demo's tiny ConvMAE, scenes of handwritten digits: minutes on a CPU."""

_base_ = [
    "_base_/upernet_convmae.py",
    "_base_/ade20k.py",
    "_base_/schedule_160k.py",
    "_base_/runtime.py",
]

# The crop of the pretraining, so that positions mean what they meant there; scenes are made smaller
# for a digit to fit in.
crop_size = (32, 32)
resize = 0.65
iterations = 600

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=crop_size,
        patch_size=(2, 2, 1),
        embed_dim=(32, 64, 128),
        depth=(1, 1, 4),
        num_heads=2,
        drop_path_rate=0.0,
        pretrained="output/demo/pretrain/checkpoint.pth",
    ),
    decode_head=dict(
        in_channels=[64, 128, 128],
        in_index=[1, 2, 3],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
    ),
    auxiliary_head=dict(in_channels=128, channels=32, dropout_ratio=0.0, num_classes=11),
    test_cfg=dict(crop_size=crop_size, stride=(16, 16)),
)

train_pipeline = [
    dict(type="LoadPicture", skip_bad=True),
    dict(type="LoadMask"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="Resize", scale_factor=resize * factor, keep_ratio=True)]
            for factor in (0.8, 0.9, 1.0, 1.1, 1.2)
        ],
    ),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadPicture"),
    dict(type="Resize", scale_factor=resize, keep_ratio=True),
    dict(type="LoadMask"),
    dict(type="PackSegInputs"),
]
dataset = dict(
    data_root="output/demo/scenes",
    classes=[*"0123456789", "background"],
)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-2), paramwise_cfg=dict(layer_decay=0.25))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
auto_scale_lr = dict(base_batch_size=32)  # what the learning rate is for
default_hooks = dict(checkpoint=dict(interval=200))
