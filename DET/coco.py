"""Annotations in COCO's format: read, checked, and what is broken counted and left out."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.errors import UsageError


@dataclass(frozen=True)
class Coco:
    """The sound part of an annotation file.

    Attributes:
        path: the file.
        content: COCO's format: images, annotations, categories.
        skipped: how many images and annotations were left out, by ("image" or "annotation", why).
        changed: whether `content` is not what the file holds.
    """

    path: Path
    content: dict
    skipped: Counter
    changed: bool

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the category ids: that of the model's outputs."""
        categories = sorted(self.content["categories"], key=lambda c: c["id"])
        return [str(category["name"]) for category in categories]

    @property
    def has_masks(self) -> bool:
        """Whether annotations have masks."""
        return _have_masks(self.content["annotations"])

    @property
    def has_bitmaps(self) -> bool:
        """Whether a mask of a single object is run-length encoded, not polygons."""
        masks = (a.get("segmentation") for a in self.content["annotations"] if not a["iscrowd"])
        return any(isinstance(mask, Mapping) for mask in masks)

    def __str__(self) -> str:
        images, annotations = (len(self.content[name]) for name in ("images", "annotations"))
        masks = "with masks" if self.has_masks else "without masks"
        text = (
            f"{self.path}: {_count(images, 'image')}, {_count(annotations, 'annotation')} of "
            f"{_count(len(self.classes), 'class')} {masks}"
        )
        if self.skipped:
            parts = (f"{_count(n, what)} {why}" for (what, why), n in sorted(self.skipped.items()))
            text += f"; skipped {', '.join(parts)}"
        return text


def _count(number: int, what: str) -> str:
    plural = {1: what}.get(number, f"{what}{'es' if what.endswith('s') else 's'}")
    return f"{number:,} {plural}"


def read_coco(path: str | Path, images: str | Path) -> Coco:
    """Read an annotation file and check all that it says.

    Args:
        path: a json file in COCO's format.
        images: the folder that its file names are relative to.

    Raises:
        UsageError: no such file or folder, another format, or nothing sound in it.
    """
    path, images = Path(path), Path(images)
    if not images.is_dir():
        raise UsageError(f"the image folder {images} of {path} does not exist")
    content = _read(path)
    coco = _check(path, content, images)
    if not coco.content["annotations"]:
        raise UsageError(f"{coco}: nothing to learn from or to compare with is left")
    return coco


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the annotation file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the annotation file {path} cannot be read: {error}") from error
    lists = ("images", "annotations", "categories")
    missing = [
        name
        for name in lists
        if not isinstance(content, Mapping) or not isinstance(content.get(name), list)
    ]
    if missing:
        raise UsageError(
            f"{path} is not in COCO's format: it lacks {', '.join(missing)} "
            f"(a json object with the lists {', '.join(lists)})"
        )
    ids = [category.get("id") for category in content["categories"]]
    if not ids or len(set(ids)) < len(ids) or not all(isinstance(i, int) for i in ids):
        raise UsageError(f"{path}: each of its categories needs an id of its own, a whole number")
    if not all("name" in category for category in content["categories"]):
        raise UsageError(f"{path}: each of its categories needs a name")
    return content


def _check(path: Path, content: dict, folder: Path) -> Coco:
    """Leave out what is broken, complete what evaluation needs."""
    skipped: Counter = Counter()
    images = {}
    for image in content["images"]:
        if fault := _image_fault(image, images, folder):
            skipped["image", fault] += 1
        else:
            images[image["id"]] = image
    categories = {category["id"] for category in content["categories"]}
    masks = _have_masks(content["annotations"])
    annotations = []
    for annotation in content["annotations"]:
        if fault := _annotation_fault(annotation, images, categories, masks):
            skipped["annotation", fault] += 1
        else:
            annotations.append(_complete(annotation))
    ids = [a.get("id") for a in annotations]
    if len(set(ids)) < len(ids) or not all(isinstance(i, int) and i > 0 for i in ids):
        # pycocotools takes an id of 0 for "no match", and one that is twice there for one object.
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    sound = {
        "info": {},  # pycocotools asks for it
        **content,
        "images": list(images.values()),
        "annotations": annotations,
    }
    return Coco(path, sound, skipped, changed=sound != content)


def _have_masks(annotations: Sequence[Mapping]) -> bool:
    return any(a.get("segmentation") for a in annotations)


def _image_fault(image: Mapping, known: Mapping, folder: Path) -> str | None:
    """Why an image cannot be used, None if it can."""
    if not isinstance(image.get("file_name"), str) or "id" not in image:
        return "without an id or a file name"
    if image["id"] in known:
        return "whose id another one has"
    size = (image.get("width"), image.get("height"))
    if not all(_is_number(side) and side > 0 for side in size):
        return "without width and height"
    if not (folder / image["file_name"]).is_file():
        return "whose file is missing"
    return None


def _annotation_fault(
    annotation: Mapping, images: Mapping, categories: set[int], masks: bool
) -> str | None:
    """Why an annotation cannot be used, None if it can; `masks`: it needs one."""
    image = images.get(annotation.get("image_id"))
    if image is None:
        return "of an image that is not there"
    if annotation.get("category_id") not in categories:
        return "of a category that is not there"
    if annotation.get("ignore"):
        return "to be ignored"
    box = annotation.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        return "without a box"
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return "of zero area"
    if not (left < image["width"] and top < image["height"] and left + width > 0 < top + height):
        return "out of the image"
    return _mask_fault(annotation.get("segmentation"), image) if masks else None


def _mask_fault(mask: object, image: Mapping) -> str | None:
    if not mask:
        return "without a mask"
    if isinstance(mask, Mapping):
        sound = "counts" in mask and list(mask.get("size", ())) == [image["height"], image["width"]]
        return None if sound else "whose mask is not of the image's size"
    if not any(map(_is_polygon, mask)):
        return "without a mask"
    return None if sum(map(_polygon_area, filter(_is_polygon, mask))) > 0 else "of zero area"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_polygon(points: object) -> bool:
    """Whether these are x and y of three points or more."""
    return (
        isinstance(points, Sequence)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(map(_is_number, points))
    )


def _polygon_area(points: Sequence[float]) -> float:
    x, y = points[0::2], points[1::2]
    crossings = (x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))
    return abs(math.fsum(crossings)) / 2


def _complete(annotation: dict) -> dict:
    """Fill in what evaluation asks for, and leave out broken parts of a mask."""
    added = {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    mask = annotation.get("segmentation")
    if isinstance(mask, list) and not all(map(_is_polygon, mask)):
        annotation = {**annotation, "segmentation": list(filter(_is_polygon, mask))}
    return annotation if added.keys() <= annotation.keys() else {**added, **annotation}
