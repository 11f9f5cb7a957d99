import errno
import os

import numpy as np
import pytest
from mmseg.utils import get_classes, get_palette
from PIL import Image

from SEG.data import LoadMask, LoadPicture, class_colours, class_names
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
    np.testing.assert_array_equal(classes_of(mask, 3, False), [[0, 2, 255]])


def test_classes_from_1_with_0_ignored():
    mask = np.array([[0, 1, 3, 255]], np.uint8)
    np.testing.assert_array_equal(classes_of(mask, 3, True), [[255, 0, 2, 255]])


@pytest.mark.parametrize(("value", "zero_ignored"), [(3, False), (254, False), (4, True)])
def test_a_number_that_is_no_class_is_named_with_its_place(value, zero_ignored):
    mask = np.ones((4, 5), np.uint8)
    mask[2, 3] = value
    with pytest.raises(ValueError, match=f"holds {value} at row 2, column 3"):
        classes_of(mask, 3, zero_ignored)


def test_numbers_of_16_bits_do_not_wrap_around():
    with pytest.raises(ValueError, match="holds 256"):
        classes_of(np.array([[256]], np.uint16), 3, False)


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
    sample |= {"num_classes": 3, "reduce_zero_label": False, "ori_shape": (24, 40)}
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
