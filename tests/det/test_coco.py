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
        text = what if isinstance(what, str | bytes) else json.dumps(what)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_coco(path, tmp_path)

    return write_and_read


def test_a_sound_file_stays_as_it_is(read):
    sound = content([annotation(1), annotation(2, category_id=9)])
    coco = read(sound)
    assert coco.content == sound and not coco.changed and not coco.warnings
    assert str(coco).endswith("some.json: 1 image, 2 annotations of 2 classes with masks")


def test_classes_come_in_the_order_of_their_ids(read):
    assert read(content([annotation()])).classes == ["cat", "dog"]


def test_a_class_without_an_object_is_counted_and_named(read):
    crowd = annotation(2, category_id=9, iscrowd=1)
    assert read(content([annotation(), crowd])).warnings == ["1 class without an object: dog"]


NO_MASK = {"segmentation": None}
BROKEN = {
    "without a box": [
        {"bbox": None, **NO_MASK},
        {"bbox": [], **NO_MASK},
        {"bbox": [1, 2, 3], **NO_MASK},
        {"bbox": [1, 2, "3", 4], **NO_MASK},
        {"bbox": [1, 2, True, 4], **NO_MASK},
        {"bbox": [1, 2, 10**400, 4], **NO_MASK},
        {"bbox": "1234", **NO_MASK},
        {"bbox": {"x": 1}, "segmentation": 5},
    ],
    "of zero area": [{"bbox": [4, 4, 0, 12]}, {"bbox": [4, 4, 12, -1]}],
    "out of the image": [{"bbox": [40, 4, 5, 5]}, {"bbox": [4, -9, 5, 9]}],
    "of a category that is not there": [
        {"category_id": value} for value in (4, None, "3", [3], {}, True, 1e999)
    ],
    "of an image that is not there": [
        {"image_id": value} for value in (8, None, "7", [7], {}, True, 10**400)
    ],
    "to be ignored": [{"ignore": 1}, {"ignore": True}, {"ignore": "yes"}],
    "whose iscrowd is neither 0 nor 1": [
        {"iscrowd": value} for value in (2, -1, 0.5, "yes", [0], {}, "")
    ],
}


@pytest.mark.parametrize(
    ("why", "changes"), [(why, changes) for why, several in BROKEN.items() for changes in several]
)
def test_a_broken_annotation_is_counted_and_left_out(read, why, changes):
    coco = read(content([annotation(1), annotation(2, **changes)]))
    assert coco.skipped == {("annotation", why): 1}
    assert coco.content["annotations"] == [annotation(1)] and coco.changed
    assert f"; skipped 1 annotation {why}" in str(coco)


@pytest.mark.parametrize("broken", [None, 3, "text", [1], []])
def test_entries_that_are_no_objects_are_counted_and_left_out(read, broken):
    coco = read(content([annotation(1), broken], [image(), broken]))
    assert coco.skipped == {(what, "that is no json object"): 1 for what in ("annotation", "image")}


DAMAGED = "run lengths that are damaged or of another size than the image"
BAD_MASKS = {
    DAMAGED: [
        {"size": [9, 9], "counts": [81]},
        {"size": [24, 40], "counts": [959]},
        {"size": [24, 40], "counts": "a"},
        {"size": [24, 40], "counts": None},
        {"size": None, "counts": [960]},
        {"counts": [960]},
        {"a": 1},
    ],
    "without a polygon of three points": [[[1, 2, 3, 4]], [5], [["a"] * 6], [None]],
    "of zero area": [[[4, 4, 8, 8, 12, 12]], {"size": [24, 40], "counts": [960]}],
    "neither polygons nor run lengths": [5, "text", True, 1.5],
}


@pytest.mark.parametrize(
    ("why", "mask"), [(why, mask) for why, several in BAD_MASKS.items() for mask in several]
)
def test_a_mask_that_cannot_be_used_is_counted_and_the_box_stays(read, why, mask):
    coco = read(content([annotation(1), annotation(2, segmentation=mask)]))
    assert coco.content["annotations"] == [annotation(1), annotation(2, **NO_MASK)]
    assert coco.mended == {("mask", f"{why}, left out"): 1} and not coco.skipped
    assert f"; mask {why}, left out: 1; 1 annotation without a mask count" in str(coco)


@pytest.mark.parametrize("none", [[], {}, "", None])
def test_a_box_without_a_mask_among_masks_stays_and_is_counted(read, none):
    coco = read(content([annotation(1), {**annotation(2), "segmentation": none}]))
    assert coco.content["annotations"] == [annotation(1), annotation(2, **NO_MASK)]
    assert coco.has_masks and not coco.skipped and not coco.mended
    assert "1 annotation without a mask count for boxes alone" in coco.warnings


@pytest.mark.parametrize("box", [None, [], [1, 2], "text", [1, 2, "3", 4]])
@pytest.mark.parametrize(
    "mask", [[SQUARE], {"size": [24, 40], "counts": [100, *[12, 12] * 15, 12, 488]}]
)
def test_a_mask_gives_the_box_that_is_missing(read, box, mask):
    coco = read(content([{**annotation(segmentation=mask), "bbox": box}]))
    assert coco.content["annotations"] == [annotation(segmentation=mask)]
    assert coco.mended == {("box", "taken from its mask"): 1}


