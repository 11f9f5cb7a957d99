"""Fixed sine-cosine position embeddings on a grid of any number of dimensions."""

from collections.abc import Sequence

import numpy as np


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
    column, the second half the row (paper section 3.1).

    Args:
        embed_dim: channels.
        grid_size: tokens along each dimension.

    Returns:
        `[prod(grid_size), embed_dim]`, float64, rows in row-major order of the grid.

    Raises:
        ValueError: `embed_dim` is no multiple of twice the number of dimensions.
    """
    ndim = len(grid_size)
    if embed_dim % (2 * ndim):
        raise ValueError(
            f"a sine-cosine position embedding of {ndim} dimensions needs a width that is a "
            f"multiple of {2 * ndim}, not {embed_dim}"
        )
    positions = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid_size), indexing="ij")
    return np.concatenate(
        [get_1d_sincos_pos_embed(embed_dim // ndim, p) for p in reversed(positions)], axis=1
    )
