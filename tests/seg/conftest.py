import itertools
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import Launcher, Result
from tests.seg.small import Programs, save_pretrained
from util.demo.scenes import annotation, scenes


@pytest.fixture(scope="session")
def programs():
    with Launcher(libraries=("mmseg.models", "mmseg.datasets", "mmengine.runner")) as launcher:
        yield Programs(launcher)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A few scenes in ADE20K's layout: 6 to train on, 5 to validate; all classes are in both."""
    root = tmp_path_factory.mktemp("data")
    for split, chosen in (("training", range(6)), ("validation", (0, 1, 3, 6, 9))):
        for i, scene in enumerate(itertools.islice(scenes(split), 10)):
            if i not in chosen:
                continue
            for kind, pixels in (("images", scene.image), ("annotations", annotation(scene))):
                path = root / kind / split / f"{scene.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint of pretraining on gray pictures of 16 pixels, for the small model."""
    sizes = dict(embed_dim=(16, 24, 32), depth=(1, 1, 2), num_heads=2, patch_size=(2, 2, 1))
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint.pth", 16, **sizes)


@pytest.fixture(scope="session")
def trained(programs, data, pretrained, tmp_path_factory) -> tuple[Path, Result]:
    """The folder and the output of a run of six iterations."""
    work = tmp_path_factory.mktemp("trained")
    arguments = ("--data-path", data, "--pretrained", pretrained, "--work-dir", work)
    result = programs.run("train", *arguments)
    assert result.code == 0, result.err
    return work, result
