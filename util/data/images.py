"""Image files to pictures: what a viewer shows for a file, upright, 8 bits a channel."""

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.files import read_file, reason_of
from util.errors import TrainingError, UsageError

IMAGE_EXTENSIONS = IMG_EXTENSIONS
# Pillow's decoders for these: content of any other kind, whatever the file is called, is none of
# ours, as some decoders start programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
# The largest common cameras have 108 megapixels. A pixel takes up to 10 bytes on its way.
MAX_PIXELS = 120_000_000
# Rows of an image that are converted at a time where a step takes much memory.
_STRIP = 256
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

# Profiles and notes within a PNG are larger than Pillow's 1 MiB at times; they are read over.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 27
# Pillow warns from half its own limit on; `open_image` has another.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What decoders remark on odd metadata; a damaged picture is an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def load_image(
    file: str | os.PathLike | BinaryIO,
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    header: Image.Image | None = None,
) -> Image.Image:
    """The picture that a viewer shows for a file, upright and with 8 bits a channel.

    Transparency is composited over white, as viewers and browsers show it on their page, unless
    the alpha channel is asked for.

    Args:
        file: an image file, by its path or open.
        in_chans: 1 for grayscale, 3 for RGB, 4 for RGB with alpha.
        max_pixels: a larger image is not decoded.
        header: what `open_image` gives for the open file, if that was called already.

    Raises:
        UsageError: another number of channels.
        OSError: a file that cannot be read or decoded, whatever the reason; but for
        TrainingError: the storage fails, see `read_file`.
    """
    mode = check_channels(in_chans)
    path = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "the image")
    try:
        if path is file:
            file = read_file(path)
        with header or open_image(file, max_pixels) as image:
            image.load()
            return _upright(_to_8_bit(image, mode), orientation(image))
    except TrainingError:
        raise
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        why = reason_of(error, path) if isinstance(error, OSError) else error
        raise OSError(f"{path} cannot be decoded: {why}") from error


def open_image(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The header of an image file of one of the `FORMATS`; nothing is decoded.

    Raises:
        OSError: of another format, or larger than `max_pixels`.
    """
    pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(f"it is no sound file of {', '.join(FORMATS)}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillows
    if image.width * image.height > max_pixels:
        raise OSError(
            f"its {image.width} x {image.height} pixels are more than --max_pixels {max_pixels}"
        )
    return image


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
        return image.convert("RGBA") if mode == "RGBA" else _on_white(image, mode)
    return image.convert(mode)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """A transparent image over white."""
    result = Image.new(mode, image.size)
    for top in range(0, image.height, _STRIP):
        bottom = min(top + _STRIP, image.height)
        strip = image.crop((0, top, image.width, bottom)).convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        result.paste(strip.convert(mode), (0, top))
    return result


def _narrow(image: Image.Image) -> Image.Image:
    """Grayscale of 16 or 32 bits to "L"; Pillow's own conversion would clip at 255.

    16-bit values keep their upper byte, as Pillow does it for 16-bit colour. Values that are not
    of 16 bits have no agreed range, so the darkest becomes black and the brightest white.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    spread = image.mode == "F" or low < 0 or high > 65535
    narrow = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _STRIP):
        strip = values[top : top + _STRIP].astype(np.float64)
        if spread:
            strip = (strip - low) * (65535 / ((high - low) or 1))
        narrow[top : top + _STRIP] = strip // 256
    return Image.fromarray(narrow)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image: 1 for upright, else 2 … 8."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged metadata raise anything, and do not spoil the picture.
        return 1


def _upright(image: Image.Image, stored: int) -> Image.Image:
    """Turn and mirror an image so that it is upright."""
    return image.transpose(_TRANSPOSE[stored]) if stored in _TRANSPOSE else image
