"""Masks of COCO's format: checked before a library is given them, their box and area.

pycocotools believes what it reads: run lengths that do not add up to the image let its
evaluation run for ever, or read memory that is not its own.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Box = tuple[float, float, float, float]

# No image has so many pixels a side; pycocotools' memory grows with coordinates.
MAX_PIXELS = 1_000_000


def is_number(value: object) -> bool:
    """True for a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def are_pixels(values: object) -> bool:
    """True for a list of coordinates or lengths in pixels, on or near an image."""
    return isinstance(values, list) and all(is_number(v) and abs(v) <= MAX_PIXELS for v in values)


def is_polygon(points: object) -> bool:
    """True for x and y of three points or more."""
    return are_pixels(points) and len(points) >= 6 and len(points) % 2 == 0


def polygons_extent(polygons: Sequence[Sequence[float]]) -> tuple[Box, float]:
    """The box (left, top, width, height) around polygons, and the sum of their areas."""
    x, y = ([v for p in polygons for v in p[axis::2]] for axis in (0, 1))
    box = (min(x), min(y), max(x) - min(x), max(y) - min(y))
    return box, math.fsum(map(_polygon_area, polygons))


def _polygon_area(points: Sequence[float]) -> float:
    x, y = points[0::2], points[1::2]
    crossings = (x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))
    return abs(math.fsum(crossings)) / 2


def rle_runs(mask: Mapping, height: int, width: int) -> np.ndarray | None:
    """The run lengths of a run-length encoded mask: zeros and ones by turns, down the columns.

    Args:
        mask: `size` (height, width) and `counts`, a list of whole numbers or COCO's string.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        `[runs]`, int64, or None where they are damaged or not of an image of that size.
    """
    if mask.get("size") != [height, width]:
        return None
    counts = mask.get("counts")
    if isinstance(counts, str):
        runs = _decode(counts)
    elif isinstance(counts, list) and all(type(c) is int and c <= height * width for c in counts):
        runs = np.array(counts, np.int64)
    else:
        return None
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return None
    return runs


def _decode(text: str) -> np.ndarray | None:
    """The numbers of COCO's string: 5 bits a character, low ones first, with a sign at the end.

    From the fourth on each number is the difference to the last but one.
    """
    codes = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not len(codes) or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if digit.max() > 6:  # 35 bits: more pixels than an image has
        return None
    numbers = np.add.reduceat((codes & 31) << (5 * digit), starts)
    numbers -= (codes[ends] & 16 > 0) * (np.int64(1) << (5 * (digit[ends] + 1)))
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def rle_extent(runs: np.ndarray, height: int) -> tuple[Box, float]:
    """The box (left, top, width, height) around the ones of a mask, and their number."""
    ends = np.cumsum(runs)
    first, last = ends[0::2][: len(runs) // 2], ends[1::2] - 1
    first, last = first[last >= first], last[last >= first]  # without runs of no length
    if not len(first):
        return (0.0, 0.0, 0.0, 0.0), 0.0
    left, right = first.min() // height, last.max() // height
    whole = (first // height != last // height).any()  # from one column's end to the next
    top, bottom = (0, height - 1) if whole else ((first % height).min(), (last % height).max())
    box = (float(left), float(top), float(right - left + 1), float(bottom - top + 1))
    return box, float(runs[1::2].sum())
