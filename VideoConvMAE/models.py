"""VideoConvMAE: the image classes with (T, H, W) (arXiv 2205.03892, section 3.3).

Cubes of 2×4×4 pixels are embedded; stage 3 has a token for each 2×16×16 pixels. The decoders are
VideoMAE's (arXiv 2203.12602): half as wide as the encoder, 4 blocks (12 in large and huge) with 64
channels a head (80 in huge). The paper has base alone; the other sizes are those of the images.
"""

from collections.abc import Sequence
from pathlib import Path

from timm.models import generate_default_cfgs, register_model

from models_convmae import MaskedAutoencoderConvViT, convmae_from_weights
from models_convvit import ConvViT, create_classifier, pretrained_cfg
from util.layers.architecture import SIZES, Architecture
from util.layers.geometry import Geometry
from util.weights.read import Weights, read_weights

_GEOMETRY = Architecture().with_time().geometry  # 16 frames of 224 x 224 pixels
VIDEO = dict(img_size=_GEOMETRY.img_size, patch_size=_GEOMETRY.patch_size)
DECODER = dict(decoder_embed_dim=384, decoder_depth=4, decoder_num_heads=6)
LARGE_DECODER = dict(decoder_embed_dim=512, decoder_depth=12, decoder_num_heads=8)
HUGE_DECODER = dict(decoder_embed_dim=640, decoder_depth=12, decoder_num_heads=8)
SMALL_DECODER = dict(decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
TINY_DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
MASKINGS = ("tube", "random")
# timm knows channels, height and width of an input, but no frames.
default_cfgs = generate_default_cfgs(
    {f"videoconvvit_{size}_patch16": pretrained_cfg() for size in SIZES}
)


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


def videoconvmae_large_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-L; `kwargs` as the tiny model takes them."""
    return _autoencoder(**{"multi_scale": False, **SIZES["large"], **LARGE_DECODER, **kwargs})


def videoconvmae_huge_patch16(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-H; `kwargs` as the tiny model takes them."""
    return _autoencoder(**{"multi_scale": False, **SIZES["huge"], **HUGE_DECODER, **kwargs})


def videoconvmae_tiny_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """The tiny model with the multi-scale decoder."""
    return videoconvmae_tiny_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_small_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-S with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_small_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_base_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-B with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_base_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_large_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-L with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_large_patch16(**{"multi_scale": True, **kwargs})


def videoconvmae_huge_patch16_msd(**kwargs) -> MaskedAutoencoderConvViT:
    """VideoConvMAE-H with the multi-scale decoder: stages 1 and 2 fused into stage 3."""
    return videoconvmae_huge_patch16(**{"multi_scale": True, **kwargs})


def _classifier(size: str, pretrained: bool, kwargs: dict) -> ConvViT:
    sizes = {**VIDEO, **SIZES[size]}
    return create_classifier(f"videoconvvit_{size}_patch16", pretrained, sizes, kwargs)


@register_model
def videoconvvit_tiny_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """The tiny model's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return _classifier("tiny", pretrained, kwargs)


@register_model
def videoconvvit_small_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """VideoConvMAE-S's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return _classifier("small", pretrained, kwargs)


@register_model
def videoconvvit_base_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """VideoConvMAE-B's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return _classifier("base", pretrained, kwargs)


@register_model
def videoconvvit_large_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """VideoConvMAE-L's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return _classifier("large", pretrained, kwargs)


@register_model
def videoconvvit_huge_patch16(pretrained: bool = False, **kwargs) -> ConvViT:
    """VideoConvMAE-H's encoder as a classifier. `kwargs` override any argument of `ConvViT`."""
    return _classifier("huge", pretrained, kwargs)


# Model name to factory, for command lines and checkpoints.
MODELS = {
    "videoconvmae_tiny_patch16": videoconvmae_tiny_patch16,
    "videoconvmae_small_patch16": videoconvmae_small_patch16,
    "videoconvmae_base_patch16": videoconvmae_base_patch16,
    "videoconvmae_large_patch16": videoconvmae_large_patch16,
    "videoconvmae_huge_patch16": videoconvmae_huge_patch16,
    "videoconvmae_tiny_patch16_msd": videoconvmae_tiny_patch16_msd,
    "videoconvmae_small_patch16_msd": videoconvmae_small_patch16_msd,
    "videoconvmae_base_patch16_msd": videoconvmae_base_patch16_msd,
    "videoconvmae_large_patch16_msd": videoconvmae_large_patch16_msd,
    "videoconvmae_huge_patch16_msd": videoconvmae_huge_patch16_msd,
}
CLASSIFIERS = {
    "videoconvvit_tiny_patch16": videoconvvit_tiny_patch16,
    "videoconvvit_small_patch16": videoconvvit_small_patch16,
    "videoconvvit_base_patch16": videoconvvit_base_patch16,
    "videoconvvit_large_patch16": videoconvvit_large_patch16,
    "videoconvvit_huge_patch16": videoconvvit_huge_patch16,
}


def videoconvmae_from_weights(weights: Weights) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining on videos, see `convmae_from_weights`."""
    return convmae_from_weights(weights, MODELS, ndim=3)


def videoconvmae_from_checkpoint(path: str | Path) -> MaskedAutoencoderConvViT:
    """The masked autoencoder of a pretraining on videos, with its weights."""
    return videoconvmae_from_weights(read_weights(path))
