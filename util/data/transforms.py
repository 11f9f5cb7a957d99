"""From a picture to the model's input: augmentation, evaluation views, normalisation."""

import os
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data import auto_augment as timm_policies
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from util.data.crop import Box, clamped_box, load_crop, random_box
from util.data.images import MAX_PIXELS, check_channels, load_image

# Mean and standard deviation of each channel, for values in [0, 1].
Stats = tuple[tuple[float, ...], tuple[float, ...]]
# Evaluation resizes no more of a strip than so many squares of it.
LONGEST = 32


def posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """Timm's operation; its policies draw 0 bits too, which Pillow refuses from release 13 on."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return timm_policies.posterize(image, bits_to_keep, **options)


timm_policies.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing"), posterize))


def channel_stats(
    in_chans: int, known: Stats = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
) -> Stats:
    """Mean and standard deviation of each channel, for values in [0, 1].

    Args:
        in_chans: 1 (gray), 3 (RGB) or 4 (RGB and alpha).
        known: those of such pictures with other channels, by default ImageNet's. Gray is the mean
            of the colours, a colour is gray, and alpha has 0.5.

    Raises:
        UsageError: another number of channels.
    """
    check_channels(in_chans)
    mean, std = (_of_channels(values, in_chans) for values in known)
    return mean, std


def _of_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Numbers of gray, RGB or RGBA for as many channels, see `channel_stats`."""
    colours, alpha = tuple(values[:3]), tuple(values[3:]) or (0.5,)
    if in_chans == 1:
        return (sum(colours) / len(colours),)
    return colours * (3 // len(colours)) + alpha[: in_chans - 3]


def pretrain_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.2, 1.0),
    max_pixels: int = MAX_PIXELS,
) -> Callable[[BinaryIO], Tensor]:
    """The augmentation of pretraining: random resized crop and flip.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        hflip: mirror every second image; not for digits, letters or the like.
        scale: share of the image's area that a crop takes.
        max_pixels: a larger image is not decoded.

    Returns:
        Image file to `[in_chans, H, W]`, uint8, for `normalize`.
    """
    choose = partial(random_box, scale=scale)
    return _crop_transform(choose, img_size, in_chans, hflip, max_pixels)


def probe_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    max_pixels: int = MAX_PIXELS,
) -> Callable[[BinaryIO], Tensor]:
    """The augmentation of the linear probe: as in pretraining, but with MAE's `clamped_box`.

    Arguments and result are those of `pretrain_transform`.
    """
    choose = partial(clamped_box, scale=scale)
    return _crop_transform(choose, img_size, in_chans, hflip, max_pixels)


def _crop_transform(
    choose: Callable[[Image.Image], Box],
    img_size: tuple[int, int],
    in_chans: int,
    hflip: bool,
    max_pixels: int,
) -> Callable[[BinaryIO], Tensor]:
    """A random part of an image, resized and maybe mirrored."""
    check_channels(in_chans)
    crop = partial(
        load_crop, choose=choose, size=img_size, in_chans=in_chans, max_pixels=max_pixels
    )
    return partial(_crop_and_flip, crop=crop) if hflip else crop


def _crop_and_flip(file: BinaryIO, crop: Callable[[BinaryIO], Tensor]) -> Tensor:
    image = crop(file)
    return image.flip(-1) if random.random() < 0.5 else image


def finetune_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.0,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    max_pixels: int = MAX_PIXELS,
    stats: Stats | None = None,
) -> Callable[[BinaryIO], Tensor]:
    """The augmentation of fine-tuning, timm's: random resized crop, flip, RandAugment, erasing.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        hflip: mirror every second image.
        scale: share of the image's area that a crop takes.
        auto_augment: timm's name of a policy, or None.
        color_jitter: strength of the colour jitter that takes the policy's place if there is none.
        reprob: share of the images in which rectangles are erased.
        remode: timm's name of their fill: pixel (noise), rand (a random colour), const (the mean).
        recount: the most rectangles of an image.
        max_pixels: a larger image is not decoded.
        stats: to normalise by; ImageNet's by default.

    Returns:
        Image file to `[in_chans, H, W]`, float32, normalised.
    """
    mean, _ = stats or channel_stats(in_chans)
    _, augment, _ = create_transform(
        (in_chans, *img_size),
        is_training=True,
        separate=True,  # what comes before and after is done here, on 8-bit pixels
        color_jitter=color_jitter or None,
        auto_augment=auto_augment,
        interpolation="bicubic",
        mean=mean,
    )
    crop = dict(hflip=hflip, scale=scale, max_pixels=max_pixels)
    view = pretrain_transform(img_size, in_chans, **crop)
    changed = [to_image, augment, to_pixels] if augment.transforms else []
    parts = [view, *changed, partial(normalize, stats=stats)]
    if reprob > 0:
        parts.append(RandomErasing(reprob, mode=remode, max_count=recount, device="cpu"))
    return v2.Compose(parts)


