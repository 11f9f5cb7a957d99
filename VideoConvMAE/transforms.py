"""From decoded frames to a model's clip: one crop, one flip, one augmentation for all frames."""

import random
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.datasets import seeded
from util.data.transforms import Stats, normalize
from util.errors import UsageError

# Sides of the crops of VideoMAE's pretraining, as shares of the shorter side of the video.
CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
# Their places: corners, centre and edges' middles, and the quarters between.
_PLACES = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
Transform = Callable[[np.ndarray], Tensor]


def pretrain_transform(
    size: tuple[int, int], *, scales: Sequence[float] = CROP_SCALES, hflip: bool = False
) -> Transform:
    """The augmentation of pretraining, VideoMAE's: multi-scale crop, and flip if wanted.

    Args:
        size: (H, W) of the clip.
        scales: sides of the crops, in descending order.
        hflip: mirror every second clip.

    Returns:
        Frames `[T, H, W, C]`, uint8, to a clip `[C, T, *size]`, uint8, for `normalize`.
    """

    def transform(frames: np.ndarray) -> Tensor:
        frames = multi_scale_crop(to_tensor(frames), size, scales)
        return as_clip(random_flip(frames) if hflip else frames)

    return transform


def finetune_transform(
    size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    auto_augment: str | None = "rand-m7-n4-mstd0.5-inc1",
    color_jitter: float = 0.0,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    stats: Stats | None = None,
) -> Transform:
    """The augmentation of fine-tuning: RandAugment, random resized crop, flip, erasing.

    The order is VideoMAE's: RandAugment sees the whole frames, and what it moves in from outside
    of them is gray (128), timm's own fill.

    Args:
        size: (H, W) of the clip.
        in_chans: 1 or 3.
        hflip: mirror every second clip; not where left and right mean something.
        scale: share of the frame's area that the crop takes.
        auto_augment: timm's name of a RandAugment policy, or None.
        color_jitter: strength of the colour jitter that takes the policy's place if there is none.
        reprob: share of the clips in which rectangles are erased, the same in all frames.
        remode: timm's name of their fill: pixel (noise), rand (a random colour), const (the mean).
        recount: the most rectangles of a clip.
        stats: to normalise by; ImageNet's by default.

    Returns:
        Frames `[T, H, W, C]`, uint8, to a clip `[C, T, *size]`, float32.

    Raises:
        UsageError: no such policy.
    """
    crop = v2.RandomResizedCrop(size, scale=scale, antialias=True)  # bilinear
    augment = v2.ColorJitter(*[color_jitter] * 3)
    if auto_augment:
        augment = partial(alike, augment=rand_augment(auto_augment, size, in_chans))
    erase = RandomErasing(reprob, mode=remode, max_count=recount, device="cpu")

    def transform(frames: np.ndarray) -> Tensor:
        frames = crop(augment(to_tensor(frames)))
        frames = random_flip(frames) if hflip else frames
        clip = normalize(as_clip(frames), 0, stats)
        # The frames as channels of one picture: the rectangle is the same, the noise is not.
        return erase(clip.flatten(0, 1)).view_as(clip)

    return transform


def views_transform(size: tuple[int, int], crops: int = 1, stats: Stats | None = None) -> Transform:
    """The views by which a classifier is tested: crops at equal distances along the longer side.

    Args:
        size: (H, W) of the clip; the frame is resized to just cover it.
        crops: how many; a single one is in the centre.
        stats: to normalise by; ImageNet's by default.

    Returns:
        Frames `[T, H, W, C]`, uint8, to views `[crops, C, T, *size]`, float32.
    """
    places = [i / (crops - 1) for i in range(crops)] if crops > 1 else [0.5]

    def transform(frames: np.ndarray) -> Tensor:
        frames = cover(to_tensor(frames), size)
        spare = [whole - side for whole, side in zip(frames.shape[-2:], size, strict=True)]
        views = [F.crop(frames, *(round(s * place) for s in spare), *size) for place in places]
        return torch.stack([normalize(as_clip(view), 0, stats) for view in views])

    return transform


def to_tensor(frames: np.ndarray) -> Tensor:
    """`[T, H, W, C]` to `[T, C, H, W]`, uint8."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1)


def as_clip(frames: Tensor) -> Tensor:
    """`[T, C, H, W]` to `[C, T, H, W]`, contiguous."""
    return frames.transpose(0, 1).contiguous()


def multi_scale_crop(frames: Tensor, size: tuple[int, int], scales: Sequence[float]) -> Tensor:
    """A crop of random sides at one of 13 places, resized; draws from `random`.

    The sides are those of `scales` times the largest crop of the proportions of `size`, height and
    width not more than one step of them apart.

    Args:
        frames: `[T, C, H, W]`.
        size: (H, W) wanted.
        scales: in descending order.

    Returns:
        `[T, C, *size]`.
    """
    height, width = frames.shape[-2:]
    unit = min(height / size[0], width / size[1])
    steps = range(len(scales))
    i, j = random.choice([(i, j) for i in steps for j in steps if abs(i - j) <= 1])
    h, w = round(size[0] * unit * scales[i]), round(size[1] * unit * scales[j])
    row, column = random.choice(_PLACES)
    top, left = (height - h) * row // 4, (width - w) * column // 4
    return F.resized_crop(frames, top, left, max(h, 1), max(w, 1), list(size), antialias=True)


def random_flip(frames: Tensor) -> Tensor:
    """Mirror all frames, or none; draws from `random`."""
    return frames.flip(-1) if random.random() < 0.5 else frames


def rand_augment(policy: str, size: tuple[int, int], in_chans: int) -> Callable:
    """A RandAugment of timm's, from a PIL image to one.

    Raises:
        UsageError: no such policy.
    """
    hparams = {"translate_const": int(min(size) * 0.45), "img_mean": (128,) * in_chans}
    try:
        if policy.split("-")[0] != "rand":
            raise ValueError("no RandAugment")
        return rand_augment_transform(policy, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"--aa {policy} is no RandAugment policy of timm's, such as rand-m7-n4-mstd0.5-inc1"
        ) from error


def alike(frames: Tensor, augment: Callable) -> Tensor:
    """Augment all frames in the same way: the same random numbers for each."""
    seed = random.getrandbits(32)
    pictures = []
    for frame in frames:
        with seeded(seed):
            pictures.append(F.pil_to_tensor(augment(F.to_pil_image(frame))))
    return torch.stack(pictures)


def cover(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames, keeping their proportions, until they just cover `size`."""
    height, width = frames.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    whole = [max(round(height * scale), size[0]), max(round(width * scale), size[1])]
    return F.resize(frames, whole, antialias=True)
