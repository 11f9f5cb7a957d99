import numpy as np
import pytest

from DET.masks import is_number, is_polygon, polygons_extent, rle_extent, rle_runs

coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")


def bitmaps():
    """Masks of several sizes and densities, some with runs through whole columns."""
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (3, 5), (40, 30), (120, 90), (2, 900)]:
        for share in (0.02, 0.5, 0.97, 1.0):
            yield (rng.random((height, width)) < share).astype(np.uint8)
    blob = np.zeros((300, 200), np.uint8)
    blob[40:220, 30:170] = 1
    yield blob


def encoded(bitmap):
    rle = coco.encode(np.asfortranarray(bitmap))
    return {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}


@pytest.mark.parametrize("bitmap", list(bitmaps()))
def test_runs_are_those_that_pycocotools_writes(bitmap):
    runs = rle_runs(encoded(bitmap), *bitmap.shape)
    values = np.arange(len(runs)) % 2
    ours = np.repeat(values, runs).reshape(bitmap.shape, order="F")
    np.testing.assert_array_equal(ours, bitmap)


@pytest.mark.parametrize("bitmap", [b for b in bitmaps() if b.any()])
def test_box_and_area_of_runs_are_those_of_pycocotools(bitmap):
    mask = encoded(bitmap)
    box, area = rle_extent(rle_runs(mask, *bitmap.shape), bitmap.shape[0])
    assert area == coco.area(mask) == bitmap.sum()
    ys, xs = np.nonzero(bitmap)
    assert box == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)


def test_a_mask_without_ones_has_no_area():
    assert rle_extent(rle_runs(encoded(np.zeros((4, 5), np.uint8)), 4, 5), 4)[1] == 0


@pytest.mark.parametrize(
    "counts",
    [
        [], [19], [21], [-1, 21], [10, 10.0], [10, "10"], [10, None], [1e999], [2**70], [True, 19],
        "", "a", "0", "`", "é", "\x00", "PPPPPPPPPPPPP1", "o" * 40, 5, None, {}, [[20]],
    ],
)  # fmt: skip
def test_counts_that_do_not_make_the_image_are_refused(counts):
    assert rle_runs({"size": [4, 5], "counts": counts}, 4, 5) is None


@pytest.mark.parametrize("size", [[5, 4], [4], 4, None, "45", [4, 5, 1]])
def test_a_size_that_is_not_the_images_is_refused(size):
    assert rle_runs({"size": size, "counts": [20]}, 4, 5) is None
    assert rle_runs({"size": [4, 5], "counts": [20]}, 4, 5).tolist() == [20]


def test_any_change_of_a_string_is_refused_or_means_another_mask():
    """What pycocotools would be given after a damage adds up to the image."""
    good = encoded((np.random.default_rng(1).random((30, 40)) < 0.3).astype(np.uint8))
    rng, refused = np.random.default_rng(2), 0
    for _ in range(2000):
        text = list(good["counts"])
        text[rng.integers(len(text))] = chr(rng.integers(32, 127))
        runs = rle_runs({**good, "counts": "".join(text)}, 30, 40)
        refused += runs is None
        if runs is not None:
            assert runs.sum() == 1200 and (runs >= 0).all()
            assert coco.area({**good, "counts": "".join(text)}) == runs[1::2].sum()
    assert refused > 1000


def test_numbers_are_finite_and_no_truth_values():
    assert all(map(is_number, (0, -3, 1.5, 10**300)))
    assert not any(map(is_number, (True, "1", None, float("nan"), float("inf"), 10**400, [1])))


def test_polygons_have_three_points_of_numbers():
    assert is_polygon([0, 0, 1, 0, 1, 1])
    bad = ([0, 0, 1, 0, 1], [0] * 4, [0, 0, 1, 0, 1, "1"], [0, 0, 1, 0, 1, 1e9], "abcdef", 5)
    assert not any(map(is_polygon, bad))


def test_box_and_area_of_polygons():
    parts = [[2, 3, 6, 3, 6, 5, 2, 5], [10, 1, 12, 1, 10, 4]]
    assert polygons_extent(parts) == ((2, 1, 10, 4), 8 + 3)
