"""UperNet on ConvMAE-L, ADE20K: the recipe of base with the encoder's and the heads' widths."""

_base_ = ["upernet_convmae_base_512_slide_160k_ade20k.py"]

model = dict(
    backbone=dict(embed_dim=(384, 768, 1024), depth=(2, 2, 23), num_heads=16, mlp_ratio=(8, 8, 4)),
    decode_head=dict(in_channels=[384, 768, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
