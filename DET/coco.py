"""Annotations in COCO's format: read, checked, and what is broken counted and left out."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from DET.annotations import Fault, check_annotation, check_image
from util.errors import UsageError

# More names than that are not listed in a line.
NAMES = 10


@dataclass(frozen=True)
class Coco:
    """The sound part of an annotation file.

    Attributes:
        path: the file.
        content: COCO's format: images, annotations, categories.
        skipped: how many images and annotations were left out, by ("image" or "annotation", why).
        mended: how many parts of annotations were mended or left out, by (what, how).
        changed: whether `content` is not what the file holds.
    """

    path: Path
    content: dict
    skipped: Counter
    mended: Counter
    changed: bool

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the category ids: that of the model's outputs."""
        categories = sorted(self.content["categories"], key=lambda c: c["id"])
        return [str(category["name"]) for category in categories]

    @property
    def has_masks(self) -> bool:
        """True if an annotation has a mask."""
        return any("segmentation" in a for a in self.content["annotations"])

    @property
    def has_bitmaps(self) -> bool:
        """True if a mask of a single object is run-length encoded instead of polygons."""
        masks = (a.get("segmentation") for a in self.content["annotations"] if not a["iscrowd"])
        return any(isinstance(mask, Mapping) for mask in masks)

    @property
    def warnings(self) -> list[str]:
        """Notes for the user on the file."""
        annotations = self.content["annotations"]
        parts = [f"skipped {_count(n, what)} {why}" for (what, why), n in _sorted(self.skipped)]
        parts += [f"{what} {how}: {n:,}" for (what, how), n in _sorted(self.mended)]
        without = sum("segmentation" not in a for a in annotations)
        if self.has_masks and without:
            parts.append(f"{_count(without, 'annotation')} without a mask count for boxes alone")
        seen = {a["category_id"] for a in annotations if not a["iscrowd"]}
        unseen = [str(c["name"]) for c in self.content["categories"] if c["id"] not in seen]
        if unseen:
            more = ", …" * (len(unseen) > NAMES)
            parts.append(
                f"{_count(len(unseen), 'class')} without an object: "
                f"{', '.join(unseen[:NAMES])}{more}"
            )
        return parts

    def __str__(self) -> str:
        images, annotations = (len(self.content[name]) for name in ("images", "annotations"))
        masks = "with masks" if self.has_masks else "without masks"
        text = (
            f"{self.path}: {_count(images, 'image')}, {_count(annotations, 'annotation')} of "
            f"{_count(len(self.classes), 'class')} {masks}"
        )
        return "; ".join([text, *self.warnings])


def _sorted(counts: Counter) -> list[tuple[tuple[str, str], int]]:
    return sorted(counts.items())


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
    content, marked = _read(path)
    coco = _check(path, content, images, marked)
    if all(a["iscrowd"] for a in coco.content["annotations"]):
        raise UsageError(f"{coco}: nothing to learn from or to compare with is left")
    return coco


def _read(path: Path) -> tuple[dict, bool]:
    """Contents of a file, and whether a byte order mark comes before them."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text.removeprefix("\ufeff"))
    except FileNotFoundError:
        raise UsageError(f"the annotation file {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
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
    categories = content["categories"]
    ids = [c.get("id") if isinstance(c, Mapping) else None for c in categories]
    if not ids or not all(type(i) is int for i in ids) or len(set(ids)) < len(ids):
        raise UsageError(f"{path}: each of its categories needs an id of its own, a whole number")
    if not all(isinstance(c.get("name"), str | int) and str(c["name"]) for c in categories):
        raise UsageError(f"{path}: each of its categories needs a name")
    names = Counter(str(c["name"]) for c in categories)
    if twice := [name for name, n in names.items() if n > 1]:
        raise UsageError(
            f"{path}: several of its categories have the name {', '.join(twice[:NAMES])}; "
            f"give each its own, or join them"
        )
    return content, text.startswith("\ufeff")


def _check(path: Path, content: dict, folder: Path, marked: bool) -> Coco:
    """Leave out what is broken, complete what evaluation needs."""
    skipped, mended = Counter(), Counter()
    images = {}
    for image in content["images"]:
        try:
            sound = check_image(image, images, folder, mended)
            images[sound["id"]] = sound
        except Fault as fault:
            skipped["image", str(fault)] += 1
    if len({isinstance(number, str) for number in images}) > 1:
        raise UsageError(f"{path}: the ids of its images must be all numbers or all texts")
    categories = {category["id"] for category in content["categories"]}
    annotations = []
    for annotation in content["annotations"]:
        told = Counter()
        try:
            annotations.append(check_annotation(annotation, images, categories, told))
            mended += told
        except Fault as fault:
            skipped["annotation", str(fault)] += 1
    sound = {
        "info": {},  # pycocotools asks for it
        **content,
        "images": list(images.values()),
        "annotations": _numbered(annotations),
        "categories": [{**c, "name": str(c["name"])} for c in content["categories"]],
    }
    return Coco(path, sound, skipped, mended, changed=marked or bool(mended) or sound != content)


def _numbered(annotations: list[dict]) -> list[dict]:
    """Annotations with ids that differ: pycocotools takes 0 for "no match"."""
    ids = [a.get("id") for a in annotations]
    if all(type(i) is int and i > 0 for i in ids) and len(set(ids)) == len(ids):
        return annotations
    return [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
