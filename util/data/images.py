"""Image files to pictures: what a viewer shows for a file, upright, 8 bits a channel."""

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import UsageError

IMAGE_EXTENSIONS = IMG_EXTENSIONS
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A picture of 100 megapixels is large, not an attack; twice Pillow's limit is still an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(file: str | os.PathLike | BinaryIO, in_chans: int = 3) -> Image.Image:
    """The picture that a viewer shows for a file, upright and with 8 bits a channel.

    Transparency is composited over white, as viewers and browsers show it on their page, unless
    the alpha channel is asked for.

    Args:
        file: an image file, by its path or open.
        in_chans: 1 for grayscale, 3 for RGB, 4 for RGB with alpha.

    Raises:
        UsageError: another number of channels.
        OSError: a file that cannot be read or decoded, whatever the reason.
    """
    mode = check_channels(in_chans)
    try:
        with Image.open(file) as image:
            image.load()
            return _upright(_to_8_bit(image, mode), orientation(image))
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        path = file if isinstance(file, str | os.PathLike) else file.name
        raise OSError(f"{path} cannot be decoded: {error}") from error


def check_channels(in_chans: int) -> str:
    """Pillow's mode for a number of channels.

    Raises:
        UsageError: another number than 1, 3 or 4.
    """
    if in_chans not in _MODES:
        raise UsageError(
            f"images of {in_chans} channels are not supported: "
            f"use 1 (grayscale), 3 (RGB) or 4 (RGB and alpha)"
        )
    return _MODES[in_chans]


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """Any image to one of the modes in `_MODES`."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _narrow(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _narrow(image: Image.Image) -> Image.Image:
    """Grayscale of 16 or 32 bits to "L"; Pillow's own conversion would clip at 255.

    16-bit values keep their upper byte, as Pillow does it for 16-bit colour. Values that are not
    of 16 bits have no agreed range, so the darkest becomes black and the brightest white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        values = (values - low) * (65535 / ((high - low) or 1))
    return Image.fromarray((values // 256).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """How the metadata of an image say that it is stored: 1 for upright, else 2 … 8 (EXIF)."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged metadata raise anything, and do not spoil the picture.
        return 1


def _upright(image: Image.Image, stored: int) -> Image.Image:
    """Turn and mirror an image so that it is upright."""
    return image.transpose(_TRANSPOSE[stored]) if stored in _TRANSPOSE else image
