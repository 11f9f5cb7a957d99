"""Random and fixed crops of image files, resized, with as little decoding as possible.

Decoding JPEGs and resizing is nearly all that an input pipeline does. Both are done here on 8-bit
pixels without a float in between, and a JPEG much larger than what is wanted of it is decoded at
a half, quarter or eighth of its size.
"""

import contextlib
import math
import random
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor

from util.data.images import MAX_PIXELS, load_image, open_image, orientation

# A JPEG is decoded at a reduced size only if that leaves so many pixels for each of the result:
# what the result looks like is then left to bicubic interpolation, as at full size.
REDUCING_GAP = 2.0

# Channels to the colour space to decode to, and the kinds of JPEG for which that is no conversion
# other than from gray to RGB.
_JPEG = {1: ("GRAY", ("L",)), 3: ("RGB", ("L", "RGB"))}


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def reduced(self, factor: int) -> "Box":
        """The same part of the image at a `factor`th of its size."""
        top, left = round(self.top / factor), round(self.left / factor)
        bottom = round((self.top + self.height) / factor)
        right = round((self.left + self.width) / factor)
        return Box(top, left, bottom - top, right - left)


def random_box(
    image: Image.Image,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a part of an image as torchvision's `RandomResizedCrop` does, from `random`.

    Its own draws are small tensors, which take longer than all else here but the decoding.

    Args:
        image: only its size matters.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height, drawn by their logarithm.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(random.randint(0, height - h), random.randint(0, width - w), h, w)
    # The middle of an image that is too long or too high.
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def clamped_box(
    image: Image.Image,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a part of an image by MAE's rule for the linear probe, from `random`.

    Area and proportions are drawn once, and a side longer than the image is cut to it. The parts
    are larger than those of `random_box`, which draws again what does not fit.

    Args:
        image: only its size is read.
        scale: smallest and largest share of its area.
        ratio: smallest and largest width over height, drawn by their logarithm.
    """
    width, height = image.size
    area = width * height * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    return Box(random.randint(0, height - h), random.randint(0, width - w), h, w)


def load_crop(
    file: BinaryIO,
    choose: Callable[[Image.Image], Box],
    size: tuple[int, int],
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read a part of the picture that `load_image` gives, resized by antialiased bicubic.

    Args:
        file: an image file.
        choose: from the picture, of which it may look at the size only, to the part of it.
        size: (height, width) of the result.
        in_chans: 1 for grayscale, 3 for RGB, 4 for RGB with alpha.
        max_pixels: a larger image is not decoded.

    Returns:
        `[in_chans, *size]`, uint8.

    Raises:
        OSError: a file that cannot be decoded.
    """
    other = None  # the header of what is no plain JPEG, to be decoded without opening it again
    # Whatever may be wrong with it, `load_image` knows what to do, or to say.
    with contextlib.suppress(Exception):
        header = open_image(file, max_pixels)
        if _is_plain_jpeg(header, in_chans):
            box = choose(header)
            file.seek(0)
            return _crop_jpeg(file.read(), header.size, box, size, in_chans)
        other = header
    if other is None:
        file.seek(0)
    image = load_image(file, in_chans, max_pixels, other)
    pixels = np.array(image).reshape(image.height, image.width, in_chans)
    return resize_crop(pixels, choose(image), size)


def _is_plain_jpeg(image: Image.Image, in_chans: int) -> bool:
    """True for an upright JPEG that is gray or RGB as wanted."""
    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and in_chans in _JPEG
        and image.mode in _JPEG[in_chans][1]
        and orientation(image) == 1
    )


def _crop_jpeg(
    data: bytes, image_size: tuple[int, int], box: Box, size: tuple[int, int], in_chans: int
) -> Tensor:
    """`load_crop` of the data of a plain JPEG of `image_size` (width, height)."""
    room = min(box.height / size[0], box.width / size[1]) / REDUCING_GAP
    factor = max(f for f in (1, 2, 4, 8) if f <= max(room, 1))
    width, height = (-(-pixels // factor) for pixels in image_size)
    pixels = simplejpeg.decode_jpeg(
        data, _JPEG[in_chans][0], min_height=height, min_width=width, min_factor=factor
    )
    return resize_crop(pixels, box.reduced(factor), size)


def resize_crop(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> Tensor:
    """A part of an image `[H, W, C]`, uint8, resized by antialiased bicubic to `[C, *size]`."""
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    grid = torch.from_numpy(part).movedim(-1, 0).unsqueeze(0)
    return F.interpolate(grid, size, mode="bicubic", antialias=True)[0]
