"""Position embeddings on a grid of any number of dimensions: fixed sine-cosine ones, resizing."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def get_1d_sincos_pos_embed(embed_dim: int, positions: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of positions at geometrically spaced frequencies.

    Args:
        embed_dim: channels, even.
        positions: any shape, `M` numbers in all.

    Returns:
        `[M, embed_dim]`, float64.
    """
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angles = np.outer(positions.reshape(-1), omega)  # [M, embed_dim / 2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def get_sincos_pos_embed(embed_dim: int, grid_size: Sequence[int]) -> np.ndarray:
    """Position embedding of a grid: an equal share of the channels encodes each dimension.

    As in MAE the last dimension comes first: in 2-d the first half of the channels encodes the
    column, the second half the row (paper section 3.1). In 3-d, where powers of two have no
    third, the first shares take the pairs of channels that are left over.

    Args:
        embed_dim: channels; a multiple of twice the dimensions, in 3-d any even number from 6 on.
        grid_size: tokens along each dimension.

    Returns:
        `[prod(grid_size), embed_dim]`, float64, rows in row-major order of the grid.

    Raises:
        ValueError: another width.
    """
    ndim = len(grid_size)
    multiple = 2 if ndim == 3 else 2 * ndim
    if embed_dim % multiple or embed_dim < 2 * ndim:
        raise ValueError(
            f"a sine-cosine position embedding of {ndim} dimensions needs a width of at least "
            f"{2 * ndim} that is a multiple of {multiple}, not {embed_dim}"
        )
    pairs, left = divmod(embed_dim // 2, ndim)
    shares = [2 * (pairs + (d < left)) for d in range(ndim)]
    positions = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid_size), indexing="ij")
    tables = map(get_1d_sincos_pos_embed, shares, reversed(positions))
    return np.concatenate(list(tables), axis=1)


def resize_pos_embed(
    table: Tensor, old: Sequence[int], new: Sequence[int], num_prefix_tokens: int = 0
) -> Tensor:
    """A position table for another grid: bicubic in space, linear in time.

    Nothing is antialiased where the grid shrinks, as in the original code. A table of
    images becomes one of videos by repeating it over time.

    Args:
        table: `[1, prefix + prod(old), C]`.
        old: its grid, (H, W) or (T, H, W).
        new: the grid wanted, of as many dimensions, or (T, H, W) where `old` is (H, W).
        num_prefix_tokens: rows before those of the grid; they stay as they are.

    Returns:
        `[1, prefix + prod(new), C]`.
    """
    prefix, rows = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    frames, size = math.prod(new[:-2]), list(new[-2:])
    before = math.prod(old[:-2])
    # The frames go among the channels: [1, T * L, C] -> [1, L, T * C], L = H * W.
    rows = rows.unflatten(1, (before, -1)).transpose(1, 2).flatten(2)
    rows = resample_abs_pos_embed(rows, size, list(old[-2:]), num_prefix_tokens=0, antialias=False)
    rows = rows[0].unflatten(-1, (before, -1))  # [L, T, C]
    if before != frames:
        over_time = F.interpolate(rows.transpose(1, 2).float(), frames, mode="linear")
        rows = over_time.transpose(1, 2).to(rows.dtype)
    rows = rows.transpose(0, 1).flatten(0, 1)  # [T * L, C]
    return torch.cat([prefix, rows.unsqueeze(0)], dim=1)
