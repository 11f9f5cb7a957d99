"""Masks: the class of each pixel, read from a picture file and checked."""

import itertools
from collections.abc import Collection, Mapping

import numpy as np

from util.data.files import read_file, reason_of
from util.data.images import open_image, orientation
from util.errors import TrainingError, UsageError

IGNORED = 255
MOST_CLASSES = 254  # what 8 bits hold beside the ignored value and a zero that means nothing


def load_mask(sample: dict, size: tuple[int, int] | None) -> np.ndarray:
    """The class of each pixel of a sample of `ImagesAndMasks`, `[H, W]`, uint8, 255 where ignored.

    Args:
        sample: its `seg_map_path`, `img_path`, `num_classes` and `ignored` count.
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
        return classes_of(mask, sample["num_classes"], sample["ignored"])
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


def ignored_numbers(dataset: Mapping) -> tuple[int, ...]:
    """The numbers, beside 255, that mean no class in the masks of an `ImagesAndMasks`.

    Args:
        dataset: its arguments, or what a checkpoint says of it: `reduce_zero_label`, `ignored`.
    """
    zero = {0} if dataset.get("reduce_zero_label") else set()
    return tuple(sorted({*(dataset.get("ignored") or ()), *zero}))


def class_numbers(num_classes: int, ignored: Collection[int] = ()) -> list[int]:
    """The number of each class in the masks: those from 0 on that are not ignored."""
    numbers = (n for n in itertools.count() if n not in {*ignored, IGNORED})
    return list(itertools.islice(numbers, num_classes))


def classes_of(mask: np.ndarray, num_classes: int, ignored: Collection[int] = ()) -> np.ndarray:
    """The class of each pixel `[H, W]`, uint8, 255 where ignored.

    Args:
        mask: the numbers in a mask file.
        num_classes: how many classes there are.
        ignored: numbers that mean no class, beside 255; the classes are the others, in order.

    Raises:
        ValueError: a number that is no class.
    """
    numbers = class_numbers(num_classes, ignored)
    classes = np.full(max(*numbers, *ignored, IGNORED) + 1, -1)
    classes[[*ignored, IGNORED]] = IGNORED
    classes[numbers] = range(num_classes)
    outside = (mask < 0) | (mask >= len(classes))
    found = classes[np.where(outside, IGNORED, mask)]
    wrong = outside | (found < 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"holds {mask[row, column]} at row {row}, column {column}: {num_classes} classes are "
            f"{ranges(numbers)}, {show_ignored(ignored)}"
        )
    return found.astype(np.uint8)


def show_ignored(ignored: Collection[int]) -> str:
    """Numbers that are ignored, as "0 and 255 are ignored"."""
    *others, last = sorted({*ignored, IGNORED})
    return f"{ranges(others)} and {last} are ignored" if others else f"{last} is ignored"


def ranges(numbers: Collection[int]) -> str:
    """Ascending numbers as "0 … 4, 6, 9 … 11"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} … {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
