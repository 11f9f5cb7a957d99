"""The one loader of weights: from any file to a model, by name and shape, with a report.

Reads this framework's checkpoints, those published for the original code (v1 and v2), bare state
dicts, names that DDP or torch.compile prefixed, and safetensors. What cannot fit is refused with
the reason.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.architecture import (
    constructor_args,
    describe_architecture,
    grid_size,
    read_architecture,
)
from util.checkpoint import load_file, save_atomically, write_atomically
from util.errors import UsageError
from util.pos_embed import resize_pos_embed
from util.rel_pos import RelativePositions, resize_relative_table

# Where a checkpoint keeps its weights; averaged ones are what one evaluates.
_ENTRIES = ("model_ema", "state_dict_ema", "model", "state_dict")
# What wrappers put before names: DDP and averages in front, torch.compile anywhere.
_WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")
# Where the encoder's names begin in the segmentors and detectors built on it.
_BACKBONES = ("", "backbone.", "backbone.bottom_up.", "backbone.net.")
# What pretraining and classification have beside the encoder.
_BESIDES_ENCODER = ("decoder_*", "mask_token", "stage*_output_decode", "norm", "fc_norm", "head")
# What gives the logits, in the order in which `num_classes` looks for it.
_HEADS = ("head", "head.1", "decode_head.conv_seg", "auxiliary_head.conv_seg")
_BOXES = "roi_heads.box_predictor.cls_score.weight"
# Buffers that follow from the grid: a model has its own, whatever a file says.
_COMPUTED = "relative_position_index"

KINDS = {
    "autoencoder": "a whole masked autoencoder, from pretraining",
    "encoder": "an encoder alone, without a head",
    "classifier": "a classifier",
    "probe": "a linear probe: an encoder, a batch norm and a linear head",
    "segmentor": "a segmentation model",
    "detector": "a detection model",
}


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        path: the file, for messages.
        state: name to tensor, without the prefixes of wrappers.
        info: the file's other plain entries, such as epoch, args (a dict) and classes.
        entry: where in the file the weights were, "model_ema" for averaged ones.
    """

    path: Path
    state: dict[str, Tensor]
    info: dict[str, object] = field(default_factory=dict)
    entry: str = ""

    @property
    def args(self) -> dict[str, object]:
        """The arguments of the run that wrote the file; empty if it does not say."""
        return self.info.get("args") or {}

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in the order of the head's outputs, if the file has them."""
        return self.info.get("classes")

    @cached_property
    def encoder(self) -> str:
        """What stands before the names of the encoder's weights."""
        found = (p for p in _BACKBONES if f"{p}patch_embed1.proj.weight" in self.state)
        return next(found, "")

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.encoder:
            detector = any(name.startswith("roi_heads.") for name in self.state)
            return "detector" if detector else "segmentor"
        if "mask_token" in self.state:
            return "autoencoder"
        if "head.1.weight" in self.state:
            return "probe"
        return "classifier" if "head.weight" in self.state else "encoder"

    @property
    def num_classes(self) -> int:
        """Classes of the head, without a detector's background; 0 without a head."""
        if _BOXES in self.state:
            return len(self.state[_BOXES]) - 1
        heads = (self.state.get(f"{name}.weight") for name in _HEADS)
        return next((len(head) for head in heads if head is not None), 0)

    @property
    def global_pool(self) -> str:
        """How a classifier pools: its norm's name tells."""
        return "avg" if "fc_norm.weight" in self.state else "token"

    @cached_property
    def architecture(self) -> dict[str, object]:
        """The encoder's constructor arguments, read off the shapes.

        Raises:
            UsageError: these are no weights of a ConvViT.
        """
        prefix, size = self.encoder, constructor_args(self.args).get("img_size")
        names = (name for name in self.state if name.startswith(prefix))
        shapes = {name.removeprefix(prefix): self.state[name].shape for name in names}
        try:
            return read_architecture(shapes, (size, size) if isinstance(size, int) else size)
        except ValueError as error:
            some = ", ".join(sorted(self.state)[:3])
            raise UsageError(f"checkpoint {self.path}: {error} (it has {some}, …)") from error

    def without_heads(self) -> "Weights":
        """The encoder alone: without decoder, fusion and final norm, without a head."""
        return self.without(*_BESIDES_ENCODER)

    def without(self, *prefixes: str) -> "Weights":
        """The same without the weights of these modules or parameters."""
        state = {name: t for name, t in self.state.items() if not _within(name, prefixes)}
        return Weights(self.path, state, self.info, self.entry)


