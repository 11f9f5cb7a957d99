import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from util.demo.coco import coco, outlines, write_coco_scenes
from util.demo.scenes import scenes


@pytest.fixture(scope="module")
def some():
    return list(itertools.islice(scenes("validation"), 12))


def filled(polygons, shape):
    """The pixels whose centre a polygon holds: drawn eight times as large, where it is exact."""
    picture = Image.new("1", (shape[1] * 8, shape[0] * 8))
    for polygon in polygons:
        ImageDraw.Draw(picture).polygon([8 * value for value in polygon], fill=1)
    return np.asarray(picture)[4::8, 4::8]


def without_holes(mask):
    """A mask with all filled that the background cannot reach from the border."""
    outside = Image.fromarray(np.pad(mask, 1).astype(np.uint8)).copy()
    ImageDraw.floodfill(outside, (0, 0), 2)
    return (np.asarray(outside) != 2)[1:-1, 1:-1]


def test_outlines_hold_the_masks_pixels_with_holes_filled(some):
    overlaps = []
    for mask in itertools.chain.from_iterable(scene.masks for scene in some):
        expected = without_holes(mask)
        found = filled(outlines(mask), mask.shape)
        overlaps.append((found & expected).sum() / (found | expected).sum())
    # A hole that ink closes by a corner alone may stay open.
    assert min(overlaps) > 0.9 and np.mean(overlaps) > 0.99


def test_an_outline_at_the_border_is_closed():
    mask = np.zeros((6, 8), bool)
    mask[:3, :4] = True
    (polygon,) = outlines(mask)
    assert np.array(polygon).reshape(-1, 2).min(axis=0) == pytest.approx([0, 0])
    assert np.array(polygon).reshape(-1, 2).max(axis=0) == pytest.approx([4, 3])


def test_boxes_are_tight_and_categories_are_the_digits(some):
    content = coco(some)
    assert [c["name"] for c in content["categories"]] == list("0123456789")
    everything = iter(content["annotations"])
    for number, scene in enumerate(some, start=1):
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            annotation = next(everything)
            left, top, width, height = annotation["bbox"]
            inside = mask[top : top + height, left : left + width]
            assert annotation["image_id"] == number and annotation["category_id"] == label + 1
            assert inside.sum() == mask.sum() == annotation["area"]
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
    assert next(everything, None) is None


def test_files_and_pictures_belong_together(tmp_path, monkeypatch):
    for module in ("util.demo.scenes", "util.demo.coco"):
        monkeypatch.setattr(f"{module}.COUNT", {"training": 3, "validation": 2})
    write_coco_scenes(tmp_path)
    for name, count in (("train", 3), ("val", 2)):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(content["images"]) == count
        for image in content["images"]:
            with Image.open(tmp_path / name / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])


def test_a_complete_copy_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("util.demo.coco.COUNT", {"training": 0, "validation": 0})
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text("kept")
    write_coco_scenes(tmp_path)
    assert (tmp_path / "train.json").read_text() == "kept"
