import math
from itertools import product

import numpy as np
import pytest
import torch

from util.layers.geometry import Geometry, coordinates, to_nested_blocks


@pytest.mark.parametrize(
    ("size", "units"),
    [
        ((6,), [(3,)]),
        ((12,), [(3,), (2,)]),
        ((4, 6), []),
        ((4, 6), [(2, 3)]),
        ((8, 12), [(2, 3), (2, 1)]),
        ((8, 6), [(2, 1), (1, 3), (2, 2)]),
        ((4, 4, 6), [(2, 1, 3)]),
        ((4, 4, 6), [(1, 2, 3), (2, 1, 1)]),
    ],
)
def test_nested_blocks_equal_a_plain_loop(size, units):
    ndim = len(size)
    x = torch.arange(2 * 3 * math.prod(size)).view(2, 3, *size)
    blocks = to_nested_blocks(x, units)

    counts = [s // math.prod(unit[d] for unit in units) for d, s in enumerate(size)]
    assert blocks.shape == (2, *counts, *(u for unit in units for u in unit), 3)
    for image, channel in product(range(2), range(3)):
        for inner in np.ndindex(*blocks.shape[1:-1]):
            place = list(inner[:ndim])
            for level, unit in enumerate(units, start=1):
                for d in range(ndim):
                    place[d] = place[d] * unit[d] + inner[level * ndim + d]
            assert blocks[(image, *inner, channel)] == x[(image, channel, *place)]


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 4)])
def test_coordinates_are_numpy_s(size):
    index = torch.randint(math.prod(size), (2, 9))
    expected = np.unravel_index(index.numpy(), size)
    assert all(map(np.array_equal, coordinates(index, size), expected))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nested_blocks_are_a_view(memory_format):
    x = torch.zeros(2, 3, 8, 12).contiguous(memory_format=memory_format)
    blocks = to_nested_blocks(x, [(2, 3), (2, 1)])
    x.fill_(1)
    assert blocks.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert blocks.eq(1).all()


def test_integer_sizes_are_square():
    assert Geometry.of(64, (4, 2, 2)) == Geometry.of((64, 64), ((4, 4), (2, 2), [2, 2]))


def test_geometry_counts_tokens_and_pixels():
    geometry = Geometry.of((96, 160), ((4, 2), (2, 2), (1, 5)))
    assert [geometry.stride(stage) for stage in range(4)] == [(1, 1), (4, 2), (8, 4), (8, 20)]
    assert [geometry.grid(stage) for stage in range(4)] == [(96, 160), (24, 80), (12, 40), (12, 8)]
    assert (geometry.ndim, geometry.num_patches, geometry.patch_pixels) == (2, 96, 160)


def test_geometry_has_as_many_dimensions_as_the_input():
    geometry = Geometry.of((16, 64, 64), ((2, 4, 4), (1, 2, 2), (1, 2, 2)))
    assert (geometry.ndim, geometry.grid(3)) == (3, (8, 4, 4))


@pytest.mark.parametrize(
    ("img_size", "patch_size", "message"),
    [
        (100, (4, 2, 2), "100x100 is not divisible by the patch of 16x16 pixels"),
        ((96, 100), (4, 2, 2), "96x100 is not divisible by the patch of 16x16 pixels"),
        ((16, 60), ((4, 2), (2, 2), (1, 2)), "16x60 is not divisible by the patch of 8x8 pixels"),
        (64, (4, 4), r"patch_size \(4, 4\) .* three entries"),
        (64, (2, 2, 2, 2), r"patch_size \(2, 2, 2, 2\) .* three entries"),
        (64, (4, 2, (2, 2, 2)), r"does not fit img_size \(64, 64\).* an int or 2 ints"),
        (0, (4, 2, 2), r"img_size \(0, 0\) .* must be positive"),
        (64, (4, 0, 2), r"patch_size \(4, 0, 2\) must be positive"),
    ],
)
def test_geometry_that_does_not_fit_is_refused_with_the_numbers(img_size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        Geometry.of(img_size, patch_size)
