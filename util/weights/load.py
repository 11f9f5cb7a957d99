"""Load weights into a model by name and shape, with a report; what cannot fit is refused."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.errors import UsageError, printable
from util.layers.architecture import Architecture
from util.layers.geometry import show_size
from util.layers.pos_embed import resize_pos_embed
from util.layers.rel_pos import RelativePositions, resize_relative_table
from util.weights.read import BACKBONES, HEADS, KINDS, Weights, within

# Buffers that follow from the grid: a model has its own, whatever a file says.
_COMPUTED = "relative_position_index"


@dataclass(frozen=True)
class Report:
    """The result of matching weights to a model.

    Attributes:
        path: the file.
        loaded: how many tensors were taken.
        resized: position tables resized to the model's grid, and the first convolution adapted to
            its channels, with both sizes.
        recomputed: fixed position tables that are the model's own, other than the file's.
        missing: the model's names that begin anew.
        unexpected: the file's names that the model does not have.
        averaged: whether these are a run's averaged weights.
    """

    path: Path
    loaded: int
    resized: list[str]
    missing: list[str]
    unexpected: list[str]
    averaged: bool = False
    recomputed: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"weights of {self.path}: {self.loaded} tensors loaded"]
        lines[0] += ", the run's average (EMA)" if self.averaged else ""
        if self.resized:
            lines.append(f"  resized: {', '.join(self.resized)}")
        if self.recomputed:
            lines.append(f"  fixed, computed anew: {', '.join(self.recomputed)}")
        if self.missing:
            lines.append(f"  missing there, begin anew: {_modules(self.missing)}")
        if self.unexpected:
            lines.append(f"  unexpected, not used: {_modules(self.unexpected)}")
        return "\n".join(lines)


def _modules(names: Sequence[str]) -> str:
    """Names, summed up by the module they belong to."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(
        f"{printable(name)} ({n})" if n > 1 else printable(name) for name, n in counts.items()
    )


def load_weights(
    model: nn.Module, weights: Weights, *, new: Sequence[str] = (), prefix: str = ""
) -> Report:
    """Load weights into a model; every tensor but those of `new` must be there and fit.

    Position tables (absolute, names that end in `pos_embed`, and relative ones) are resized to
    the model's grid; the row for a class token is dropped or added as the model has one. The
    first convolution is adapted from gray to colour, or from colour to gray.

    Args:
        model: the `geometry` of the module that holds a table says the grid, its
            `num_prefix_tokens` the rows before it.
        weights: what to load.
        new: modules or parameters (`*` is a wildcard) that may be missing or have another shape,
            and then keep what they have: the head of a model that begins a new task.
        prefix: load only what the file has below this name, see `Weights.encoder`.

    Raises:
        UsageError: weights that do not fit or are not finite, with the reason.
    """
    own = {name: t for name, t in model.state_dict().items() if not name.endswith(_COMPUTED)}
    there = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.state.items()
        if name.startswith(prefix) and not name.endswith(_COMPUTED)
    }
    chosen, resized, misfits = {}, [], []
    for name in own.keys() & there.keys():
        owner = model.get_submodule(name.rpartition(".")[0])
        of_one_kind = there[name].is_floating_point() == own[name].is_floating_point()
        if there[name].shape == own[name].shape and of_one_kind:
            chosen[name] = there[name]
        elif fitted := _fit(name, there[name], own[name], owner, weights):
            chosen[name], change = fitted
            resized.append(f"{name} ({change})")
        elif not within(name, new):
            misfits.append(name)
    missing = sorted(own.keys() - chosen.keys())
    absent = [name for name in missing if not within(name, new) and name not in misfits]
    if misfits or absent:
        _ = weights.architecture  # refuses what is no ConvViT's
        raise UsageError(_why_not(weights, own, there, sorted(misfits), absent))
    if broken := sorted(name for name, tensor in chosen.items() if not _is_finite(tensor)):
        raise UsageError(
            f"checkpoint {weights.path} holds numbers that are not finite, in {_modules(broken)}: "
            f"the run that wrote it diverged; take an earlier one"
        )
    model.load_state_dict(chosen, strict=False)
    return Report(
        weights.path,
        len(chosen),
        sorted(resized),
        missing,
        sorted(there.keys() - chosen.keys()),
        "ema" in weights.entry,
    )


