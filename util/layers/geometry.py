"""Sizes, strides and nested blocks: how the tokens of three stages lie on an input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor, nn

# Convolutions by the number of spatial dimensions.
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def show_size(size: Sequence[int]) -> str:
    """A size for people, such as 14x14."""
    return "x".join(map(str, size))


@dataclass(frozen=True)
class Geometry:
    """The input's size and the stages' strides, checked to fit each other.

    Attributes:
        img_size: input size in pixels, one entry a spatial dimension; time, if there is one, first.
        patch_size: for each stage its stride along each dimension.
        mask_unit: stage-3 tokens along each dimension that stay or go together when masked.
    """

    img_size: tuple[int, ...]
    patch_size: tuple[tuple[int, ...], ...]
    mask_unit: tuple[int, ...]

    @classmethod
    def of(
        cls,
        img_size: int | Sequence[int],
        patch_size: Sequence[int | Sequence[int]],
        mask_unit: Sequence[int] | None = None,
    ) -> "Geometry":
        """Expand integers to one entry a dimension; a bare `img_size` is a square image.

        Without a `mask_unit` every token is one.

        Raises:
            ValueError: not three stages, entries of different lengths, a size that the strides do
                not divide, or a grid that the mask unit does not.
        """
        size = (img_size,) * 2 if isinstance(img_size, Integral) else tuple(img_size)
        ndim = len(size)
        entries = patch_size if isinstance(patch_size, Sequence) else ()
        patch = tuple((p,) * ndim if isinstance(p, Integral) else tuple(p) for p in entries)
        if ndim not in CONV:
            raise ValueError(f"img_size {size} must have 2 or 3 dimensions")
        if len(patch) != 3 or any(len(p) != ndim for p in patch):
            raise ValueError(
                f"patch_size {patch_size} does not fit img_size {size}: "
                f"it takes three entries (one a stage), each an int or {ndim} ints"
            )
        if min(min(p) for p in (size, *patch)) < 1:
            raise ValueError(f"img_size {size} and patch_size {patch_size} must be positive")
        strides = tuple(math.prod(p) for p in zip(*patch, strict=True))
        if any(s % stride for s, stride in zip(size, strides, strict=True)):
            raise ValueError(
                f"img_size {show_size(size)} is not divisible by the patch of "
                f"{show_size(strides)} pixels that patch_size {patch_size} makes"
            )
        unit = tuple(mask_unit or (1,) * ndim)
        grid = tuple(s // stride for s, stride in zip(size, strides, strict=True))
        if len(unit) != ndim or any(u < 1 or g % u for g, u in zip(grid, unit, strict=False)):
            raise ValueError(
                f"mask_unit {unit} does not divide the grid of {show_size(grid)} tokens"
            )
        return cls(size, patch, unit)

    @property
    def ndim(self) -> int:
        """Spatial dimensions."""
        return len(self.img_size)

    def stride(self, stage: int) -> tuple[int, ...]:
        """Input pixels per token of `stage` (0 is the input, 3 the last) along each dimension."""
        # Lists, because torch.compile breaks its graph at a generator.
        return tuple([math.prod([p[d] for p in self.patch_size[:stage]]) for d in range(self.ndim)])

    def grid(self, stage: int) -> tuple[int, ...]:
        """Tokens of `stage` along each dimension."""
        return tuple([s // p for s, p in zip(self.img_size, self.stride(stage), strict=True)])

    def nesting(self, stage: int) -> tuple[tuple[int, ...], ...]:
        """The nesting of `stage`'s tokens (0: pixels) in a block, from the outside in."""
        return self.patch_size[stage:][::-1]

    @property
    def num_patches(self) -> int:
        """Tokens of stage 3 (`L`)."""
        return math.prod(self.grid(3))

    @property
    def num_mask_units(self) -> int:
        """Mask units of the grid; the mask takes one random number for each."""
        return self.num_patches // math.prod(self.mask_unit)

    def visible_patches(self, mask_ratio: float) -> int:
        """Stage-3 tokens that stay when a share of the mask units is removed.

        Of `U` units `int(U * (1 - ratio))` stay, MAE's rule; of a video's `U - int(U * ratio)`,
        VideoMAE's (arXiv 2203.12602).

        Raises:
            ValueError: a ratio that removes nothing or everything.
        """
        units = self.num_mask_units
        video = self.ndim == 3
        keep = units - int(units * mask_ratio) if video else int(units * (1 - mask_ratio))
        if not 0 < keep < units:
            unit = "patches" if units == self.num_patches else "mask units"
            raise ValueError(
                f"mask_ratio {mask_ratio} keeps {keep} of {units} {unit}: "
                f"at least one must stay and one must go"
            )
        return keep * math.prod(self.mask_unit)

    def num_masks(self, mask_ratio: float) -> int:
        """Visible sets of `visible_patches` that share no token: the masks of FastConvMAE."""
        return self.num_patches // self.visible_patches(mask_ratio)

    def predicted_patches(self, mask_ratio: float, predict_share: float) -> int:
        """Patches to predict: a share of those that `mask_ratio` removes.

        Raises:
            ValueError: shares that leave nothing to see or to predict.
        """
        removed = self.num_patches - self.visible_patches(mask_ratio)
        predicted = int(removed * predict_share)
        if not 0 < predicted <= removed:
            raise ValueError(
                f"predict_share {predict_share} predicts {predicted} of {removed} removed patches: "
                f"it must be at least one, and at most all of them"
            )
        return predicted

    @property
    def patch_pixels(self) -> int:
        """Input pixels under one stage-3 token."""
        return math.prod(self.stride(3))


def coordinates(index: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The place of each entry of a flattened grid along its dimensions.

    As `torch.unravel_index`, which copies the size to the device and so waits for it.

    Args:
        index: any shape, integers.
        size: of the grid.

    Returns:
        A tensor of the shape of `index` for each dimension.
    """
    places = []
    for length in reversed(size):
        places.append(index % length)
        index = index // length
    return places[::-1]


# By `permute` of positive axes: the old ONNX exporter gets `movedim` and negative ones wrong.


def channels_last(x: Tensor) -> Tensor:
    """View a grid `[N, C, *size]` as `[N, *size, C]`."""
    return x.permute(0, *range(2, x.ndim), 1)


def channels_first(x: Tensor) -> Tensor:
    """View a grid `[N, *size, C]` as `[N, C, *size]`."""
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def to_nested_blocks(x: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """View a grid as nested blocks, without a copy.

    Args:
        x: `[N, C, *size]`.
        units: the nesting from the outside in: a block is `units[0]` cells along each dimension,
            a cell is `units[1]` smaller cells, and so on down to single positions.

    Returns:
        `[N, *blocks, *units[0], *units[1], …, C]`, a view.
    """
    ndim, depth = x.ndim - 2, len(units) + 1
    shape = []
    for d, size in enumerate(x.shape[2:]):
        inner = [unit[d] for unit in units]
        shape += [size // math.prod(inner), *inner]
    order = [2 + d * depth + level for level in range(depth) for d in range(ndim)]
    return x.reshape(*x.shape[:2], *shape).permute(0, *order, 1)


def to_cells(x: Tensor, cell: Sequence[int]) -> Tensor:
    """Gather the positions of each cell of a grid: `[N, *size, C]` to `[N, *size / cell, K, C]`."""
    ndim = len(cell)
    cells = to_nested_blocks(channels_first(x), [cell])  # [N, *grid, *cell, C]
    return cells.flatten(1 + ndim, -2)
