import json

import pytest

from DET.coco import read_coco
from tests.pictures import picture
from util.errors import UsageError

SQUARE = [4, 4, 20, 4, 20, 16, 4, 16]


def annotation(number=1, **changes):
    """A sound annotation of the first image; None takes an entry away."""
    sound = dict(
        id=number, image_id=7, category_id=3, bbox=[4, 4, 16, 12], segmentation=[SQUARE],
        area=192, iscrowd=0,
    )  # fmt: skip
    return {name: value for name, value in {**sound, **changes}.items() if value is not None}


def image(number=7, **changes):
    sound = dict(id=number, file_name=f"{number}.png", height=24, width=40)
    return {name: value for name, value in {**sound, **changes}.items() if value is not None}


def content(annotations, images=None):
    categories = [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}]
    images = [image()] if images is None else images
    return dict(info={}, images=images, annotations=annotations, categories=categories)


@pytest.fixture
def read(tmp_path):
    """Write a json and the image 7.png, and read them."""

    def write_and_read(what):
        picture(height=24, width=40).save(tmp_path / "7.png")
        path = tmp_path / "some.json"
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return read_coco(path, tmp_path)

    return write_and_read


def test_a_sound_file_stays_as_it_is(read):
    sound = content([annotation()])
    coco = read(sound)
    assert coco.content == sound and not coco.changed and not coco.skipped
    assert str(coco).endswith("some.json: 1 image, 1 annotation of 2 classes with masks")


def test_classes_come_in_the_order_of_their_ids(read):
    assert read(content([annotation()])).classes == ["cat", "dog"]


BROKEN = {
    "without a box": [{"bbox": None}, {"bbox": []}, {"bbox": [1, 2, 3]}, {"bbox": [1, 2, "3", 4]}],
    "of zero area": [
        {"bbox": [4, 4, 0, 12]},
        {"bbox": [4, 4, 12, -1]},
        {"segmentation": [[4, 4, 8, 8, 12, 12]]},
    ],
    "out of the image": [{"bbox": [40, 4, 5, 5]}, {"bbox": [4, -9, 5, 9]}],
    "without a mask": [
        {"segmentation": None},
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
    ],
    "whose mask is not of the image's size": [{"segmentation": {"size": [9, 9], "counts": "a"}}],
    "of a category that is not there": [{"category_id": 4}, {"category_id": None}],
    "of an image that is not there": [{"image_id": 8}],
    "to be ignored": [{"ignore": 1}],
}


@pytest.mark.parametrize(
    ("why", "changes"), [(why, changes) for why, several in BROKEN.items() for changes in several]
)
def test_a_broken_annotation_is_counted_and_left_out(read, why, changes):
    coco = read(content([annotation(1), annotation(2, **changes)]))
    assert coco.skipped == {("annotation", why): 1}
    assert coco.content["annotations"] == [annotation(1)] and coco.changed
    assert str(coco).endswith(f"; skipped 1 annotation {why}")


def test_numbers_that_are_none_are_no_box(read):
    text = json.dumps(content([annotation(1), annotation(2, bbox=[4, 4, 1e999, 12])]))
    assert read(text).skipped == {("annotation", "without a box"): 1}


@pytest.mark.parametrize(
    ("why", "broken"),
    [
        ("whose file is missing", image(8)),
        ("without width and height", image(8, file_name="7.png", width=None)),
        ("without width and height", image(8, file_name="7.png", height=0)),
        ("without an id or a file name", image(8, file_name=None)),
        ("whose id another one has", image(7)),
    ],
)
def test_a_broken_image_is_counted_and_left_out_with_its_annotations(read, why, broken):
    coco = read(content([annotation(1), annotation(2, image_id=8)], [image(), broken]))
    assert coco.skipped["image", why] == 1
    assert coco.skipped["annotation", "of an image that is not there"] == 1
    assert coco.content["images"] == [image()] and coco.content["annotations"] == [annotation(1)]


def test_a_box_may_reach_beyond_the_image(read):
    assert not read(content([annotation(bbox=[-3, -3, 99, 99])])).skipped


def test_a_file_without_any_mask_is_one_of_boxes(read):
    coco = read(content([annotation(1, segmentation=None), annotation(2, segmentation=[])]))
    assert not coco.has_masks and not coco.skipped
    assert str(coco).endswith("2 annotations of 2 classes without masks")


def test_run_length_masks_of_single_objects_are_told(read):
    bitmap = {"size": [24, 40], "counts": [100, 20, 840]}
    assert read(content([annotation(segmentation=bitmap)])).has_bitmaps
    crowd = annotation(2, segmentation=bitmap, iscrowd=1)
    coco = read(content([annotation(1), crowd]))
    assert coco.has_masks and not coco.has_bitmaps
    assert coco.content["annotations"][1] == crowd


def test_broken_parts_of_a_mask_are_left_out(read):
    coco = read(content([annotation(segmentation=[[1, 2, 3, 4], SQUARE, [1, 1, 2, 2, 3]])]))
    assert coco.content["annotations"] == [annotation()] and not coco.skipped


@pytest.mark.parametrize("ids", [(0, 1), (5, 5), (None, 3), ("a", "b")])
def test_ids_that_evaluation_would_confuse_are_given_anew(read, ids):
    coco = read(content([annotation(i) for i in ids]))
    assert [a["id"] for a in coco.content["annotations"]] == [1, 2] and coco.changed


def test_what_evaluation_asks_for_is_filled_in(read):
    bare = content([annotation(area=None, iscrowd=None)])
    del bare["info"]
    coco = read(bare)
    assert coco.content["annotations"] == [annotation()] and coco.content["info"] == {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{", "cannot be read"),
        ("[1, 2]", "is not in COCO's format: it lacks images, annotations, categories"),
        ({"images": [], "categories": []}, "it lacks annotations"),
        ({**content([]), "categories": []}, "an id of its own"),
        ({**content([]), "categories": [{"id": 1}]}, "needs a name"),
        ({**content([]), "categories": [{"id": 1, "name": "a"}] * 2}, "an id of its own"),
        (content([]), "nothing to learn from"),
        (content([annotation(bbox=[])]), "skipped 1 annotation without a box: nothing to learn"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_says_why(read, what, message):
    with pytest.raises(UsageError, match=r"some\.json") as error:
        read(what)
    assert message in str(error.value)


def test_a_missing_file_and_a_missing_folder_are_errors(tmp_path):
    with pytest.raises(UsageError, match=r"annotation file .*none.json does not exist"):
        read_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(UsageError, match=r"image folder .*none of .* does not exist"):
        read_coco(tmp_path / "none.json", tmp_path / "none")
