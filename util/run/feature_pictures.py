"""Feature maps as pictures: principal components as colours, scalar maps by a colour scale."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from util.data.transforms import denormalize

_CUT = 1.0  # percent of the values at either end that are drawn as the brightest or darkest


def pca_colors(features: Tensor) -> Tensor:
    """The first three principal components of features as red, green and blue.

    The components are those of all features given, so that a colour means the same in all maps.
    Each has the sign that makes its largest entry positive.

    Args:
        features: `[N, *grid, C]`, `C` at least 3.

    Returns:
        `[N, 3, *grid]` in [0, 1].
    """
    x = features.flatten(0, -2).double()
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.T @ x)  # ascending
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = x @ axes
    low, high = (values.new_tensor(v) for v in np.percentile(values, (_CUT, 100 - _CUT), axis=0))
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return colors.view(*features.shape[:-1], 3).movedim(-1, 1)


def scale_colors(maps: Tensor) -> Tensor:
    """Maps `[N, *grid]` by matplotlib's viridis, each from its least to its greatest value.

    Returns:
        `[N, 3, *grid]` in [0, 1].
    """
    from matplotlib import colormaps

    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scaled = ((flat - low) / (high - low).clamp(min=1e-12)).view(maps.shape)
    return torch.from_numpy(colormaps["viridis"](scaled.numpy())[..., :3]).float().movedim(-1, 1)


def feature_grid(
    samples: Tensor,
    maps: Sequence[Tensor],
    columns: int = 8,
    show: Callable[[Tensor, int], Tensor] = denormalize,
) -> Tensor:
    """Samples beside their maps: of images a row each; of clips the frames as columns.

    Args:
        samples: `[N, C, *size]`, images or clips, normalised.
        maps: each `[N, 3, *grid]` in [0, 1].
        columns: frames of a clip to show, at equal distances.
        show: from samples, and the dimension of their channels, to pictures in [0, 1].

    Returns:
        `[3, height, width]` in [0, 1].
    """
    size = samples.shape[2:]
    originals = show(samples, 1)[:, :3].expand(-1, 3, *[-1] * len(size))
    rows = [originals, *(F.interpolate(m, size, mode="nearest") for m in maps)]
    # Small pictures are enlarged so that a person sees them.
    scale = max(1, 96 // size[-1])
    shown = torch.stack(rows, dim=1)  # [N, 1 + maps, 3, *size]
    shown = shown.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    if len(size) == 2:
        return make_grid(shown.flatten(0, 1), nrow=len(rows), padding=4, pad_value=1)
    length = size[0]
    columns = min(columns, length)
    frames = shown[:, :, :, [i * length // columns for i in range(columns)]].movedim(2, 3)
    grids = [
        make_grid(clip.flatten(0, 1), nrow=columns, padding=2, pad_value=1) for clip in frames
    ]  # each of [1 + maps, columns, 3, H, W]
    return make_grid(grids, nrow=1, padding=6, pad_value=1)
