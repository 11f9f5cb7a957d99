"""From a picture to the model's input: augmentation, evaluation views, normalisation."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import v2

from util.datasets import check_channels


def channel_stats(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for values in [0, 1]: ImageNet's.

    Raises:
        UsageError: a number of channels other than 1, 3 or 4.
    """
    check_channels(in_chans)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if in_chans == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    alpha = (0.5,) * (in_chans - 3)
    return mean + alpha, std + alpha


def pretrain_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.2, 1.0),
) -> Callable[[Image.Image], Tensor]:
    """The augmentation of pretraining and probing: random resized crop and flip, then normalise.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        hflip: mirror every second image; not for digits, letters or the like.
        scale: share of the image's area that a crop takes.

    Returns:
        PIL image to `[in_chans, H, W]`, float32.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(img_size, scale=scale, interpolation=bicubic, antialias=True)
    flip = [v2.RandomHorizontalFlip()] if hflip else []
    return v2.Compose([crop, *flip, *_to_normalized(in_chans)])


def finetune_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.0,
    reprob: float = 0.25,
) -> Callable[[Image.Image], Tensor]:
    """The augmentation of fine-tuning, timm's: random resized crop, flip, RandAugment, erasing.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        hflip: mirror every second image.
        scale: share of the image's area that a crop takes.
        auto_augment: timm's name of a policy, or None.
        color_jitter: strength of the colour jitter that takes the policy's place if there is none.
        reprob: share of the images in which a rectangle is erased with noise.

    Returns:
        PIL image to `[in_chans, H, W]`, float32, normalised.
    """
    mean, std = channel_stats(in_chans)
    return create_transform(
        (in_chans, *img_size),
        is_training=True,
        scale=scale,
        hflip=0.5 if hflip else 0.0,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation="bicubic",
        re_prob=reprob,
        re_mode="pixel",
        mean=mean,
        std=std,
    )


def center_crop_transform(
    img_size: tuple[int, int], in_chans: int = 3
) -> Callable[[Image.Image], Tensor]:
    """The view by which a classifier is evaluated, as MAE's: 224 of 256 pixels around the centre.

    Above 224 pixels nothing is cut but what the proportions demand.

    Returns:
        PIL image to `[in_chans, H, W]`, float32, normalised.
    """
    mean, std = channel_stats(in_chans)
    return create_transform(
        (in_chans, *img_size),
        interpolation="bicubic",
        crop_pct=224 / 256 if max(img_size) <= 224 else 1.0,
        mean=mean,
        std=std,
    )


def eval_transform(img_size: tuple[int, int], in_chans: int = 3) -> Callable[[Image.Image], Tensor]:
    """The largest centred part of the proportions H : W, resized to (H, W) and normalised.

    Returns:
        PIL image to `[in_chans, H, W]`, float32.
    """
    height, width = img_size
    fit = partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BICUBIC)
    return v2.Compose([fit, *_to_normalized(in_chans)])


def _to_normalized(in_chans: int) -> list[torch.nn.Module]:
    """The end of every transform: PIL image to a plain, normalised tensor."""
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*channel_stats(in_chans)),
        v2.ToPureTensor(),
    ]


def denormalize(images: Tensor, dim: int = -3) -> Tensor:
    """Undo the normalisation, for viewing: to the same shape within [0, 1].

    Args:
        images: `[…, C, H, W]`, or with the channels in another dimension.
        dim: the channels'.
    """
    shape = [1] * images.ndim
    shape[dim] = -1
    mean, std = (images.new_tensor(v).view(shape) for v in channel_stats(images.shape[dim]))
    return (images * std + mean).clamp(0, 1)
