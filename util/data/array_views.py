"""From a file of arrays to the model's input: values, random crops, views to evaluate by."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.arrays import Picture, open_picture
from util.data.crop import Box
from util.data.images import MAX_PIXELS

# A resized pixel counts if so much of what it is made of are data.
ENOUGH = 0.5


@dataclass(frozen=True)
class ArrayFormat:
    """The way from the numbers of files to the model's input.

    Attributes:
        in_chans: channels of the input.
        bands: channels of the file to take in this order, counted from 1; None for all.
        layout: "hwc" or "chw" where shapes leave it open.
        array_key: of the array in a `.npz`.
        nodata: the number that stands for no data, beside NaN, infinity and a file's own.
        clip_min, clip_max: of each channel; what lies beyond is set to them.
        mean, std: of each channel, after clipping.
        max_pixels: a larger picture is refused.
    """

    in_chans: int
    bands: tuple[int, ...] | None = None
    layout: str | None = None
    array_key: str | None = None
    nodata: float | None = None
    clip_min: tuple[float, ...] | None = None
    clip_max: tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, values: dict[str, object]) -> "ArrayFormat":
        """The format that flags of these names describe."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in known.items()})

    def open(self, file: BinaryIO) -> Picture:
        """The picture in a file; raises as `open_picture`."""
        return open_picture(
            file,
            self.in_chans,
            bands=self.bands,
            layout=self.layout,
            array_key=self.array_key,
            max_pixels=self.max_pixels,
        )

    def read(self, picture: Picture, box: Box) -> Tensor:
        """A part of a picture `[in_chans, height, width]`, clipped; NaN where there are no data.

        Infinity and what is beyond the range of float32 are none either.

        Raises:
            OSError: the file ends before it.
        """
        numbers = picture.read(box, self.bands)
        # Numbers that float32 cannot hold become it when they are normalised.
        exact = np.can_cast(numbers.dtype, np.float32)
        part = numbers.astype(np.float32 if exact else np.float64)
        with np.errstate(over="ignore"):  # float32 has no such number: none is equal
            for nodata in {self.nodata, picture.nodata} - {None}:
                part[part == nodata] = np.nan
        part = torch.from_numpy(part)
        part[~(part.abs() <= torch.finfo(torch.float32).max)] = torch.nan
        if self.clip_min is not None or self.clip_max is not None:
            bounds = (self.clip_min, self.clip_max)
            low, high = (b and part.new_tensor(b).view(-1, 1, 1) for b in bounds)
            part = part.clamp(low, high)
        return part

    def normalize(self, part: Tensor) -> Tensor:
        """Numbers `[in_chans, …]` to mean 0 and standard deviation 1 of each channel, float32."""
        shape = (-1,) + (1,) * (part.ndim - 1)
        mean, std = (part.new_tensor(values).view(shape) for values in (self.mean, self.std))
        return ((part - mean) / std).float()


def resize(part: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised numbers `[C, H, W]` to `[C, *size]` by antialiased bicubic.

    NaN stands for no data. A pixel of which these are a part is the mean of its data, weighted as
    by bilinear interpolation, and NaN if less than `ENOUGH` of it is data.
    """
    scale = partial(F.interpolate, size=size, antialias=True)
    valid = ~part.isnan()
    filled = part.nan_to_num(0.0)
    resized = scale(filled[None], mode="bicubic")[0]
    if valid.all():
        return resized
    share, reach = (scale(valid.float()[None], mode=mode)[0] for mode in ("bilinear", "bicubic"))
    mean = scale(filled[None], mode="bilinear")[0] / share.clamp(min=1e-6)
    # The wider bicubic kernel meets no data where its weights of data do not sum to 1.
    resized = torch.where((share < 1 - 1e-4) | ((reach - 1).abs() > 1e-4), mean, resized)
    return resized.masked_fill(share < ENOUGH, torch.nan)


def array_transform(
    form: ArrayFormat,
    size: tuple[int, int],
    choose: Callable[[Picture], Box],
    *,
    hflip: bool = False,
    rot90: bool = False,
    keep_nodata: bool = False,
) -> Callable[[BinaryIO], Tensor]:
    """A part of each picture, resized, turned and normalised.

    Args:
        form: of the files.
        size: (H, W) of the result; a square with `rot90`.
        choose: from a picture to the part of it.
        hflip: mirror every second picture.
        rot90: turn by 0, 90, 180 or 270 degrees, each as often.
        keep_nodata: leave NaN where there are no data, for a loss without them; otherwise they
            become the channel's mean, 0.

    Returns:
        Open file to `[in_chans, H, W]`, float32.
    """
    return partial(
        _view,
        form=form,
        size=size,
        choose=choose,
        hflip=hflip,
        rot90=rot90,
        keep_nodata=keep_nodata,
    )


def _view(
    file: BinaryIO,
    form: ArrayFormat,
    size: tuple[int, int],
    choose: Callable[[Picture], Box],
    hflip: bool,
    rot90: bool,
    keep_nodata: bool,
) -> Tensor:
    picture = form.open(file)
    part = resize(form.normalize(form.read(picture, choose(picture))), size)
    if hflip and random.random() < 0.5:
        part = part.flip(-1)
    if rot90:
        part = part.rot90(random.randrange(4), (-2, -1))
    return part.contiguous() if keep_nodata else part.nan_to_num(0.0).contiguous()


def split_nodata(imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with NaN for no data as inputs with 0, the channel's mean, and where data are.

    Args:
        imgs: `[N, C, …]`, normalised.

    Returns:
        Both of that shape, the second bool.
    """
    return imgs.nan_to_num(0.0), ~imgs.isnan()


def centre_box(picture: Picture, proportions: tuple[int, int], share: float = 1.0) -> Box:
    """The largest part around the centre of a picture that has such proportions.

    Args:
        picture: only its size is read.
        proportions: height and width.
        share: of its sides to keep, as in MAE's 224 of 256 pixels.
    """
    width, height = picture.size
    scale = share * min(height / proportions[0], width / proportions[1])
    h, w = (max(1, round(side * scale)) for side in proportions)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def centre_transform(
    form: ArrayFormat, size: tuple[int, int], share: float = 1.0, *, keep_nodata: bool = False
) -> Callable[[BinaryIO], Tensor]:
    """The view by which a classifier is evaluated, or a picture looked at; see `centre_box`."""
    choose = partial(centre_box, proportions=size, share=share)
    return array_transform(form, size, choose, keep_nodata=keep_nodata)