@dataclass(frozen=True)
class Report:
    """How weights were matched to a model.

    Attributes:
        path: the file.
        loaded: how many tensors were taken.
        resized: position tables resized to the model's grid, and the first convolution adapted to
            its channels, with both sizes.
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

    def __str__(self) -> str:
        lines = [f"weights of {self.path}: {self.loaded} tensors loaded"]
        lines[0] += ", the run's average (EMA)" if self.averaged else ""
        if self.resized:
            lines.append(f"  resized: {', '.join(self.resized)}")
        if self.missing:
            lines.append(f"  missing there, begin anew: {_modules(self.missing)}")
        if self.unexpected:
            lines.append(f"  unexpected, not used: {_modules(self.unexpected)}")
        return "\n".join(lines)


def _modules(names: Sequence[str]) -> str:
    """Names, summed up by the module they belong to."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())


def _within(name: str, modules: Sequence[str]) -> bool:
    """Whether a name is one of these modules or parameters, or lies in one; `*` is a wildcard."""
    return any(fnmatchcase(name, m) or fnmatchcase(name, f"{m}.*") for m in modules)


def read_weights(path: str | Path) -> Weights:
    """Read the weights of a file of any kind; nothing in it can run code.

    Raises:
        UsageError: a file that cannot be read or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return weights_of(load_file(path), path)


def weights_of(content: Mapping, path: str | Path) -> Weights:
    """The weights in a checkpoint's contents, see `read_weights`."""
    entry = next((name for name in _ENTRIES if _is_state(content.get(name))), "")
    state = content[entry] if entry else content
    if not _is_state(state):
        raise UsageError(
            f"checkpoint {path} holds no weights, only {', '.join(map(str, content)) or 'nothing'}"
        )
    info = {} if not entry else {k: v for k, v in content.items() if not isinstance(v, Mapping)}
    args = content.get("args") if entry else None
    if args is not None:
        info["args"] = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    meta = content.get("meta") if entry else None
    if isinstance(meta, Mapping):  # MMSegmentation's, of today and of before
        names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
        info |= {"classes": list(names)} if names else {}
    return Weights(Path(path), _clean(state), info, entry)


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(t, Tensor) for t in value.values())
    )


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def _read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        info = json.loads(metadata.get("info", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error}") from error
    return Weights(path, _clean(state), info, metadata.get("entry", ""))


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
        UsageError: weights that do not fit, with the reason.
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
        if there[name].shape == own[name].shape:
            chosen[name] = there[name]
        elif fitted := _fit(name, there[name], own[name], owner, weights):
            chosen[name], change = fitted
            resized.append(f"{name} ({change})")
        elif not _within(name, new):
            misfits.append(name)
    missing = sorted(own.keys() - chosen.keys())
    absent = [name for name in missing if not _within(name, new) and name not in misfits]
    if misfits or absent:
        _ = weights.architecture  # refuses what is no ConvViT's
        raise UsageError(_why_not(weights, own, there, sorted(misfits), absent))
    model.load_state_dict(chosen, strict=False)
    return Report(
        weights.path,
        len(chosen),
        sorted(resized),
        missing,
        sorted(there.keys() - chosen.keys()),
        "ema" in weights.entry,
    )


def _fit(
    name: str, tensor: Tensor, own: Tensor, owner: nn.Module, weights: Weights
) -> tuple[Tensor, str] | None:
    """A tensor in the shape of the model's `own`, and what changed; None if it cannot be."""
    if name.endswith("patch_embed1.proj.weight"):
        adapted = _adapt_channels(tensor, own.shape[1])
        change = f"{tensor.shape[1]} to {own.shape[1]} channels"
        return (adapted, change) if adapted.shape == own.shape else None
    if tensor.shape[-1] != own.shape[-1]:
        return None
    if name.endswith("pos_embed"):
        old, new = grid_size(weights.architecture), owner.geometry.grid(3)
        return _resize_table(tensor, old, owner), f"{_size(old)} to {_size(new)}"
    if isinstance(owner, RelativePositions):
        old, new = _table_grid(tensor, weights), owner.table_grid
        return resize_relative_table(tensor, old, new), f"{_size(old)} to {_size(new)}"
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
    height, width = grid_size(weights.architecture)
    if len(table) != (2 * height - 1) * (2 * width - 1):
        height = width = (math.isqrt(len(table)) + 1) // 2
    return height, width


def _size(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


def _resize_table(table: Tensor, grid: Sequence[int], model: nn.Module) -> Tensor:
    """A position table `[1, prefix + L, C]` as the model has it."""
    tokens, size = math.prod(grid), model.geometry.grid(3)
    prefix, rows = table[:, :-tokens], resize_pos_embed(table[:, -tokens:], grid, size)
    wanted = getattr(model, "num_prefix_tokens", 0)
    # A class token that had no row had nothing added.
    prefix = torch.cat([prefix, prefix.new_zeros(1, wanted, table.shape[-1])], dim=1)[:, :wanted]
    return torch.cat([prefix, rows], dim=1)


def _why_not(
    weights: Weights,
    own: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    misfits: Sequence[str],
    absent: Sequence[str],
) -> str:
    """The reason why weights do not fit, as a user would put it."""
    start = f"checkpoint {weights.path}"
    encoders = [architecture for architecture in map(_architecture, (there, own)) if architecture]
    if len(encoders) == 2 and any(
        encoders[0][k] != encoders[1][k] for k in ("embed_dim", "depth", "mlp_ratio")
    ):
        return (
            f"{start} holds another size of model: {describe_architecture(encoders[0])}; "
            f"the model to fill is {describe_architecture(encoders[1])}"
        )
    names = [*misfits, *absent]
    heads = [name for name in names if _within(name, _HEADS)]
    if heads and all(_within(name, (*_HEADS, "norm", "fc_norm")) for name in names):
        if not weights.num_classes:
            return f"{start} has no head: it is {KINDS[weights.kind]}, no trained classifier"
        outputs = len(own[heads[0]])
        return f"{start} has a head of {weights.num_classes} classes, the model has {outputs}"
    name = names[0]
    if misfits:
        shapes = f"{_size(there[name].shape)} there, {_size(own[name].shape)} in the model"
        return f"{start}: {len(misfits)} weights have another shape ({name}: {shapes})"
    return f"{start} lacks {len(absent)} weights of the model ({_modules(absent)})"


def _architecture(state: Mapping[str, Tensor]) -> dict[str, object] | None:
    """The encoder in a state dict, wherever its names begin; None without one."""
    for prefix in _BACKBONES:
        if {f"{prefix}patch_embed1.proj.weight", f"{prefix}pos_embed"} <= state.keys():
            names = (name for name in state if name.startswith(prefix))
            return read_architecture({n.removeprefix(prefix): state[n].shape for n in names})
    return None


def export_weights(weights: Weights, path: Path) -> None:
    """Write weights alone, with the little that a file should say of itself.

    Args:
        weights: what to write.
        path: ends in .safetensors, .pth or .pt.

    Raises:
        UsageError: another ending, or a folder that is not there.
        TrainingError: the file cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist")
    info = {k: v for k, v in weights.info.items() if k in ("epoch", "args", "classes", "program")}
    state = {name: t.detach().clone().contiguous() for name, t in weights.state.items()}
    if path.suffix == ".safetensors":
        # The format's metadata are texts.
        data = safetensors.torch.save(state, {"format": "pt", "info": json.dumps(info)})
        write_atomically(path, lambda file: file.write(data))
    elif path.suffix in (".pth", ".pt"):
        save_atomically({"model": state, **info}, path)
    else:
        raise UsageError(f"{path} must end in .safetensors, .pth or .pt")


def describe(weights: Weights) -> str:
    """What a file is, what its model looks like and what it can be used for, in a few lines."""
    architecture, epoch = weights.architecture, weights.info.get("epoch")
    patch = [math.prod(p) for p in zip(*architecture["patch_size"], strict=True)]
    kind = KINDS[weights.kind]
    kind += f" of {weights.num_classes} classes" if weights.num_classes else ""
    kind += ", averaged (EMA)" if "ema" in weights.entry else ""
    count = sum(t.numel() for t in weights.state.values() if t.is_floating_point())
    said = [weights.info.get("program"), weights.args.get("model")]
    said += [] if epoch is None else [f"{epoch} epochs done"]
    rows = {
        "file": f"{weights.path} ({weights.path.stat().st_size / 1e6:.1f} MB)",
        "kind": kind,
        "model": f"{describe_architecture(architecture)}, {count / 1e6:.1f} M numbers in all",
        "input": f"{_size(architecture['img_size'])} pixels, {architecture['in_chans']} channels, "
        f"{_size(grid_size(architecture))} patches of {_size(patch)}",
        "run": ", ".join(map(str, filter(None, said))),
        "classes": _some(weights.classes) if weights.classes else None,
        "use": _USES[weights.kind].format(file=weights.path),
    }
    return "\n".join(f"{name:9}{text}" for name, text in rows.items() if text)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", … {names[-1]}" if len(names) > most else "")


_USES = {
    "autoencoder": "main_finetune.py or main_linprobe.py --finetune {file}; python -m "
    "util.visualize --checkpoint {file}",
    "encoder": "main_finetune.py or main_linprobe.py --finetune {file}",
    "classifier": "main_finetune.py --eval --resume {file}; or --finetune {file} for new classes",
    "probe": "main_linprobe.py --eval --resume {file}",
    "segmentor": "python -m SEG.test CONFIG {file}",
    "detector": "python -m DET.train_net --config-file CONFIG --eval-only "
    "train.init_checkpoint={file}; python -m DET.predict --config-file CONFIG --checkpoint {file} "
    "IMAGES --out DIR",
}
