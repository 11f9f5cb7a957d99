import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs Detectron2")

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import ExifTags, Image

from DET import data
from DET.config import CONFIGS, load_config
from DET.data import Mapper, read_array, register
from tests.det import small
from tests.pictures import picture
from util.errors import UsageError

BASE = "convmae_base_mask_rcnn_FPN_25ep.py"
VITDET = "mask_rcnn_vitdet_convmae_b_25ep.py"


def write(path, stored=1, height=24, width=40):
    """A picture whose metadata say how it is stored."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = stored
    picture(height=height, width=width).save(path, exif=exif)
    return path


def record(path, height, width, **annotation):
    sound = dict(bbox=[2, 3, 8, 4], bbox_mode=BoxMode.XYWH_ABS, category_id=0, iscrowd=0)
    return dict(
        file_name=str(path), height=height, width=width, annotations=[{**sound, **annotation}]
    )


def mapper(**options):
    return Mapper(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True, **options
    )


# --- turned photographs --------------------------------------------------------------------------


@pytest.mark.parametrize("stored", range(1, 9))
def test_a_picture_whose_json_has_the_stored_size_is_read_as_stored(tmp_path, stored):
    path = write(tmp_path / "x.png", stored)
    with Image.open(path) as file:
        pixels = np.array(file)
    read = mapper()(record(path, 24, 40))["image"].permute(1, 2, 0).numpy()
    if stored >= 5:  # turned by a quarter: the size in the json says which is meant
        np.testing.assert_array_equal(read, pixels)
    else:
        np.testing.assert_array_equal(read, read_array(path, "RGB"))


@pytest.mark.parametrize("stored", range(5, 9))
def test_a_picture_whose_json_has_the_upright_size_is_read_upright(tmp_path, stored):
    path = write(tmp_path / "x.png", stored)
    read = mapper()(record(path, 40, 24))["image"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read, read_array(path, "RGB"))


def test_a_picture_of_another_size_is_skipped(tmp_path):
    assert mapper()(record(write(tmp_path / "x.png"), 40, 24)) is None


def test_turned_photographs_can_be_evaluated_on(tmp_path):
    write(tmp_path / "x.png", 6)
    for size in ((24, 40), (40, 24)):
        register("val", files(tmp_path, *size), tmp_path)


# --- what a model is given -----------------------------------------------------------------------


def augmented(name, path, training=True, size=64):
    torch.manual_seed(0), np.random.seed(0)
    cfg = load_config(CONFIGS / name, [f"data.image_size={size}"])
    loader = cfg.dataloader.train if training else cfg.dataloader.test
    return instantiate(loader.mapper)(record(path, 24, 40))["image"]


def test_the_first_recipe_gives_squares_padded_with_gray(tmp_path):
    path = write(tmp_path / "x.png")
    test = augmented(BASE, path, training=False)
    assert test.shape == (3, 64, 64)
    assert (test[:, 39:] == 128).all() and not (test[:, :38] == 128).all()
    assert augmented(BASE, path).shape == (3, 64, 64)


def test_the_second_recipe_leaves_padding_to_the_model(tmp_path):
    assert augmented(VITDET, write(tmp_path / "x.png"), training=False).shape == (3, 38, 64)


def test_an_object_without_a_mask_says_so_and_keeps_its_box(tmp_path):
    sample = record(write(tmp_path / "x.png"), 24, 40)
    masked = {**sample["annotations"][0], "segmentation": [[2, 3, 6, 3, 6, 5]]}
    sample["annotations"].append(masked)
    sample["annotations"].append({**masked, "iscrowd": 1})
    instances = mapper(recompute_boxes=True)(sample)["instances"]
    assert instances.gt_has_mask.tolist() == [False, True]
    assert instances.gt_boxes.tensor.tolist() == [[2, 3, 10, 7], [2, 3, 6, 5]]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_run_lengths_polygons_and_boxes_go_together(tmp_path, mask_format):
    sample = record(write(tmp_path / "x.png"), 24, 40)
    polygon = {**sample["annotations"][0], "segmentation": [[2, 3, 6, 3, 6, 5]]}
    sample["annotations"].append(polygon)
    if mask_format == "bitmask":
        coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
        rle = coco.frPyObjects({"size": [24, 40], "counts": [100, 20, 840]}, 24, 40)
        sample["annotations"].append({**polygon, "segmentation": rle})
    instances = mapper(instance_mask_format=mask_format, recompute_boxes=True)(sample)["instances"]
    assert instances.gt_has_mask.tolist()[:2] == [False, True]


def test_an_image_without_objects_has_none(tmp_path):
    sample = record(write(tmp_path / "x.png"), 24, 40)
    sample["annotations"] = []
    assert len(mapper(recompute_boxes=True)(sample)["instances"]) == 0


# --- registration --------------------------------------------------------------------------------


def files(folder, height=24, width=40, **changes):
    """A json beside x.png that has to be mended if there are changes."""
    annotation = dict(id=1, image_id=1, category_id=1, bbox=[2, 3, 8, 4], area=32, iscrowd=0)
    content = dict(
        info={},
        images=[dict(id=1, file_name="x.png", height=height, width=width)],
        annotations=[{**annotation, **changes}],
        categories=[dict(id=1, name="thing")],
    )
    (folder / "x.json").write_text(json.dumps(content))
    return {"json": str(folder / "x.json"), "images": str(folder)}


def test_a_sound_json_is_registered_as_it_is(tmp_path):
    write(tmp_path / "x.png")
    split = register("train", files(tmp_path), tmp_path)
    assert split.json == split.source == str(tmp_path / "x.json") and split.images == 1
    assert [len(r["annotations"]) for r in DatasetCatalog.get("train")] == [1]


def test_a_mended_json_is_registered_from_the_output_folder(tmp_path):
    write(tmp_path / "x.png")
    split = register("train", files(tmp_path, area="big"), tmp_path)
    assert split.json == str(tmp_path / "train.json")
    assert json.loads((tmp_path / "train.json").read_text())["annotations"][0]["area"] == 32


def as_process(monkeypatch, number, local, found):
    """Be one of four processes on two machines; `found` is what the first ones of each found."""
    monkeypatch.setattr(data, "rank", lambda: number)
    monkeypatch.setattr(data, "is_main_process", lambda: number == 0)
    monkeypatch.setattr(data.comm, "get_local_rank", lambda: local)
    monkeypatch.setattr(data.comm, "get_local_size", lambda: 2)
    other = [found[0], None, found[1], None]

    def gather(value):
        return [value if i == number else known for i, known in enumerate(other)]

    monkeypatch.setattr(data, "gather_objects", gather)


def test_each_machine_writes_and_reads_a_json_of_its_own(tmp_path, monkeypatch):
    write(tmp_path / "x.png")
    given = files(tmp_path, area="big")
    splits = [register("train", given, tmp_path), None]
    as_process(monkeypatch, 2, 0, splits)  # the first of the second machine
    splits[1] = register("train", given, tmp_path)
    assert splits[1].json == str(tmp_path / "train-1.json")
    as_process(monkeypatch, 3, 1, splits)
    assert register("train", given, tmp_path).json == str(tmp_path / "train-1.json")
    as_process(monkeypatch, 1, 1, splits)
    assert register("train", given, tmp_path).json == str(tmp_path / "train.json")


def test_machines_with_other_data_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "x.png")
    here = register("train", files(tmp_path), tmp_path)
    there = data.replace(here, images=2)
    as_process(monkeypatch, 0, 0, [here, there])
    with pytest.raises(UsageError, match="not the same on all machines: 1 images, 2 images"):
        register("train", files(tmp_path), tmp_path)


def test_a_fault_that_one_process_finds_ends_all_and_is_told_once(tmp_path, monkeypatch):
    fault = UsageError("no such file")
    as_process(monkeypatch, 0, 0, [fault, None])
    with pytest.raises(UsageError):
        register("train", {"json": "none.json", "images": str(tmp_path)}, tmp_path)
    as_process(monkeypatch, 3, 1, [fault, fault])
    with pytest.raises(SystemExit) as ended:
        register("train", files(tmp_path), tmp_path)
    assert ended.value.code == 2


def test_the_scenes_of_the_demo_are_sound(tmp_path):
    small.write_scenes(tmp_path)
    given = {"json": str(tmp_path / "train.json"), "images": str(tmp_path / "train")}
    assert register("train", given, tmp_path).json == given["json"]
