from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from util.layers.pos_embed import (
    get_1d_sincos_pos_embed,
    get_sincos_pos_embed,
    resize_pos_embed,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "lars_and_pos_embed.safetensors"


@pytest.mark.parametrize(
    ("name", "width", "side", "every"), [("16.4", 16, 4, 1), ("768.14", 768, 14, 13)]
)
def test_table_equals_the_originals(name, width, side, every):
    golden = load_file(GOLDEN)[f"pos_embed.{name}"]
    table = get_sincos_pos_embed(width, (side, side))
    assert table.shape == (side * side, width)
    np.testing.assert_allclose(table[::every], golden, rtol=0, atol=1e-6)


def test_one_dimension_is_sines_then_cosines():
    table = get_1d_sincos_pos_embed(4, np.array([0.0, 3.0]))
    angles = [3.0, 3.0 / 10000**0.5]
    expected = [[0, 0, 1, 1], [*np.sin(angles), *np.cos(angles)]]
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-15)


def test_first_half_is_the_column_and_second_half_the_row():
    table = get_sincos_pos_embed(8, (2, 3)).reshape(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                get_1d_sincos_pos_embed(4, np.array([float(column)])),
                get_1d_sincos_pos_embed(4, np.array([float(row)])),
            ]
            np.testing.assert_array_equal(table[row, column], np.concatenate(expected, 1)[0])


def test_three_dimensions_share_the_channels_last_dimension_first():
    table = get_sincos_pos_embed(12, (2, 3, 4)).reshape(2, 3, 4, 12)
    for place in np.ndindex(2, 3, 4):
        expected = [get_1d_sincos_pos_embed(4, np.array([float(p)])) for p in reversed(place)]
        np.testing.assert_array_equal(table[place], np.concatenate(expected, 1)[0])


def test_what_is_left_over_goes_to_the_last_dimensions():
    table = get_sincos_pos_embed(16, (2, 3, 4)).reshape(2, 3, 4, 16)
    for place in np.ndindex(2, 3, 4):
        widths = zip((6, 6, 4), reversed(place), strict=True)
        expected = [get_1d_sincos_pos_embed(width, np.array([float(p)])) for width, p in widths]
        np.testing.assert_array_equal(table[place], np.concatenate(expected, 1)[0])


@pytest.mark.parametrize(
    ("width", "grid", "multiple"), [(18, (2, 2), 4), (17, (2, 2, 2), 2), (4, (2, 2, 2), 2)]
)
def test_width_that_does_not_divide_is_refused_with_the_numbers(width, grid, multiple):
    with pytest.raises(
        ValueError, match=rf"{len(grid)} dimensions.*multiple of {multiple}, .*{width}"
    ):
        get_sincos_pos_embed(width, grid)


@pytest.mark.parametrize("prefix_rows", [0, 1])
@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((6, 10), (9, 4)), ((14, 14), (10, 18))],
    ids=str,
)
def test_a_table_is_resized_by_plain_bicubic_interpolation(old, new, prefix_rows):
    torch.manual_seed(0)
    table = torch.randn(1, prefix_rows + old[0] * old[1], 5)
    grid = table[:, prefix_rows:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :prefix_rows], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    resized = resize_pos_embed(table, old, new, prefix_rows)
    torch.testing.assert_close(resized, expected, rtol=0, atol=0)
