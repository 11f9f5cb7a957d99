import pytest
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.vision_transformer_sam import get_rel_pos

from util.layers.rel_pos import (
    RelativePositionBias,
    RelativePositions,
    resize_relative_table,
    shifts_along_axis,
)

HEADS = 3
# Larger, smaller, and one of each; from and to a single row.
GRIDS = [(4, 6), (7, 9), (3, 4), (3, 9), (7, 4), (1, 6), (4, 1), (1, 1)]


def module(grid=(4, 6)):
    torch.manual_seed(0)
    bias = RelativePositionBias(grid, HEADS)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    return bias


def shifts(grid):
    """The shift (rows, columns) between each two tokens, both [L, L]."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return tuple(x.flatten()[:, None] - x.flatten()[None] for x in (rows, columns))


def test_names_and_shapes_are_the_published_ones():
    state = RelativePositionBias((16, 16), 12).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {
        "relative_position_bias_table": [961, 12],
        "relative_position_index": [256, 256],
    }
    assert not state["relative_position_bias_table"].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_bias_of_two_tokens_depends_on_their_shift_alone(grid):
    bias = module()(grid)
    assert bias.shape == (HEADS, grid[0] * grid[1], grid[0] * grid[1])
    known = {}
    for i, (dy, dx) in enumerate(zip(*(s.flatten().tolist() for s in shifts(grid)), strict=True)):
        value = bias.flatten(1)[:, i]
        torch.testing.assert_close(known.setdefault((dy, dx), value), value, rtol=0, atol=0)
    assert len(known) == (2 * grid[0] - 1) * (2 * grid[1] - 1)


def test_the_bias_is_the_tables_row_of_the_shift():
    relative, (height, width) = module(), (4, 6)
    bias, (rows, columns) = relative(), shifts((height, width))
    row = (rows + height - 1) * (2 * width - 1) + columns + width - 1
    expected = relative.relative_position_bias_table[row].permute(2, 0, 1)
    torch.testing.assert_close(bias, expected, rtol=0, atol=0)


def test_a_table_resized_to_its_own_size_is_itself():
    table = torch.randn(7 * 11, HEADS)
    assert resize_relative_table(table, (4, 6), (4, 6)) is table


@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 1)])
def test_shrinking_keeps_the_bias_of_each_shift_exactly(grid):
    table = torch.randn(7, 11, HEADS)
    small = resize_relative_table(table.flatten(0, 1), (4, 6), grid)
    (height, width) = grid
    inner = table[4 - height : 3 + height, 6 - width : 5 + width].flatten(0, 1)
    torch.testing.assert_close(small, inner, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(4, 9), (7, 6), (8, 16)])
def test_growing_keeps_no_shift_and_single_steps_and_reaches_the_ends(grid):
    table = torch.randn(7, 11, HEADS)
    large = resize_relative_table(table.flatten(0, 1), (4, 6), grid)
    large = large.unflatten(0, [2 * n - 1 for n in grid])
    middle, centre = [n - 1 for n in grid], (3, 5)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            torch.testing.assert_close(
                large[middle[0] + dy, middle[1] + dx], table[centre[0] + dy, centre[1] + dx]
            )
    corners = [0, 0, -1, -1], [0, -1, 0, -1]
    torch.testing.assert_close(large[corners], table[corners])


def test_a_grid_that_grows_gets_what_timm_computes():
    table = torch.randn(13 * 13, HEADS)
    ours = resize_relative_table(table, (7, 7), (12, 12))
    theirs = resize_rel_pos_bias_table(table, (12, 12), (23 * 23, HEADS))
    # timm finds its progression to 1e-6 only.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_row_that_a_grid_uses_gets_a_gradient(grid):
    relative = module()
    relative(grid).sum().backward()
    gradient = relative.relative_position_bias_table.grad.unflatten(0, (7, 11))
    inner = [min(new, old) for new, old in zip(grid, (4, 6), strict=True)]
    assert gradient[4 - inner[0] : 3 + inner[0], 6 - inner[1] : 5 + inner[1]].all()


def test_an_attention_can_hold_the_table_itself():
    class Attention(RelativePositions, torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.make_relative_positions((2, 2), HEADS)

    attention = Attention()
    assert attention.relative_position_bias().shape == (HEADS, 4, 4)
    assert "relative_position_bias_table" in dict(attention.named_parameters())


def test_a_grid_met_in_inference_mode_can_be_trained_on_later():
    relative = module()
    with torch.inference_mode():
        relative((5, 8))
    relative((5, 8)).sum().backward()


@pytest.mark.parametrize("size", [5, 3, 8, 1])
def test_shifts_along_an_axis_are_timms(size):
    table = torch.randn(9, 4)
    torch.testing.assert_close(
        shifts_along_axis(table, size), get_rel_pos(size, size, table), rtol=0, atol=0
    )
