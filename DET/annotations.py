"""Single images and annotations of COCO's format: sound, mended, or left out with the reason."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from DET.masks import (
    Box,
    are_pixels,
    is_number,
    is_polygon,
    polygons_extent,
    rle_extent,
    rle_runs,
)


class Fault(Exception):
    """Why an image, an annotation or a mask cannot be used: "skipped 2 annotations {why}"."""


def check_image(image: object, known: Mapping, folder: Path, told: Counter) -> dict:
    """An image's entry with width and height as whole numbers.

    Args:
        image: what the file has.
        known: the images before it, by their ids.
        folder: of the image files.
        told: gets what was mended, by (what, how).

    Raises:
        Fault: it cannot be used.
    """
    if not isinstance(image, Mapping):
        raise Fault("that is no json object")
    if not isinstance(image.get("file_name"), str) or not is_id(image.get("id")):
        raise Fault("without an id or a file name")
    if image["id"] in known:
        raise Fault("whose id another one has")
    size = {side: image.get(side) for side in ("width", "height")}
    if not are_pixels(list(size.values())) or not all(
        n >= 1 and n == int(n) for n in size.values()
    ):
        raise Fault("without width and height")
    try:
        there = (folder / image["file_name"]).is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise Fault("whose file is missing")
    if any(isinstance(n, float) for n in size.values()):  # pycocotools takes whole numbers alone
        told["image size", "written as a whole number"] += 1
    return {**image, **{side: int(n) for side, n in size.items()}}


def is_id(value: object) -> bool:
    """True if a value can be the id of an image: a number or a text."""
    return isinstance(value, str) or is_number(value)


def check_annotation(
    annotation: object, images: Mapping, categories: set[int], told: Counter
) -> dict:
    """An annotation with all that training and evaluation ask for.

    A box that is missing is that of the mask; a mask that cannot be used is left out, and the box
    stays.

    Args:
        annotation: what the file has.
        images: the sound images by their ids.
        categories: the categories' ids.
        told: gets what was mended, by (what, how).

    Raises:
        Fault: it cannot be used.
    """
    if not isinstance(annotation, Mapping):
        raise Fault("that is no json object")
    image_id, category = annotation.get("image_id"), annotation.get("category_id")
    if not is_id(image_id) or image_id not in images:
        raise Fault("of an image that is not there")
    if not is_number(category) or category not in categories:
        raise Fault("of a category that is not there")
    if annotation.get("ignore"):
        raise Fault("to be ignored")
    image = images[image_id]
    sound = {"iscrowd": _crowd(annotation.get("iscrowd"))}
    box = annotation.get("bbox")
    mask, extent = None, None
    try:
        mask, extent = check_mask(annotation.get("segmentation"), image, told)
    except Fault as fault:
        told["mask", f"{fault}, left out"] += 1
    if are_pixels(box) and len(box) == 4:
        sound["bbox"] = box
    elif extent:
        sound["bbox"] = list(extent[0])
        told["box", "taken from its mask"] += 1
    else:
        raise Fault("without a box")
    _check_box(sound["bbox"], image)
    area = annotation.get("area")
    if not is_number(area) or area < 0:
        area = extent[1] if extent else sound["bbox"][2] * sound["bbox"][3]
        if "area" in annotation:
            told["area", "that is no number, computed"] += 1
    sound["area"] = area
    if mask:
        sound["segmentation"] = mask
    # Detectron2 asserts on an `ignore`, and reads key points though no model here has them.
    unsound = {"ignore"} | ({"segmentation"} if not mask else set())
    if not _are_numbers(annotation.get("keypoints", [])):
        unsound.add("keypoints")
    kept = {name: value for name, value in annotation.items() if name not in unsound}
    return {**kept, **sound}


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _crowd(value: object) -> int:
    """`iscrowd` as 0 or 1; what is not given is a single object."""
    if value in (None, "0", "1") or (is_number(value) and value in (0, 1)):
        return int(value or 0)
    if isinstance(value, bool):
        return int(value)
    raise Fault("whose iscrowd is neither 0 nor 1")


def _check_box(box: list[float], image: Mapping) -> None:
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise Fault("of zero area")
    if not (left < image["width"] and top < image["height"] and left + width > 0 < top + height):
        raise Fault("out of the image")


def check_mask(
    mask: object, image: Mapping, told: Counter
) -> tuple[list | dict | None, tuple[Box, float] | None]:
    """The sound part of a mask with its box and area; (None, None) where there is none.

    Raises:
        Fault: it cannot be used.
    """
    if mask is None or mask == [] or mask == {} or mask == "":
        return None, None
    if isinstance(mask, Mapping):
        runs = rle_runs(mask, image["height"], image["width"])
        if runs is None:
            raise Fault("run lengths that are damaged or of another size than the image")
        extent = rle_extent(runs, image["height"])
    elif isinstance(mask, list):
        polygons = list(filter(is_polygon, mask))
        if not polygons:
            raise Fault("without a polygon of three points")
        if len(polygons) < len(mask):
            told["mask", "without its parts that are no polygons"] += 1
        mask, extent = polygons, polygons_extent(polygons)
    else:
        raise Fault("neither polygons nor run lengths")
    if extent[1] <= 0:
        raise Fault("of zero area")
    return mask, extent
