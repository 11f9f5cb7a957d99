from pathlib import Path

import pytest

from tests.tools import small
from tests.video.movies import write_classes as write_movies


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """`train/` and `val/` of 3 classes, 24 and 17 pictures."""
    root = tmp_path_factory.mktemp("classes")
    small.write_classes(root / "train", 24)
    small.write_classes(root / "val", 17, first=100)
    return root


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    return small.save_classifier(tmp_path_factory.mktemp("classifier") / "classifier.pth")


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory) -> Path:
    return small.save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "autoencoder.pth")


@pytest.fixture(scope="session")
def video_classifier(tmp_path_factory) -> Path:
    return small.save_video_classifier(tmp_path_factory.mktemp("video") / "video.pth")


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """`val/` of 2 classes, 3 videos."""
    return write_movies(tmp_path_factory.mktemp("videos"), {"val": {"jump": 2, "run": 1}})
