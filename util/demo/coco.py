"""The demo's scenes in COCO's layout: pictures, and a json with boxes and polygons."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image

from util.demo.digits import write_once
from util.demo.scenes import CLASSES, COUNT, Scene, scenes

# Names here to those of `util.demo.scenes`.
SPLITS = {"train": "training", "val": "validation"}


def write_coco_scenes(root: str | os.PathLike) -> Path:
    """Write all scenes: `root/{train,val}/*.png` and `root/{train,val}.json`.

    Returns:
        `root`, see `write_once`.
    """
    files = [f"{name}.json" for name in SPLITS]
    for name, split in SPLITS.items():
        files += (f"{name}/{index:04d}.png" for index in range(COUNT[split]))

    def write(folder: Path) -> None:
        for name, split in SPLITS.items():
            write_coco(folder, name, list(scenes(split)))

    return write_once(root, files, write)


def write_coco(folder: Path, name: str, everything: Sequence[Scene]) -> None:
    """Write scenes as a new folder of pictures, `folder/name/`, and `folder/name.json`."""
    (folder / name).mkdir(parents=True)
    for scene in everything:
        Image.fromarray(scene.image).save(folder / name / f"{scene.name}.png")
    (folder / f"{name}.json").write_text(json.dumps(coco(everything)))


def coco(everything: Sequence[Scene]) -> dict:
    """Scenes as the content of a COCO annotation file; the category of digit `d` is `d + 1`."""
    categories = [{"id": d + 1, "name": name} for d, name in enumerate(CLASSES)]
    images, annotations = [], []
    for number, scene in enumerate(everything, start=1):
        height, width = scene.image.shape[:2]
        name = f"{scene.name}.png"
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            left, top = int(columns[0]), int(rows[0])
            box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": box,
                    "segmentation": outlines(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def outlines(mask: np.ndarray) -> list[list[float]]:
    """The outer outlines of a mask `[H, W]`, bool, as COCO's polygons `[x, y, x, y, …]`.

    COCO's polygons have no holes, so those of a mask are filled, as annotators do.
    """
    # A frame of zeros closes outlines at the border; the pixel (0, 0) covers 0 … 1, its value
    # stands at 0.5.
    padded = np.pad(mask.astype(np.float32), 1)
    places = np.arange(max(padded.shape)) - 0.5
    contours = contour_generator(
        places[: padded.shape[1]], places[: padded.shape[0]], padded,
        fill_type=FillType.OuterOffset,
    )  # fmt: skip
    polygons = contours.filled(0.5, 2.0)
    return [
        points[: offsets[1] - 1].round(2).ravel().tolist()  # the last point is the first again
        for points, offsets in zip(*polygons, strict=True)
        if offsets[1] > 3
    ]
