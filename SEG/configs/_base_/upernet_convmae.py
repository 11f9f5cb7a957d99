"""UperNet on ConvMAE-B, with an auxiliary FCN head on stage 3."""

norm_cfg = dict(type="SyncBN", requires_grad=True)
loss = dict(type="CrossEntropyLoss", use_sigmoid=False)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="ConvMAE",
        embed_dim=(256, 384, 768),
        depth=(2, 2, 11),
        num_heads=12,
        mlp_ratio=(4, 4, 4),
        drop_path_rate=0.2,
        norm_cfg=norm_cfg,
        with_cp=False,
        pretrained="output/pretrain/checkpoint.pth",
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[256, 384, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(**loss, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(**loss, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide"),
)
