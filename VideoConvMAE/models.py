"""VideoConvMAE: the image classes with (T, H, W) (arXiv 2205.03892, section 3.3).

Cubes of 2×4×4 pixels are embedded; stage 3 has a token for each 2×16×16 pixels. The decoder is
VideoMAE's (arXiv 2203.12602): half as wide as the encoder, 4 blocks, 64 channels a head.
"""

from collections.abc import Sequence
from pathlib import Path

from models_convmae import MaskedAutoencoderConvViT, convmae_from_weights
from models_convvit import ConvViT
from util.layers.architecture import SIZES, Architecture
from util.layers.geometry import Geometry
from util.weights.read import Weights, read_weights

_GEOMETRY = Architecture().with_time().geometry  # 16 frames of 224 x 224 pixels
VIDEO = dict(img_size=_GEOMETRY.img_size, patch_size=_GEOMETRY.patch_size)
DECODER = dict(decoder_embed_dim=384, decoder_depth=4, decoder_num_heads=6)
SMALL_DECODER = dict(decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
TINY_DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
MASKINGS = ("tube", "random")


def mask_unit(geometry: Geometry, masking: str) -> tuple[int, ...]:
    """The tokens that share their fate: "tube" all of one place, "random" each its own.

    Raises:
        ValueError: another masking.
    """
    if masking not in MASKINGS:
        raise ValueError(f"masking {masking!r} must be one of {', '.join(MASKINGS)}")
    return (geometry.grid(3)[0] if masking == "tube" else 1, 1, 1)


def _autoencoder(
    *,
    img_size: Sequence[int] = VIDEO["img_size"],
    patch_size: Sequence[int | Sequence[int]] = VIDEO["patch_size"],
    masking: str = "tube",
    **kwargs,
) -> MaskedAutoencoderConvViT:
    unit = mask_unit(Geometry.of(img_size, patch_size), masking)
    return MaskedAutoencoderConvViT(
        img_size=img_size, patch_size=patch_size, mask_unit=unit, **kwargs
    )


def videoconvmae_tiny_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """Ours, for the demo and the tests; stage 3 only goes into the decoder.

    `kwargs` override any argument of `MaskedAutoencoderConvViT`; `masking` is "tube" or "random".
    """
    return _autoencoder(**{"multi_scale": False, **SIZES["tiny"], **TINY_DECODER, **kwargs})


def videoconvmae_small_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-S; `kwargs` as the tiny model takes them."""
    return _autoencoder(**{"multi_scale": False, **SIZES["small"], **SMALL_DECODER, **kwargs})


def videoconvmae_base_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-B; `kwargs` as the tiny model takes them."""
    return _autoencoder(**{"multi_scale": False, **SIZES["base"], **DECODER, **kwargs})


def videoconvmae_tiny_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """The tiny model with the multi-scale decoder."""
    return videoconvmae_tiny_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_small_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-S with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_small_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_base_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-B with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_base_patch16(**{"multi_scale": True, **kwargs})


def videoconvvit_tiny_patch16(**kwargs) -> ConvViT:
    """The tiny model's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return ConvViT(**{**VIDEO, **SIZES["tiny"], **kwargs})


def videoconvvit_small_patch16(**kwargs) -> ConvViT:
    """VideoConvMAE-S's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return ConvViT(**{**VIDEO, **SIZES["small"], **kwargs})


def videoconvvit_base_patch16(**kwargs) -> ConvViT:
    """VideoConvMAE-B's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return ConvViT(**{**VIDEO, **SIZES["base"], **kwargs})


# Model name to factory, for command lines and checkpoints.
MODELS = {
    "videoconvmae_tiny_patch16": videoconvmae_tiny_patch16,
    "videoconvmae_small_patch16": videoconvmae_small_patch16,
    "videoconvmae_base_patch16": videoconvmae_base_patch16,
    "videoconvmae_tiny_patch16_msd": videoconvmae_tiny_patch16_msd,
    "videoconvmae_small_patch16_msd": videoconvmae_small_patch16_msd,
    "videoconvmae_base_patch16_msd": videoconvmae_base_patch16_msd,
}
CLASSIFIERS = {
    "videoconvvit_tiny_patch16": videoconvvit_tiny_patch16,
    "videoconvvit_small_patch16": videoconvvit_small_patch16,
    "videoconvvit_base_patch16": videoconvvit_base_patch16,
}


def videoconvmae_from_weights(weights: Weights) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining on videos, see `convmae_from_weights`."""
    return convmae_from_weights(weights, MODELS, ndim=3)


def videoconvmae_from_checkpoint(path: str | Path) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining on videos, with its weights."""
    return videoconvmae_from_weights(read_weights(path))
