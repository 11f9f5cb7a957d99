"""Masks: the class of each pixel, read from a picture file and checked."""

import numpy as np

from util.data.files import read_file, reason_of
from util.data.images import open_image, orientation
from util.errors import TrainingError, UsageError

IGNORED = 255
MOST_CLASSES = 254  # what 8 bits hold beside the ignored value and a zero that means nothing


def load_mask(sample: dict, size: tuple[int, int] | None) -> np.ndarray:
    """The class of each pixel of a sample of `ImagesAndMasks`, `[H, W]`, uint8, 255 where ignored.

    Args:
        sample: its `seg_map_path`, `img_path`, `num_classes` and `reduce_zero_label` count.
        size: height and width of the image; None if they are not known.

    Raises:
        UsageError: a mask that cannot be read, has another size or holds a number of no class.
    """
    path = sample["seg_map_path"]
    mask = read_mask(path)
    if size is not None and mask.shape != size:
        raise UsageError(
            f"mask {path} has {mask.shape[1]}x{mask.shape[0]} pixels, its image "
            f"{sample['img_path']} has {size[1]}x{size[0]}"
        )
    try:
        return classes_of(mask, sample["num_classes"], sample["reduce_zero_label"])
    except ValueError as error:
        raise UsageError(f"mask {path} {error}") from error


def image_size(path: str) -> tuple[int, int]:
    """Height and width of the upright picture in an image file; only its header is decoded.

    Raises:
        OSError: a file that cannot be read, or has no sound header.
        TrainingError: the storage fails.
    """
    try:
        with open_image(read_file(path)) as image:
            turned = orientation(image) > 4
            return image.size if turned else image.size[::-1]
    except OSError as error:
        raise OSError(f"{path} cannot be decoded: {reason_of(error, path)}") from error


def read_mask(path: str) -> np.ndarray:
    """The numbers in a mask, `[H, W]`.

    Raises:
        UsageError: a file that cannot be read, or does not hold a whole number in each pixel.
        TrainingError: the storage fails.
    """
    try:
        with open_image(read_file(path)) as file:
            values, mode, kind = np.asarray(file), file.mode, file.format
    except TrainingError:
        raise
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        why = reason_of(error, path) if isinstance(error, OSError) else error
        raise UsageError(f"mask {path} cannot be decoded: {why}") from error
    if mode in ("LA", "PA") and (values[..., 1] == 255).all():
        values = values[..., 0]  # nothing is transparent
    if values.ndim != 2 or values.dtype.kind == "f":
        what = {
            "F": "a picture of fractions",
            "LA": "partly transparent",
            "PA": "partly transparent",
        }
        raise UsageError(
            f"mask {path} is {what.get(mode, f'a colour picture ({mode})')}: a mask holds the "
            f"number of a class in each pixel, as a grayscale or palette PNG does"
        )
    if kind == "JPEG":
        raise UsageError(f"mask {path} is a JPEG, which blurs the numbers in it: save it as PNG")
    return values


def classes_of(mask: np.ndarray, num_classes: int, zero_ignored: bool) -> np.ndarray:
    """The class of each pixel `[H, W]`, uint8, 255 where ignored.

    Args:
        mask: the numbers in a mask file.
        num_classes: how many classes there are.
        zero_ignored: the first class is 1 and 0 is ignored, instead of 0; 255 is ignored anyway.

    Raises:
        ValueError: a number that is no class.
    """
    first = int(zero_ignored)
    ignored = (mask == IGNORED) | (zero_ignored & (mask == 0))
    wrong = ~ignored & ((mask < first) | (mask >= num_classes + first))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        nothing = "0 and 255 are" if zero_ignored else "255 is"
        raise ValueError(
            f"holds {mask[row, column]} at row {row}, column {column}: {num_classes} classes are "
            f"{first} … {num_classes + first - 1}, {nothing} ignored"
        )
    return np.where(ignored, IGNORED, mask.astype(np.int64) - first).astype(np.uint8)
