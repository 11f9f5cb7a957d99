"""Boxes of Pascal VOC as COCO's json."""

import json
from pathlib import Path

import pytest
from PIL import Image

from DET.voc import main, parse_args
from util.errors import UsageError

BOX = "<object><name>{}</name><bndbox>{}</bndbox></object>"
SIDES = ("xmin", "ymin", "xmax", "ymax")


def write_voc(root: Path, objects: dict[str, list[tuple]]) -> Path:
    """A data set in VOC's layout: names of images to (class, xmin, ymin, xmax, ymax)."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, found in objects.items():
        Image.new("RGB", (64, 48)).save(root / "JPEGImages" / f"{name}.jpg")
        boxes = (
            BOX.format(label, "".join(f"<{s}>{v}</{s}>" for s, v in zip(SIDES, box, strict=True)))
            for label, *box in found
        )
        size = "<size><width>64</width><height>48</height></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(boxes)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\nd\n")
    return root


@pytest.fixture
def voc(tmp_path):
    cells = {"a": [("red", 1, 1, 64, 48), ("white", 5, 6, 20, 30)], "b": [("red", 2, 3, 4, 5)]}
    return write_voc(tmp_path, {**cells, "c": [], "d": []})


def convert(root: Path, *arguments: object) -> None:
    folders = [root / "JPEGImages", root / "Annotations", "--out", root / "out", *arguments]
    main(parse_args(list(map(str, folders))))


def lists(root: Path) -> list[object]:
    return ["--lists", *(root / "ImageSets" / "Main" / f"{s}.txt" for s in ("train", "val"))]


def test_boxes_are_those_that_detectron2_reads(voc):
    pascal_voc = pytest.importorskip("detectron2.data.datasets.pascal_voc")
    coco = pytest.importorskip("detectron2.data.datasets.coco")
    convert(voc, *lists(voc))
    for split in ("train", "val"):
        theirs = pascal_voc.load_voc_instances(str(voc), split, ["", "red", "white"])
        ours = coco.load_coco_json(str(voc / "out" / f"{split}.json"), str(voc / "JPEGImages"))
        for one, other in zip(theirs, ours, strict=True):
            assert one["file_name"] == other["file_name"]
            assert (one["height"], one["width"]) == (other["height"], other["width"])
            left = [(a["category_id"], *a["bbox"]) for a in one["annotations"]]
            boxes = [(a["category_id"], *a["bbox"]) for a in other["annotations"]]
            assert left == [(c, x, y, x + w, y + h) for c, x, y, w, h in boxes]


def test_all_lists_have_the_same_classes_and_images_without_objects_stay(voc, capsys):
    convert(voc, *lists(voc))
    train, val = (json.loads((voc / "out" / f"{s}.json").read_text()) for s in ("train", "val"))
    assert train["categories"] == val["categories"]
    assert [image["file_name"] for image in train["images"]] == ["a.jpg", "c.jpg"]
    assert "val.json: 2 images, 1 boxes of 2 classes (red, white)" in capsys.readouterr().out


def test_images_without_an_xml_file_are_left_out_and_counted(voc, capsys):
    (voc / "Annotations" / "b.xml").unlink()
    convert(voc)
    assert "all.json: 3 images" in (said := capsys.readouterr().out)
    assert "1 without an XML file left out" in said


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda voc: (voc / "Annotations" / "a.xml").write_text("<annot"), "a.xml is no annotatio"),
        (lambda voc: (voc / "JPEGImages" / "a.jpg").unlink(), "1 names of the list train have no"),
        (lambda voc: (voc / "JPEGImages" / "x").mkdir() or twice(voc), "cannot be told apart: a"),
        (lambda voc: [p.unlink() for p in voc.glob("*/*.xml")], "no object in the XML files"),
    ],
)
def test_what_cannot_be_converted_is_said_and_nothing_is_written(voc, spoil, words):
    spoil(voc)
    with pytest.raises(UsageError, match=words):
        convert(voc, *lists(voc))
    assert not (voc / "out").exists()


def twice(voc: Path) -> None:
    Image.new("RGB", (64, 48)).save(voc / "JPEGImages" / "x" / "a.jpg")
