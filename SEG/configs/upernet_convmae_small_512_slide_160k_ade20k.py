"""UperNet on ConvMAE-S, ADE20K: the recipe of base with the encoder's and the heads' widths."""

_base_ = ["upernet_convmae_base_512_slide_160k_ade20k.py"]

model = dict(
    backbone=dict(embed_dim=(128, 256, 384), num_heads=6),
    decode_head=dict(in_channels=[128, 256, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
