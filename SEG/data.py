"""Images and masks: any picture file, any number of classes, and what is wrong said clearly."""

import colorsys
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from mmseg.utils import get_classes, get_palette
from PIL import Image

from util.data.folders import list_images
from util.data.images import load_image
from util.errors import UsageError

IGNORED = 255
MOST_CLASSES = 254  # what 8 bits hold beside the ignored value and a zero that means nothing


def class_names(classes: int | str | Sequence[str]) -> list[str]:
    """The names of classes.

    Args:
        classes: how many there are, a text file with a name a line, a data set that MMSegmentation
            knows (such as "ade20k"), or the names themselves.

    Raises:
        UsageError: a file that cannot be read, no class, or more than masks can hold.
    """
    if isinstance(classes, int):
        names = [f"class {i}" for i in range(classes)]
    elif not isinstance(classes, str):
        names = list(classes)
    elif os.path.isfile(classes):
        names = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
    else:
        try:
            names = get_classes(classes)
        except ValueError:
            raise UsageError(
                f"classes {classes!r}: give their number, or a text file with a name a line"
            ) from None
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UsageError(f"{len(names)} classes: there must be between 2 and {MOST_CLASSES}")
    return names


def class_colours(names: Sequence[str]) -> list[list[int]]:
    """A colour `[r, g, b]` for each class: ADE20K's own for its classes, else hues far apart.

    The same number of classes always has the same colours; one named "background" is dark.
    """
    if list(names) == get_classes("ade20k"):
        return get_palette("ade20k")
    # Steps of the golden ratio keep neighbouring hues apart, however many there are.
    hues = [(i * 0.618034 % 1, 1 - i % 3 * 0.25, 1 - i % 2 * 0.2) for i in range(len(names))]
    colours = [[round(255 * c) for c in colorsys.hsv_to_rgb(*hue)] for hue in hues]
    return [[32, 32, 32] if n == "background" else c for n, c in zip(names, colours, strict=True)]


@DATASETS.register_module()
class ImagesAndMasks(BaseSegDataset):
    """Two folders alike: images of any format in one, a PNG mask for each in the other.

    The mask of `a/b.jpg` is `a/b.png`. A pixel of a mask is the number of its class.

    Args:
        classes: their names, a file of them, or how many there are.
        data_root: what the folders of `data_prefix` (`img_path`, `seg_map_path`) are relative to.
        reduce_zero_label: classes are 1 … N in the masks and 0 is ignored, as in ADE20K;
            otherwise they are 0 … N - 1 and 255 is ignored.
        **kwargs: the rest of `BaseSegDataset`'s arguments.

    Raises:
        UsageError: no image, or images without a mask.
    """

    def __init__(self, classes: int | str | Sequence[str], **kwargs) -> None:
        names = class_names(classes)
        super().__init__(metainfo=dict(classes=names, palette=class_colours(names)), **kwargs)

    def load_data_list(self) -> list[dict]:
        """Each image with its mask and what is needed to read it."""
        images, masks = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        files = [Path(path) for path in list_images(images)]
        pairs = [(path, (masks / path.relative_to(images)).with_suffix(".png")) for path in files]
        missing = [(image, mask) for image, mask in pairs if not mask.is_file()]
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(pairs)} images have no mask: {missing[0][0]} needs "
                f"{missing[0][1]}"
            )
        shared = {
            "num_classes": len(self.metainfo["classes"]),
            "reduce_zero_label": self.reduce_zero_label,
        }
        return [
            {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], **shared}
            for image, mask in pairs
        ]


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Read any image file as a viewer shows it: upright, 8 bits, transparency over white.

    Adds `img` `[H, W, 3]` (uint8, BGR as MMSegmentation expects it), `img_shape` and `ori_shape`.

    Args:
        skip_bad: leave out a file that cannot be decoded, and name it; another takes its place.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self._bad: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """Read `results["img_path"]`."""
        path = results["img_path"]
        try:
            image = np.asarray(load_image(path))
        except OSError as error:
            if not self.skip_bad:
                raise UsageError(str(error)) from error
            if path not in self._bad:
                self._bad.add(path)
                print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None
        results["img"] = np.ascontiguousarray(image[..., ::-1])
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadMask(BaseTransform):
    """Read the mask of an image of `ImagesAndMasks` and check it.

    Adds `gt_seg_map` `[H, W]`, uint8: the class, or 255 where ignored.
    """

    def transform(self, results: dict) -> dict:
        """Read `results["seg_map_path"]`."""
        path = results["seg_map_path"]
        mask, size = read_mask(path), results["ori_shape"]
        if mask.shape != size:
            raise UsageError(
                f"mask {path} has {mask.shape[1]}x{mask.shape[0]} pixels, its image "
                f"{results['img_path']} has {size[1]}x{size[0]}"
            )
        try:
            classes = classes_of(mask, results["num_classes"], results["reduce_zero_label"])
        except ValueError as error:
            raise UsageError(f"mask {path} {error}") from error
        results["gt_seg_map"] = classes
        results["seg_fields"].append("gt_seg_map")
        return results


def read_mask(path: str) -> np.ndarray:
    """The numbers in a mask, `[H, W]`.

    Raises:
        UsageError: a file that cannot be read, or a colour picture.
    """
    try:
        with Image.open(path) as file:
            values, mode = np.asarray(file), file.mode
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        raise UsageError(f"mask {path} cannot be decoded: {error}") from error
    if values.ndim != 2:
        raise UsageError(
            f"mask {path} is a colour picture ({mode}): a mask holds the number of a class in "
            f"each pixel, as a grayscale or palette PNG does"
        )
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
