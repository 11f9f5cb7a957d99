"""Relative position bias: one number a head for each shift between two tokens of a grid."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor, nn

Grid = tuple[int, int]


class RelativePositions:
    """Relative position table and index of an attention module, under the published names.

    A mixin, because some models keep the table in their attention and others beside it. Call
    `make_relative_positions` in the constructor of an `nn.Module`.

    Attributes:
        table_grid: height and width, in tokens, that the table is for.
        relative_position_bias_table: `[(2h - 1) * (2w - 1), heads]`, a row a shift, from
            `(-(h - 1), -(w - 1))` in row-major order.
        relative_position_index: `[L, L]`, the table's row for each pair of tokens of that grid.
    """

    table_grid: Grid
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def make_relative_positions(self, grid: Sequence[int], num_heads: int) -> None:
        """Register a table of zeros for a grid `(h, w)`, and its index."""
        height, width = self.table_grid = tuple(grid)
        rows = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        index = gen_relative_position_index(self.table_grid)
        self.register_buffer("relative_position_index", index)

    def relative_position_bias(self, grid: Sequence[int] | None = None) -> Tensor:
        """The bias `[heads, L, L]` that `Attention` adds to the logits.

        Args:
            grid: tokens `(h, w)` of the input, the table's own if not given; for another one the
                table is resized, see `resize_relative_table`.
        """
        table, index = self.relative_position_bias_table, self.relative_position_index
        grid = self.table_grid if grid is None else tuple(grid)
        if grid != self.table_grid:
            table = resize_relative_table(table, self.table_grid, grid)
            index = gen_relative_position_index(grid, device=table.device)
        # The heads come first before the lookup: half the time of turning the result round.
        return table.T.index_select(1, index.flatten()).unflatten(1, index.shape)


class RelativePositionBias(RelativePositions, nn.Module):
    """A relative position bias of its own, for blocks that share it.

    Args:
        grid: height and width in tokens.
        num_heads: attention heads.
    """

    def __init__(self, grid: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.make_relative_positions(grid, num_heads)

    def forward(self, grid: Sequence[int] | None = None) -> Tensor:
        """The bias `[heads, L, L]` for a grid, see `relative_position_bias`."""
        return self.relative_position_bias(grid)


def shifts_along_axis(table: Tensor, size: int) -> Tensor:
    """The entries of each query and key along one axis, as ViTDet looks them up.

    timm has this too (`get_rel_pos`), with places that are made on the host.

    Args:
        table: `[2 * old - 1, C]`, an entry a shift; for another size it is interpolated.
        size: tokens along the axis.

    Returns:
        `[size, size, C]`, for query and key.
    """
    length = 2 * size - 1
    if len(table) != length:
        table = F.interpolate(table.T.unsqueeze(0), length, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    shifts = places.unsqueeze(1) - places + size - 1
    return table.index_select(0, shifts.flatten()).unflatten(0, shifts.shape)


def resize_relative_table(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A table for another grid; differentiable, and nothing leaves the device.

    Along an axis that shrinks, shifts keep their bias exactly. Along one that grows, the known
    shifts are spread in geometric progression, as BEiT does: near ones hardly move, far ones
    cover what is new, and what lies between is interpolated.

    Args:
        table: `[(2h - 1) * (2w - 1), heads]` for the grid `old` `(h, w)`.
        old: the table's grid.
        new: the grid wanted.

    Returns:
        `[(2h' - 1) * (2w' - 1), heads]`; the table itself if the grids are the same.
    """
    if tuple(old) == tuple(new):
        return table
    rows, columns = (
        torch.tensor(_interpolation(*sizes), dtype=table.dtype, device=table.device)
        for sizes in zip(old, new, strict=True)
    )
    values = table.unflatten(0, (rows.shape[1], columns.shape[1]))  # [2h - 1, 2w - 1, heads]
    return torch.einsum("yh,hwc,xw->yxc", rows, values, columns).flatten(0, 1)


@cache
def _interpolation(old: int, new: int) -> np.ndarray:
    """The matrix `[2 * new - 1, 2 * old - 1]` from the biases along one axis to the new ones."""
    half = _known_shifts(old, new)
    known = np.concatenate([-half[::-1], [0], half])
    wanted = np.arange(1 - new, new)
    return np.stack([np.interp(wanted, known, unit) for unit in np.eye(len(known))], axis=1)


def _known_shifts(old: int, new: int) -> np.ndarray:
    """Places of the known shifts 1 … old - 1: `1 + q + q² + …`, the last at `new - 1`."""
    steps = np.arange(old - 1)
    if new <= old:
        return steps + 1.0
    low, high = 1.0, float(new)
    for _ in range(60):  # halves the interval down to float64's resolution
        q = (low + high) / 2
        low, high = (low, q) if (q**steps).sum() > new - 1 else (q, high)
    return np.cumsum(low**steps)
