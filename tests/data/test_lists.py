"""Lists of images as data paths."""

from pathlib import Path

import pytest

from tests.pictures import decode, write_pictures
from util.data.datasets import ImageFiles, LabeledImages, open_images
from util.data.lists import ImageList
from util.errors import UsageError


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def test_a_list_gives_its_images_in_its_order(tmp_path):
    write_pictures(tmp_path / "some folder", 3)
    absolute = str(tmp_path / "some folder/000.png")
    path = write_list(tmp_path / "list.txt", "some folder/002.png", "", f"{absolute}\r", "")
    files, folder = ImageFiles(path, decode), ImageFiles(tmp_path / "some folder", decode)
    assert [files.path(i) for i in range(len(files))] == [
        str(tmp_path / "some folder/002.png"),
        absolute,
    ]
    assert files[0, 0][0].equal(folder[2, 0][0])


def test_an_image_alone_is_a_data_path(tmp_path):
    write_pictures(tmp_path, 2)
    assert len(open_images(tmp_path / "001.png")) == 1


def test_an_image_that_is_not_there_is_a_bad_file(tmp_path):
    write_pictures(tmp_path, 1)
    files = ImageFiles(write_list(tmp_path / "l.txt", "000.png", "001.png"), decode)
    _, index, bad = files.read(1, 3)
    assert index == 0
    assert bad[0] == (1, "No such file or directory")


@pytest.mark.parametrize("lines", [(), ("nothing.png", "here.png")])
def test_a_list_without_any_image_is_refused(tmp_path, lines):
    path = write_list(tmp_path / "l.txt", *lines)
    with pytest.raises(UsageError, match=r"none of its \d images is there.* a line is the path"):
        ImageList(path)


def test_images_of_a_list_have_no_labels(tmp_path):
    write_pictures(tmp_path, 2)
    path = write_list(tmp_path / "l.txt", "000.png")
    with pytest.raises(UsageError, match="have no labels"):
        LabeledImages(path, decode)
    assert LabeledImages(path, decode, unlabeled=True).labels.tolist() == [-100]