def _is_finite(tensor: Tensor) -> bool:
    """True for numbers that are; those on the meta device are none."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _fit(
    name: str, tensor: Tensor, own: Tensor, owner: nn.Module, weights: Weights
) -> tuple[Tensor, str] | None:
    """A tensor in the shape of the model's `own`, and what changed; None if it cannot be."""
    if name.endswith("patch_embed1.proj.weight"):
        adapted = _adapt_channels(tensor, own.shape[1])
        change = f"{tensor.shape[1]} to {own.shape[1]} channels"
        return (adapted, change) if adapted.shape == own.shape else None
    if tensor.ndim != own.ndim or tensor.shape[-1:] != own.shape[-1:]:
        return None
    if name.endswith("pos_embed"):
        return _resize_table(tensor, weights.architecture.grid, owner)
    if isinstance(owner, RelativePositions):
        old, new = _table_grid(tensor, weights), owner.table_grid
        return resize_relative_table(tensor, old, new), f"{show_size(old)} to {show_size(new)}"
    if name.endswith(("rel_pos_h", "rel_pos_w")):
        rows = F.interpolate(tensor.T.unsqueeze(0), len(own), mode="linear")  # [1, C, shifts]
        return rows[0].T, f"{len(tensor)} to {len(own)} shifts"
    return None


def _adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """A kernel `[C_out, C_in, *size]` for colour instead of gray, or for gray instead of colour.

    Its output stays the same for gray pictures. Between two numbers of colours there is no such
    kernel: then it stays as it is.
    """
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    if kernel.shape[1] == 1:
        return kernel.expand(-1, channels, *kernel.shape[2:]) / channels
    return kernel


def _table_grid(table: Tensor, weights: Weights) -> tuple[int, int]:
    """The grid of a relative table `[(2h - 1) * (2w - 1), heads]`: the input's, or a square."""
    height, width = weights.architecture.grid
    if len(table) != (2 * height - 1) * (2 * width - 1):
        height = width = (math.isqrt(len(table)) + 1) // 2
    return height, width


def _resize_table(table: Tensor, grid: Sequence[int], model: nn.Module) -> tuple[Tensor, str]:
    """A position table `[1, prefix + L, C]` as the model has it, and what changed."""
    tokens, size = math.prod(grid), model.geometry.grid(3)
    prefix, rows = table[:, :-tokens], resize_pos_embed(table[:, -tokens:], grid, size)
    had, wanted = prefix.shape[1], getattr(model, "num_prefix_tokens", 0)
    changes = [f"{show_size(grid)} to {show_size(size)}"] if tuple(grid) != size else []
    if had < wanted:  # a class token without a row had nothing added
        prefix = torch.cat([prefix, prefix.new_zeros(1, wanted - had, table.shape[-1])], dim=1)
        changes.append("a row of zeros added for the class token")
    if had > wanted:
        prefix = prefix[:, :wanted]
        changes.append("the class token's row left out")
    return torch.cat([prefix, rows], dim=1), ", ".join(changes)


def _why_not(
    weights: Weights,
    own: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    misfits: Sequence[str],
    absent: Sequence[str],
) -> str:
    """The reason why weights do not fit, as a user would put it."""
    start = f"checkpoint {weights.path}"
    encoder, wanted = _architecture(there), _architecture(own)
    if encoder and wanted and not encoder.has_blocks(wanted):
        return f"{start} holds another size of model: {encoder}; the model to fill is {wanted}"
    names = [*misfits, *absent]
    heads = [name for name in names if within(name, HEADS)]
    if heads and all(within(name, (*HEADS, "norm", "fc_norm")) for name in names):
        if not weights.num_classes:
            return f"{start} has no head: it is {KINDS[weights.kind]}, no trained classifier"
        outputs = len(own[heads[0]])
        return f"{start} has a head of {weights.num_classes} classes, the model has {outputs}"
    name = names[0]
    if misfits:
        sizes = [show_size(t[name].shape) for t in (there, own)]
        if sizes[0] == sizes[1]:
            sizes = [str(t[name].dtype).removeprefix("torch.") for t in (there, own)]
        detail = f"{name}: {sizes[0]} there, {sizes[1]} in the model"
        return f"{start}: {len(misfits)} weights have another shape or type ({detail})"
    return f"{start} lacks {len(absent)} weights of the model ({_modules(absent)})"


def _architecture(state: Mapping[str, Tensor]) -> Architecture | None:
    """The encoder in a state dict, wherever its names begin; None without one."""
    for prefix in BACKBONES:
        if {f"{prefix}patch_embed1.proj.weight", f"{prefix}pos_embed"} <= state.keys():
            names = (name for name in state if name.startswith(prefix))
            shapes = {n.removeprefix(prefix): state[n].shape for n in names}
            return Architecture.from_shapes(shapes)
    return None
