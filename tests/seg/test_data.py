import errno
import os
from pathlib import Path

import numpy as np
import pytest
from mmseg.utils import get_classes, get_palette
from PIL import Image

from SEG.data import ImagesAndMasks, LoadMask, LoadPicture, class_colours, class_names
from SEG.masks import classes_of, read_mask
from tests.pictures import picture
from util.data import files
from util.errors import TrainingError, UsageError


def test_classes_are_a_number_a_file_a_known_set_or_names(tmp_path):
    (tmp_path / "names.txt").write_text("tree\n\n  road \n", encoding="utf-8")
    assert class_names(3) == ["class 0", "class 1", "class 2"]
    assert class_names(str(tmp_path / "names.txt")) == ["tree", "road"]
    assert class_names("ade20k") == get_classes("ade20k")
    assert class_names(("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("classes", [0, 1, 255, "no such file"])
def test_classes_that_masks_cannot_hold_are_refused(classes):
    with pytest.raises(UsageError, match="classes"):
        class_names(classes)


def test_colours_are_ade20ks_own_or_always_the_same():
    assert class_colours(get_classes("ade20k")) == get_palette("ade20k")
    first, second = class_colours(["a", "b", "c"]), class_colours(["x", "y", "z"])
    assert first == second and len({tuple(c) for c in first}) == 3


def test_classes_from_0_with_255_ignored():
    mask = np.array([[0, 2, 255]], np.uint8)
    np.testing.assert_array_equal(classes_of(mask, 3), [[0, 2, 255]])


def test_classes_from_1_with_0_ignored():
    mask = np.array([[0, 1, 3, 255]], np.uint8)
    np.testing.assert_array_equal(classes_of(mask, 3, (0,)), [[255, 0, 2, 255]])


def test_classes_are_the_numbers_that_are_not_ignored_in_their_order():
    """Cityscapes' own table: its `labelIds` as masks, the 19 classes' `trainIds`."""
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    others = [n for n in range(34) if n not in ids]
    mask = np.array([[*ids, *others, 255]], np.uint8)
    found = classes_of(mask, 19, others)
    np.testing.assert_array_equal(found, [[*range(19), *[255] * (len(others) + 1)]])


@pytest.mark.parametrize(("value", "ignored"), [(3, ()), (254, ()), (4, (0,)), (4, (2,))])
def test_a_number_that_is_no_class_is_named_with_its_place(value, ignored):
    mask = np.ones((4, 5), np.uint8)
    mask[2, 3] = value
    with pytest.raises(ValueError, match=f"holds {value} at row 2, column 3"):
        classes_of(mask, 3, ignored)


def test_numbers_of_16_bits_do_not_wrap_around():
    with pytest.raises(ValueError, match="holds 256"):
        classes_of(np.array([[256]], np.uint16), 3)


def test_masks_are_grayscale_palette_or_bilevel(tmp_path):
    values = np.array([[0, 1], [1, 0]], np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    pictures = [Image.fromarray(values), palette, Image.fromarray(values.astype(bool))]
    for i, image in enumerate([*pictures, Image.fromarray(values.astype(np.uint16))]):
        image.save(tmp_path / f"{i}.png")
        np.testing.assert_array_equal(read_mask(str(tmp_path / f"{i}.png")), values)


def test_an_alpha_channel_that_hides_nothing_is_left_away(tmp_path):
    values = np.array([[0, 1], [1, 0]], np.uint8)
    for alpha in (255, 0):
        opaque = Image.merge("LA", (Image.fromarray(values), Image.new("L", (2, 2), alpha)))
        opaque.save(tmp_path / f"{alpha}.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "255.png")), values)
    with pytest.raises(UsageError, match="partly transparent"):
        read_mask(str(tmp_path / "0.png"))


@pytest.mark.parametrize("names", [["a", "b", "a"], ["x"] * 3])
def test_a_name_twice_is_refused(names):
    with pytest.raises(UsageError, match="classes with one name cannot be told apart"):
        class_names(names)


def test_a_known_set_is_read_as_its_masks_are_written():
    assert len(class_names("ade20k", zero_ignored=True)) == 150
    with pytest.raises(UsageError, match="0 is ignored: add --ignore-zero"):
        class_names("ade20k", zero_ignored=False)


def test_a_colour_picture_is_no_mask(tmp_path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="colour picture"):
        read_mask(str(tmp_path / "a.png"))


def test_a_mask_is_what_its_content_says_and_a_regular_file(tmp_path):
    """Ghostscript would be started for the first, the second would be waited for for ever."""
    picture().save(tmp_path / "a.png", "EPS")
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded: it is no sound file of JPEG"):
        read_mask(str(tmp_path / "a.png"))
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"b\.png cannot be decoded: it is a FIFO"):
        read_mask(str(tmp_path / "b.png"))


@pytest.mark.parametrize("failures", [1, 9])
def test_a_storage_that_fails_is_not_taken_for_a_damaged_mask(tmp_path, monkeypatch, failures):
    values, opened = np.array([[0, 1], [1, 0]], np.uint8), []
    Image.fromarray(values).save(tmp_path / "a.png")
    open_regular = files.open_regular

    def flaky(path):
        opened.append(path)
        if len(opened) <= failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", flaky)
    monkeypatch.setattr(files, "RETRY_DELAYS", (0, 0))
    if failures == 1:
        np.testing.assert_array_equal(read_mask(str(tmp_path / "a.png")), values)
    else:
        with pytest.raises(TrainingError, match=r"a\.png cannot be read, tried 3 times"):
            read_mask(str(tmp_path / "a.png"))


def test_a_damaged_mask_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded"):
        read_mask(str(tmp_path / "a.png"))


def test_a_mask_is_checked_against_its_image_and_read(tmp_path):
    path = str(tmp_path / "mask.png")
    Image.fromarray(np.full((24, 40), 2, np.uint8)).save(path)
    sample = {"img_path": "image.png", "seg_map_path": path, "seg_fields": []}
    sample |= {"num_classes": 3, "ignored": (), "ori_shape": (24, 40)}
    result = LoadMask()(dict(sample, seg_fields=[]))
    assert (result["gt_seg_map"] == 2).all() and result["seg_fields"] == ["gt_seg_map"]
    with pytest.raises(UsageError, match=r"has 40x24 pixels, its image image\.png has 24x40"):
        LoadMask()(dict(sample, ori_shape=(40, 24)))


def test_a_picture_is_read_as_a_viewer_shows_it_in_mmsegs_order(tmp_path):
    image = picture(1, 24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    result = LoadPicture()({"img_path": str(tmp_path / "a.png")})
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(result["img"], upright[..., ::-1])
    assert result["img_shape"] == result["ori_shape"] == (40, 24)


def test_a_damaged_picture_is_an_error_or_skipped_and_named_once(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    sample = {"img_path": str(tmp_path / "a.png")}
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded"):
        LoadPicture()(sample)
    skipping = LoadPicture(skip_bad=True)
    assert skipping(sample) is None and skipping(sample) is None
    assert capsys.readouterr().err.count("skipped") == 1


def write_pictures(root: Path, *names: str) -> None:
    """Pictures of 4x4 zeros."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)


def samples(root: Path, images: str, masks: str, **arguments) -> list[tuple[str, str]]:
    """Image and mask of each sample, below a folder."""
    prefix = dict(img_path=images, seg_map_path=masks)
    found = ImagesAndMasks(classes=2, data_root=str(root), data_prefix=prefix, **arguments)
    paths = [
        (s["img_path"], s["seg_map_path"]) for s in map(found.get_data_info, range(len(found)))
    ]
    return [tuple(str(Path(path).relative_to(root)) for path in pair) for pair in paths]


def test_a_list_of_images_is_read_as_pascal_vocs(tmp_path):
    write_pictures(tmp_path, *(f"JPEGImages/{i}.jpg" for i in "abc"), "masks/c.png", "masks/a.png")
    (tmp_path / "train.txt").write_text("c\na\n")
    found = samples(tmp_path, "JPEGImages", "masks", ann_file="train.txt")
    assert found == [("JPEGImages/c.jpg", "masks/c.png"), ("JPEGImages/a.jpg", "masks/a.png")]
    (tmp_path / "train.txt").write_text("c\nd\n")
    with pytest.raises(UsageError, match=r"names 1 images that are not there: d "):
        samples(tmp_path, "JPEGImages", "masks", ann_file="train.txt")


def test_endings_of_names_are_those_of_cityscapes(tmp_path, capsys):
    image, mask = "left/x_{}_leftImg8bit.png", "gt/x_{}_gtFine_labelIds.png"
    write_pictures(
        tmp_path, *(name.format(i) for i in (1, 2) for name in (image, mask)), "left/other.png"
    )
    endings = dict(img_suffix="_leftImg8bit.png", seg_map_suffix="_gtFine_labelIds.png")
    found = samples(tmp_path, "left", "gt", **endings)
    assert found == [(image.format(i), mask.format(i)) for i in (1, 2)]
    assert "left are left out: 1 ending otherwise" in capsys.readouterr().out


def test_an_ignore_index_of_mmsegmentation_is_refused_with_what_does_it(tmp_path):
    with pytest.raises(UsageError, match=r"ignore_index=11: give ignored=\[11\]"):
        samples(tmp_path, "images", "masks", ignore_index=11)
