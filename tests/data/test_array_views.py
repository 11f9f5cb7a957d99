import io
import random
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

from tests.pictures import photo
from util.data.array_stats import measure
from util.data.array_views import (
    ArrayFormat,
    array_transform,
    centre_transform,
    resize,
    split_nodata,
)
from util.data.crop import Box, random_box
from util.data.datasets import open_images, seeded
from util.errors import UsageError

STATS = dict(mean=(20.0, 30.0, 40.0), std=(2.0, 3.0, 4.0))


def npy(array: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    np.save(file, array)
    return file


def scene(kind: str = "u2") -> np.ndarray:
    return np.asarray(photo(48, 64)).astype(kind)


def whole(picture) -> Box:
    return Box(0, 0, picture.size[1], picture.size[0])


def normalized(array: np.ndarray) -> torch.Tensor:
    values = torch.tensor(array.astype("f4")).movedim(-1, 0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATS.values())
    return (values - mean) / std


# --- values --------------------------------------------------------------------------------------


def test_a_resized_array_is_torchs_antialiased_bicubic_of_floats():
    got = array_transform(ArrayFormat(3, **STATS), (24, 32), whole)(npy(scene() * 50))
    expected = F.interpolate(
        normalized(scene() * 50)[None], (24, 32), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(got, expected[0])


@pytest.mark.parametrize("kind", ["u2", "i4", "f4", "f8"])
def test_no_data_become_the_mean_whatever_number_stands_for_them(kind):
    array = scene(kind)
    array[10:20, 5:30] = 9999
    got = array_transform(ArrayFormat(3, nodata=9999, **STATS), (48, 64), whole)(npy(array))
    assert torch.equal(got[:, 10:20, 5:30], torch.zeros(3, 10, 25))
    torch.testing.assert_close(got[:, 20:], normalized(array)[:, 20:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4028234663852886e38])
def test_nan_infinity_and_the_largest_float_are_no_data(value):
    array = scene("f4")
    array[7, 9, 1] = value
    form = ArrayFormat(3, nodata=-3.4028234663852886e38, **STATS)
    got = array_transform(form, (48, 64), whole, keep_nodata=True)(npy(array))
    assert torch.equal(got.isnan().nonzero(), torch.tensor([[1, 7, 9]]))


def test_no_data_by_a_geotiffs_word_join_those_of_the_flag():
    array, file = scene("i2"), io.BytesIO()
    array[10:20, 5:30], array[30:33] = -9999, -1
    tifffile.imwrite(file, array, photometric="rgb", extratags=[(42113, "s", 0, "-9999", True)])
    form = ArrayFormat(3, nodata=-1, **STATS)
    got = array_transform(form, (48, 64), whole, keep_nodata=True)(file)
    expected = (array == -9999) | (array == -1)
    np.testing.assert_array_equal(got.isnan(), np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize("kind", ["i4", "u8", "f8"])
def test_numbers_that_float32_cannot_hold_lose_nothing(kind):
    array = scene(kind) + 10**9
    form = ArrayFormat(3, mean=tuple(m + 1e9 for m in STATS["mean"]), std=STATS["std"])
    got = array_transform(form, (48, 64), whole)(npy(array))
    torch.testing.assert_close(got, normalized(scene()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "value"), [("f2", -np.inf), ("f4", np.inf), ("f8", -1.79e308)])
def test_numbers_beyond_the_range_are_no_data(kind, value):
    array = scene(kind)
    array[7, 9, 1] = value
    form = ArrayFormat(3, nodata=-1.7e308, **STATS)
    got = array_transform(form, (48, 64), whole, keep_nodata=True)(npy(array))
    assert torch.equal(got.isnan().nonzero(), torch.tensor([[1, 7, 9]]))


def test_what_is_resized_from_no_data_and_data_is_the_mean_of_the_data():
    part = torch.full((1, 8, 8), 5.0)
    part[0, :, :3] = torch.nan
    small = resize(part, (4, 4))
    assert small[0, :, 0].isnan().all()
    torch.testing.assert_close(small[0, :, 1:], torch.full((4, 3), 5.0))


def test_numbers_beyond_the_bounds_are_set_to_them():
    low, high = (30.0, 40.0, 50.0), (100.0, 110.0, 120.0)
    form = ArrayFormat(3, clip_min=low, clip_max=high, **STATS)
    got = array_transform(form, (48, 64), whole)(npy(scene()))
    torch.testing.assert_close(got, normalized(np.clip(scene(), low, high)))


def test_valid_values_are_told_apart():
    imgs = torch.tensor([[1.0, torch.nan], [0.0, 2.0]])
    filled, valid = split_nodata(imgs)
    assert torch.equal(filled, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert torch.equal(valid, torch.tensor([[True, False], [True, True]]))


# --- augmentation --------------------------------------------------------------------------------


def views(count: int = 64, **options: object) -> list[torch.Tensor]:
    transform = array_transform(ArrayFormat(3, **STATS), (16, 16), whole, **options)
    file, found = npy(scene()[:48, :48]), []
    for i in range(count):
        with seeded(i):
            found.append(transform(file))
    return found


def distinct(tensors: list[torch.Tensor]) -> int:
    return len({tensor.numpy().tobytes() for tensor in tensors})


def test_flips_and_turns_give_the_eight_views_of_a_square():
    plain = views(1)[0]
    expected = {
        p.rot90(k, (-2, -1)).numpy().tobytes() for p in (plain, plain.flip(-1)) for k in range(4)
    }
    assert {view.numpy().tobytes() for view in views(hflip=True, rot90=True)} == expected
    assert distinct(views(hflip=True)) == 2 and distinct(views()) == 1


def test_a_random_view_depends_on_the_seed_alone():
    choose = partial(random_box, scale=(0.2, 1.0))
    transform = array_transform(ArrayFormat(3, **STATS), (16, 16), choose, hflip=True)
    found = []
    for seed in (1, 2, 1):
        random.seed(99)
        with seeded(seed):
            found.append(transform(npy(scene())))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_the_view_to_evaluate_by_is_around_the_centre():
    got = centre_transform(ArrayFormat(3, **STATS), (32, 32), 0.5)(npy(scene()))
    box = normalized(scene())[:, 12:36, 20:44]
    torch.testing.assert_close(
        got, F.interpolate(box[None], (32, 32), mode="bicubic", antialias=True)[0]
    )


# --- statistics ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Arrays of two sizes, some of their pixels without data; and one that is damaged."""
    arrays = []
    for i, side in enumerate((40, 48, 64)):
        array = np.asarray(photo(side, 50, i % 2)).astype("f4") * (1 + i) + 1e4
        array[:5, : 3 + i] = -1
        np.save(tmp_path / f"{i}.npy", array)
        arrays.append(array.reshape(-1, 3).astype("f8"))
    (tmp_path / "z.npy").write_bytes(b"\x93NUMPY damaged")
    values = np.concatenate(arrays)
    return tmp_path, np.where(values == -1, np.nan, values)


def test_mean_and_std_are_numpys_over_all_data(folder):
    root, values = folder
    found, bad = measure(open_images(root, arrays=True), ArrayFormat(3, nodata=-1))
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], np.nanstd(values, 0), rtol=1e-6)
    assert len(bad) == 1 and "z.npy cannot be decoded" in bad[0]


def test_percentiles_are_numpys_and_mean_and_std_those_within(folder):
    root, values = folder
    found, _ = measure(open_images(root, arrays=True), ArrayFormat(3, nodata=-1), (5, 90))
    low, high = np.nanpercentile(values, (5, 90), axis=0)
    np.testing.assert_allclose(found["clip_min"], low, rtol=1e-6)
    np.testing.assert_allclose(found["clip_max"], high, rtol=1e-6)
    clipped = np.clip(values, low, high)
    np.testing.assert_allclose(found["mean"], np.nanmean(clipped, 0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], np.nanstd(clipped, 0), rtol=1e-6)


def test_a_channel_without_any_data_is_refused(tmp_path):
    array = scene("f4")
    array[..., 1] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match="channel 2 has no data"):
        measure(open_images(tmp_path, arrays=True), ArrayFormat(3))
