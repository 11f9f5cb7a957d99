import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from benchmarks.proof.data import prepare, write_cifar10
from tests.pictures import write_pictures
from util.errors import UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """ImageNet's layout: two classes of 10 and 20 training pictures, three and one to test."""
    root = tmp_path_factory.mktemp("source")
    for split, counts in (("train", (10, 20)), ("val", (3, 1))):
        for name, number in zip(("cat", "dog"), counts, strict=True):
            write_pictures(root / split / name, number)
    return root


def names(folder):
    """The pictures that the links of a folder lead to."""
    return {path.resolve() for path in folder.rglob("*.png")}


def test_a_smaller_share_of_the_labels_is_part_of_a_larger_one(source, tmp_path):
    counts = prepare(source, tmp_path, 12, None, [50, 25], tune=False)
    assert counts == {"test": 4, "all": 12, "labels-50": 6, "labels-25": 3}
    quarter, half, everything = (
        names(tmp_path / part / "train") for part in ("labels-25", "labels-50", "all")
    )
    assert [len(quarter), len(half), len(everything)] == [3, 6, 12]
    assert quarter < half < everything
    assert len(list((tmp_path / "all/train/cat").iterdir())) == 6


def test_without_tune_the_pictures_to_judge_by_are_the_test_pictures(source, tmp_path):
    prepare(source, tmp_path, None, None, [], tune=False)
    assert names(tmp_path / "all/val") == names(source / "val")


def test_tune_judges_by_training_pictures_that_are_in_no_training(source, tmp_path):
    prepare(source, tmp_path, None, None, [100], tune=True)
    judged, trained = (names(tmp_path / "all" / split) for split in ("val", "train"))
    assert len(judged) == 3
    assert judged | trained == names(source / "train")
    assert not judged & trained
    assert names(tmp_path / "labels-100/train") == trained


def test_a_share_below_one_picture_leaves_one_of_each_class(source, tmp_path):
    assert prepare(source, tmp_path, None, None, [1], tune=False)["labels-1"] == 2


def test_test_pictures_of_other_classes_are_refused(source, tmp_path):
    write_pictures(tmp_path / "data/train/cat", 2)
    write_pictures(tmp_path / "data/val/fish", 1)
    with pytest.raises(UsageError, match="do not have the same classes"):
        prepare(tmp_path / "data", tmp_path / "out", None, None, [], tune=False)


def test_torchvisions_cifar10_becomes_imagenets_layout(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name, rows, labels):
        return write(name, {"data": pixels[rows].reshape(len(labels), -1), "labels": labels})

    monkeypatch.setattr(CIFAR10, "train_list", [batch("a", slice(4), [0, 1, 1, 0])])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("b", slice(4, 6), [1, 0])])
    name, md5 = write("names", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(CIFAR10, "meta", dict(CIFAR10.meta, filename=name, md5=md5))
    write_cifar10(tmp_path, tmp_path / "out")
    for path, number in (("train/dog/00002.png", 2), ("val/dog/00000.png", 4)):
        picture = np.asarray(Image.open(tmp_path / "out" / path))
        assert np.array_equal(picture, pixels[number].transpose(1, 2, 0))
    assert len(names(tmp_path / "out")) == 6


def test_cifar10_that_is_not_there_and_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(UsageError, match="cannot be fetched"):
        write_cifar10(tmp_path, tmp_path / "out")