@pytest.mark.parametrize("area", ["192", None, -1, [1], float("nan"), True])
def test_an_area_that_is_no_number_is_computed_of_the_mask(read, area):
    coco = read(content([{**annotation(), "area": area}]))
    assert coco.content["annotations"] == [annotation()]
    assert coco.mended == {("area", "that is no number, computed"): 1}


@pytest.mark.parametrize(("given", "crowd"), [(None, 0), ("0", 0), ("1", 1), (True, 1), (0.0, 0)])
def test_iscrowd_becomes_zero_or_one(read, given, crowd):
    coco = read(content([annotation(1), {**annotation(2), "iscrowd": given}]))
    assert coco.content["annotations"][1] == annotation(2, iscrowd=crowd)


def test_what_detectron2_stumbles_over_is_taken_out(read):
    odd = annotation(2, keypoints=5) | {"ignore": None}
    assert read(content([annotation(1), odd])).content["annotations"][1] == annotation(2)
    keypoints = annotation(keypoints=[1, 2, 2])
    assert read(content([keypoints])).content["annotations"] == [keypoints]


def test_numbers_that_are_none_are_no_box(read):
    bad = annotation(2, bbox=[4, 4, 1e999, 12], **NO_MASK)
    text = json.dumps(content([annotation(1), bad]))
    assert read(text).skipped == {("annotation", "without a box"): 1}


@pytest.mark.parametrize(
    ("why", "broken"),
    [
        ("whose file is missing", image(8)),
        ("without width and height", image(8, file_name="7.png", width=None)),
        ("without width and height", image(8, file_name="7.png", height=0)),
        ("without width and height", image(8, file_name="7.png", height="24")),
        ("without width and height", image(8, file_name="7.png", height=24.5)),
        ("without width and height", image(8, file_name="7.png", width=True)),
        ("without an id or a file name", image([8], file_name="7.png")),
        ("without an id or a file name", image(True, file_name="7.png")),
        ("without an id or a file name", image(8, file_name=["7.png"])),
        ("whose file is missing", image(8, file_name="x" * 5000)),
        ("whose file is missing", image(8, file_name="7.png\0")),
        ("whose file is missing", image(8, file_name="")),
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
    assert "2 annotations of 2 classes without masks" in str(coco)


def test_sizes_become_whole_numbers(read):
    coco = read(content([annotation()], [image(height=24.0)]))
    assert type(coco.content["images"][0]["height"]) is int and coco.changed


def test_image_ids_may_be_texts_but_not_some_of_them(read):
    named = content([annotation(image_id="a")], [image("a", file_name="7.png")])
    assert read(named).content == named
    both = [image("a", file_name="7.png"), image()]
    with pytest.raises(UsageError, match="must be all numbers or all texts"):
        read(content([annotation()], both))


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
    assert coco.mended == {("mask", "without its parts that are no polygons"): 1}


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
        (content([annotation(bbox=[], **NO_MASK)]), "skipped 1 annotation without a box"),
        (content([annotation(iscrowd=1)]), "nothing to learn"),
        ("[" * 100_000, "cannot be read"),
        ("[" + "9" * 5000 + "]", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        ({**content([]), "categories": [3]}, "an id of its own"),
        ({**content([]), "categories": [{"id": [1], "name": "a"}]}, "an id of its own"),
        ({**content([]), "categories": [{"id": True, "name": "a"}]}, "an id of its own"),
        ({**content([]), "categories": [{"id": 1, "name": None}]}, "needs a name"),
        ({**content([]), "categories": [{"id": 1, "name": ""}]}, "needs a name"),
        (
            {**content([]), "categories": [{"id": i, "name": "a"} for i in (1, 2)]},
            "several of its categories have the name a",
        ),
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


def test_a_byte_order_mark_is_read_over_and_not_left_in(read):
    coco = read("\ufeff" + json.dumps(content([annotation()])))
    assert coco.content["annotations"] == [annotation()] and coco.changed


# --- any value in any place ----------------------------------------------------------------------

VALUES = (
    None,
    True,
    0,
    -1,
    5,
    1.5,
    1e308,
    float("nan"),
    10**400,
    "",
    "text",
    [],
    [5],
    {},
    {"a": 1},
)


def places(node, path=()):
    """The ways to all values of a json."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def with_value(what, path, value):
    what = json.loads(json.dumps(what))
    node = what
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return what


BITMAP = {"size": [24, 40], "counts": [100, 20, 840]}
WHOLE = content([annotation(1), annotation(2, segmentation=BITMAP), annotation(3)])


@pytest.mark.parametrize("path", [p for p in places(WHOLE) if p[0] != "info"], ids=str)
def test_any_value_anywhere_is_mended_left_out_or_told_and_never_reaches_a_library(read, path):
    """What is left can be read, measured and decoded by pycocotools."""
    coco_module = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    for value in VALUES:
        try:
            found = read(with_value(WHOLE, path, value))
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        api = coco_module.COCO()
        api.dataset = json.loads(json.dumps(found.content))
        api.createIndex()
        for a in api.loadAnns(api.getAnnIds()):
            assert a["iscrowd"] in (0, 1) and a["area"] >= 0 and len(a["bbox"]) == 4
            if "segmentation" in a:
                size = api.imgs[a["image_id"]]
                assert api.annToMask(a).shape == (size["height"], size["width"])
