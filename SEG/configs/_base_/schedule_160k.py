"""160,000 iterations of AdamW with layer-wise decay: 1,500 of warm-up, then linearly to 0."""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.75),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=16_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
