import itertools

import numpy as np
import pytest
from PIL import Image

from util.demo import scenes as demo_scenes
from util.demo.digits import digits
from util.demo.scenes import ADE_CLASSES, annotation, scenes, write_ade_scenes


@pytest.fixture(scope="module")
def some():
    """The first scenes of each split."""
    return {split: list(itertools.islice(scenes(split), 30)) for split in demo_scenes.COUNT}


def test_a_scene_says_of_each_digit_what_and_where_it_is(some):
    for scene in itertools.chain(*some.values()):
        height, width = scene.edges.shape
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.labels) == len(scene.masks) <= 7
        assert scene.masks.shape[1:] == (height, width) and scene.masks.dtype == bool
        assert all(mask.sum() >= 30 for mask in scene.masks)
        assert scene.masks.sum(axis=0).max() == 1, "digits overlap"
        assert not (scene.edges & scene.masks.any(axis=0)).any()


def test_ink_stands_out_from_what_is_around_it(some):
    for scene in itertools.chain(*some.values()):
        grey = scene.image.mean(axis=2)
        background = grey[~(scene.masks.any(axis=0) | scene.edges)].mean()
        assert all(grey[mask].mean() > background + 30 for mask in scene.masks)


def test_sizes_digits_and_colours_vary(some):
    scenes_ = some["training"]
    assert len({scene.edges.shape for scene in scenes_}) > 10
    assert {label for scene in scenes_ for label in scene.labels} == set(range(10))
    areas = [mask.sum() for scene in scenes_ for mask in scene.masks]
    assert max(areas) > 5 * min(areas)
    colours = [scene.image[mask].mean(axis=0) for scene in scenes_ for mask in scene.masks]
    assert np.std(colours, axis=0).min() > 15


def test_the_same_scenes_come_out_every_time(some):
    for split, known in some.items():
        for scene, again in zip(known[:3], scenes(split), strict=False):
            np.testing.assert_array_equal(scene.image, again.image)
            np.testing.assert_array_equal(scene.masks, again.masks)
    first, second = (some[split][0].image for split in some)
    assert first.shape != second.shape or (first != second).any()


def test_held_out_digits_are_in_validation_scenes_only(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        demo_scenes, "_ink", lambda pixels, rng: drawn.append(pixels.tobytes()) or np.ones((30, 30))
    )
    parts = {"training": "train/", "validation": "val/"}
    for split, part in parts.items():
        drawn.clear()
        list(itertools.islice(scenes(split), 20))
        known = {pixels.tobytes() for name, pixels in digits().items() if name.startswith(part)}
        assert drawn and set(drawn) <= known


def test_ade20ks_layout_holds_pictures_and_class_maps(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_scenes, "COUNT", {"training": 3, "validation": 2})
    root = write_ade_scenes(tmp_path / "scenes")
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == [
        f"{kind}/{split}/{i:04d}.png"
        for kind in ("annotations", "images")
        for split, count in demo_scenes.COUNT.items()
        for i in range(count)
    ]
    for split in demo_scenes.COUNT:
        for scene in scenes(split):
            image = Image.open(root / "images" / split / f"{scene.name}.png")
            values = np.asarray(Image.open(root / "annotations" / split / f"{scene.name}.png"))
            np.testing.assert_array_equal(np.asarray(image), scene.image)
            np.testing.assert_array_equal(values, annotation(scene))


def test_a_class_map_numbers_digits_from_1_and_ignores_edges(some):
    scene = some["training"][0]
    values = annotation(scene)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        assert (values[mask] == label + 1).all()
        assert ADE_CLASSES[label] == str(label)
    assert (values[scene.edges] == 0).all()
    rest = ~(scene.masks.any(axis=0) | scene.edges)
    assert (values[rest] == 11).all() and ADE_CLASSES[10] == "background"
