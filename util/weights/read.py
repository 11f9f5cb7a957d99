"""Weights in a file of any kind: names, shapes, and what the file says of itself.

Reads this framework's checkpoints, those published for the original code (v1 and v2), bare state
dicts, names that DDP or torch.compile prefixed, and safetensors.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from util.errors import UsageError
from util.layers.architecture import Architecture
from util.layers.geometry import show_size
from util.weights.checkpoint import load_file

# Where a checkpoint keeps its weights; averaged ones are what one evaluates.
_ENTRIES = ("model_ema", "state_dict_ema", "model", "state_dict")
# What wrappers put before names: DDP and averages in front, torch.compile anywhere.
_WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")
# Where the encoder's names begin in the segmentors and detectors built on it.
BACKBONES = ("", "backbone.", "backbone.bottom_up.", "backbone.net.")
# What pretraining and classification have beside the encoder.
_BESIDES_ENCODER = ("decoder_*", "mask_token", "stage*_output_decode", "norm", "fc_norm", "head")
# What gives the logits, in the order in which `num_classes` looks for it.
HEADS = ("head", "head.1", "decode_head.conv_seg", "auxiliary_head.conv_seg")
_BOXES = "roi_heads.box_predictor.cls_score.weight"
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
    """The contents of a file of weights.

    Attributes:
        path: the file, for messages.
        state: name to tensor, without the prefixes of wrappers.
        info: the file's other plain entries, such as epoch, args (a dict) and classes.
        entry: where in the file the weights were, "model_ema" for averaged ones.
        known: the encoder's architecture where it is known without the file.
    """

    path: Path
    state: dict[str, Tensor]
    info: dict[str, object] = field(default_factory=dict)
    entry: str = ""
    known: Architecture | None = None

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
        """The prefix of the encoder's names; empty where they stand by themselves."""
        found = (p for p in BACKBONES if f"{p}patch_embed1.proj.weight" in self.state)
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
        heads = (self.state.get(f"{name}.weight") for name in HEADS)
        return next((len(head) for head in heads if head is not None), 0)

    @property
    def global_pool(self) -> str:
        """The pooling of a classifier, known by the name of its norm: "avg" or "token"."""
        return "avg" if "fc_norm.weight" in self.state else "token"

    @cached_property
    def architecture(self) -> Architecture:
        """The encoder's, read off the shapes with the run's arguments as a hint.

        Raises:
            UsageError: these are no weights of a ConvViT, or fewer than their shapes claim.
        """
        if self.known:
            return self.known
        prefix = self.encoder
        encoder = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }
        for name, tensor in encoder.items():
            sized = name.startswith(("patch_embed", "pos_embed", "blocks"))
            if sized and tensor.nbytes > tensor.untyped_storage().nbytes():
                raise UsageError(
                    f"checkpoint {self.path} does not hold the numbers of {prefix}{name}: its "
                    f"shape of {show_size(tensor.shape)} claims more than are in the file"
                )
        shapes = {name: tensor.shape for name, tensor in encoder.items()}
        try:
            return Architecture.from_shapes(shapes, self.args)
        except ValueError as error:
            some = ", ".join(sorted(self.state)[:3])
            raise UsageError(f"checkpoint {self.path}: {error} (it has {some}, …)") from error

    def without_heads(self) -> "Weights":
        """The encoder alone: without decoder, fusion and final norm, without a head."""
        return self.without(*_BESIDES_ENCODER)

    def without(self, *prefixes: str) -> "Weights":
        """The same without the weights of these modules or parameters."""
        state = {name: t for name, t in self.state.items() if not within(name, prefixes)}
        return replace(self, state=state)


def within(name: str, modules: Sequence[str]) -> bool:
    """True for a name of these modules or parameters, or within one; `*` is a wildcard."""
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