def center_crop_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    stats: Stats | None = None,
) -> Callable[[BinaryIO], Tensor]:
    """The view by which a classifier is evaluated, as MAE's: 224 of 256 pixels around the centre.

    Above 224 pixels nothing is cut but what the proportions demand. Of an image more than
    `LONGEST` times as long as wide only the middle is resized.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        max_pixels: a larger image is not decoded.
        stats: to normalise by; ImageNet's by default.

    Returns:
        Image file to `[in_chans, H, W]`, float32, normalised.
    """
    mean, std = stats or channel_stats(in_chans)
    transform = create_transform(
        (in_chans, *img_size),
        interpolation="bicubic",
        crop_pct=center_share(img_size),
        mean=mean,
        std=std,
    )
    load = partial(load_image, in_chans=in_chans, max_pixels=max_pixels)
    return v2.Compose([load, cut_ends, transform])


def center_share(img_size: tuple[int, int]) -> float:
    """Share of a picture's sides that a classifier is evaluated on, for an input of (H, W)."""
    return 224 / 256 if max(img_size) <= 224 else 1.0


def cut_ends(image: Image.Image) -> Image.Image:
    """The middle of an image more than `LONGEST` times as long as wide; another as it is.

    Whole, such a strip would be enlarged to hundreds of megabytes, of which a view takes the
    middle. Both ends lose the same, so the view stays where it was, to a pixel of it.
    """
    short, long = sorted(image.size)
    keep = LONGEST * short - (LONGEST * short - long) % 2  # leaves an equal number on both sides
    if long <= keep:
        return image
    start = (long - keep) // 2
    wide = image.width == long
    return image.crop((start, 0, start + keep, short) if wide else (0, start, short, start + keep))


def eval_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    stats: Stats | None = None,
) -> Callable[[str | os.PathLike | BinaryIO], Tensor]:
    """The largest centred part of the proportions H : W, resized to (H, W) and normalised.

    Returns:
        Image file to `[in_chans, H, W]`, float32.
    """
    height, width = img_size
    return v2.Compose(
        [
            partial(load_image, in_chans=in_chans, max_pixels=max_pixels),
            partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BICUBIC),
            to_pixels,
            partial(normalize, stats=stats),
        ]
    )


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of pixels `[C, H, W]`, uint8; thrice as fast as torchvision's."""
    bands = [Image.fromarray(channel.numpy()) for channel in pixels]
    return Image.merge(check_channels(len(bands)), bands)


def to_pixels(image: Image.Image) -> Tensor:
    """The pixels of a picture of 8 bits, `[C, H, W]`, uint8, contiguous."""
    array = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).movedim(-1, 0).contiguous()


def normalize(images: Tensor, dim: int = -3, stats: Stats | None = None) -> Tensor:
    """Pixels, uint8, to the model's input, float32; other types are that already.

    A batch takes a quarter of the memory on its way to the device if it is normalised there.

    Args:
        images: `[…, C, H, W]`, or with the channels in another dimension.
        dim: the channels'.
        stats: to normalise by; ImageNet's by default.

    Returns:
        The same shape.
    """
    if images.dtype != torch.uint8:
        return images
    behind = images.ndim - 1 - dim % images.ndim
    stats = stats or channel_stats(images.shape[dim])
    scale, shift = _scale_and_shift(stats, behind, images.device)
    return images.float().mul_(scale).add_(shift)  # twice as fast on a CPU as one operation


@cache
def _scale_and_shift(stats: Stats, behind: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift from a pixel of 0 … 255 to a normalised value, `[C, 1, …]`."""
    mean, std = torch.tensor(stats, device=device).view(2, -1, *[1] * behind)
    return 1 / (255 * std), -mean / std


def denormalize(images: Tensor, dim: int = -3, stats: Stats | None = None) -> Tensor:
    """Undo the normalisation, for viewing: to the same shape within [0, 1].

    Args:
        images: `[…, C, H, W]`, or with the channels in another dimension.
        dim: the channels'.
        stats: by which they were normalised; ImageNet's by default.
    """
    shape = [1] * images.ndim
    shape[dim] = -1
    stats = stats or channel_stats(images.shape[dim])
    mean, std = (images.new_tensor(values).view(shape) for values in stats)
    return (images * std + mean).clamp(0, 1)
