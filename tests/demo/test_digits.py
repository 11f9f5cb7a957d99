import hashlib
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from util.data.datasets import ImageFiles
from util.data.folders import list_images
from util.data.transforms import pretrain_transform
from util.demo import digits as demo_data
from util.demo.digits import write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("demo") / "digits")


@pytest.fixture
def few(monkeypatch) -> None:
    """Only 100 of the digits, for what does not depend on how many there are."""
    some = dict(list(demo_data.digits().items())[:100])
    monkeypatch.setattr(demo_data, "digits", lambda: some)


def content(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_every_digit_is_written_once(digits):
    assert len(list(digits.rglob("*.png"))) == 1797
    assert sorted(path.name for path in digits.iterdir()) == ["train", "val"]
    for split in ("train", "val"):
        assert sorted(path.name for path in (digits / split).iterdir()) == list("0123456789")


def test_a_fifth_of_each_class_is_held_out(digits):
    everything = Counter(path.parent.name for path in digits.rglob("*.png"))
    for label, count in everything.items():
        assert len(list((digits / "val" / label).iterdir())) == pytest.approx(count / 5, abs=1)


def test_a_picture_shows_its_digit(digits):
    images, labels = load_digits(return_X_y=True)
    for path in sorted(digits.rglob("*.png"))[::100]:
        index = int(path.stem)
        image = Image.open(path)
        assert image.mode == "L" and image.size == (32, 32)
        assert str(labels[index]) == path.parent.name
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).reshape(-1)
        assert np.corrcoef(small, images[index])[0, 1] > 0.95


def test_black_to_white_is_the_whole_range(digits):
    pixels = np.stack([np.asarray(Image.open(path)) for path in list_images(digits / "val")[:50]])
    assert pixels.min() == 0 and pixels.max() == 255


def test_a_data_set_reads_the_training_part(digits):
    data = ImageFiles(digits / "train", pretrain_transform((32, 32), 1, hflip=False))
    assert len(data) == 1437
    image, bad = data[0, 0]
    assert image.shape == (1, 32, 32) and bad == ()


def test_a_complete_copy_is_left_as_it_is(digits, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    monkeypatch.setattr(demo_data, "_move", None)
    assert write_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_an_interrupted_copy_is_completed(few, tmp_path):
    root = write_digits(tmp_path / "digits")
    complete = content(root)
    for path in list((root / "train").rglob("*.png"))[::2]:
        path.unlink()
    shutil.rmtree(root / "val")
    assert content(write_digits(root)) == complete
    assert sorted(path.name for path in root.iterdir()) == ["train", "val"]


def test_an_interrupt_while_writing_leaves_nothing(few, tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "_move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_may_write_at_once(few, tmp_path):
    alone, root = write_digits(tmp_path / "alone"), tmp_path / "digits"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(write_digits, [root] * 4, chunksize=1) == [root] * 4
    assert content(root) == content(alone)
    assert sorted(path.name for path in root.iterdir()) == ["train", "val"]
