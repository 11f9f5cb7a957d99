"""Weights in a file of any kind: names, shapes, and what the file says of itself.

Reads this framework's checkpoints, those published for the original code (v1 and v2), bare state
dicts, names that DDP or torch.compile prefixed, and safetensors.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from torch import Tensor

from util.errors import UsageError, printable
from util.layers.architecture import Architecture
from util.layers.decoder import Decoder
from util.weights.checkpoint import load_file
from util.weights.tensorfile import load_tensors
from util.weights.unpickle import Foreign

# Where a checkpoint keeps its weights; averaged ones are what one evaluates.
_ENTRIES = ("model_ema", "state_dict_ema", "model", "state_dict")
# What wrappers put before names: DDP and averages in front, torch.compile anywhere.
_WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")
# Where the encoder's names begin in the segmentors and detectors built on it.
BACKBONES = ("", "backbone.", "backbone.bottom_up.", "backbone.net.")
# What pretraining and classification have beside the encoder.
_BESIDES_ENCODER = (
    *("decoder_*", "mask_token", "stage*_output_decode", "mimic"),
    *("norm", "fc_norm", "head"),
)
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

    @property
    def stats(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation, within 0 … 1, by which the run normalised 8-bit images.

        None for ImageNet's, and where the run was on arrays.
        """
        mean, std = (self.args.get(name) for name in ("mean", "std"))
        if self.args.get("arrays") or not _are(_is_finite, 1, 3, 4)(mean):
            return None
        fits = _are(_is_finite, len(mean))(std) and min(std) > 0
        return (tuple(mean), tuple(std)) if fits else None

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
        if _BOXES in self.state and self.state[_BOXES].ndim:
            return len(self.state[_BOXES]) - 1
        heads = (self.state.get(f"{name}.weight") for name in HEADS)
        return next((len(head) for head in heads if head is not None and head.ndim), 0)

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
        shapes = {name: tensor.shape for name, tensor in encoder.items()}
        try:
            _check_shapes(shapes)
            return Architecture.from_shapes(shapes, self.args)
        except ValueError as error:
            some = ", ".join(map(printable, sorted(self.state)[:3]))
            raise UsageError(f"checkpoint {self.path}: {error} (it has {some}, …)") from error

    @cached_property
    def decoder(self) -> Decoder:
        """An autoencoder's decoder, read off the shapes as `architecture` is.

        Raises:
            UsageError: weights of something else, or fewer than their shapes claim.
        """
        shapes = {name: tensor.shape for name, tensor in self.state.items()}
        try:
            return Decoder.from_shapes(shapes, self.args)
        except ValueError as error:
            raise UsageError(f"checkpoint {self.path}: {error}") from error

    @property
    def guessed(self) -> dict[str, object]:
        """Properties of the model that neither shapes nor arguments say, as they are taken."""
        known = set(self.args)
        if "model" in known:  # older files of this framework, where the name stood for all
            known |= {"num_heads", "decoder_num_heads"}
        taken = {"num_heads": self.architecture.num_heads}
        if self.kind == "autoencoder":
            taken |= {"decoder_num_heads": self.decoder.decoder_num_heads, "norm_pix_loss": False}
        return {name: value for name, value in taken.items() if name not in known}

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
        there = {printable(name, 20): value for name, value in list(content.items())[:8]}
        for name in _ENTRIES:
            state = content.get(name)
            for inner, value in state.items() if isinstance(state, Mapping) else ():
                if not isinstance(value, Tensor):
                    there = {f"{name} with {printable(inner)}": value}
        kinds = ", ".join(f"{name} ({_kind(value)})" for name, value in there.items())
        raise UsageError(f"checkpoint {path} holds no weights, only {kinds or 'nothing'}")
    meta = content.get("meta") if entry else None
    info = {"args": {}} if not entry else {k: v for k, v in content.items() if k != entry}
    if isinstance(meta, Mapping):  # MMSegmentation's, of today and of before
        names = dict(_items(meta.get("dataset_meta"))).get("classes") or meta.get("CLASSES")
        info |= {"classes": names} if names else {}
        info |= {"args": meta["args"]} if "args" in meta else {}
    return Weights(Path(path), _clean(state, path), _known_info(info), entry)


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _kind(value: object) -> str:
    return printable(value.kind if isinstance(value, Foreign) else type(value).__name__)


def _items(value: object) -> Iterable[tuple[object, object]]:
    """The items of a mapping, or the attributes of an object; of anything else nothing."""
    if isinstance(value, Foreign):
        value = value.items or value.state
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    return value.items() if isinstance(value, Mapping) else ()


def _known_info(info: Mapping) -> dict[str, object]:
    """A file's information on itself, without entries of a wrong type."""
    args = {name: value for name, value in _items(info.get("args")) if isinstance(name, str)}
    args = {n: v for n, v in args.items() if n not in _ARGS or _ARGS[n](v)}
    if not {"tubelet", "patch_size"} <= args.keys():
        args.pop("num_frames", None)
    known = {name: info[name] for name, fits in _INFO.items() if name in info and fits(info[name])}
    if "classes" in known:
        known["classes"] = list(known["classes"])
    return known | ({"args": args} if args else {})


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_size(value: object) -> bool:
    return _is_count(value) and value > 0


def _are(fits: Callable[[object], bool], *lengths: int) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        right = isinstance(value, list | tuple) and (not lengths or len(value) in lengths)
        return right and all(map(fits, value))

    return check


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_ratio(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# Arguments of a run that people ask for first.
RECIPE = ("epochs", "warmup_epochs", "effective_batch_size", "lr", "weight_decay", "mask_ratio")
RECIPE += ("predict_share", "mimic_weight", "layer_decay", "drop_path", "seed")
# What entries and arguments must be for anything to be concluded from them.
_INFO = {"epoch": _is_count, "step": _is_count, "program": _is_text, "classes": _are(_is_text)}
_INFO["best"] = lambda v: isinstance(v, Mapping) and _is_number(v.get("acc1"))
_ARGS = {
    "input_size": lambda v: _is_size(v) or _are(_is_size, 1, 2)(v),
    "patch_size": lambda v: _are(lambda p: _is_size(p) or _are(_is_size, 2)(p), 3)(v),
    **dict.fromkeys(("in_chans", "num_frames", "tubelet", "temporal_kernel"), _is_size),
    **dict.fromkeys(("num_heads", "kernel_size", "decoder_num_heads"), _is_size),
    **dict.fromkeys(("decoder_embed_dim", "decoder_depth", "mimic_dim"), _is_size),
    **dict.fromkeys(("embed_dim", "depth"), _are(_is_size, 3)),
    "mlp_ratio": _are(_is_ratio, 3),
    "bands": _are(_is_size),
    "nodata": _is_number,
    **dict.fromkeys(
        ("multi_scale", "norm_pix_loss", "complementary", "arrays"), lambda v: isinstance(v, bool)
    ),
    "masking": lambda v: v in ("tube", "random"),
    **dict.fromkeys(("model", "teacher", "teacher_digest"), _is_text),
    **dict.fromkeys(RECIPE, _is_number),
}


def _clean(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    clean = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if len(clean) < len(state):
        raise UsageError(f"checkpoint {path} holds weights twice, with and without a prefix")
    return clean


def _read_safetensors(path: Path) -> Weights:
    state, metadata = load_tensors(path)
    try:
        info = dict(json.loads(metadata.get("info", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"checkpoint {path} cannot be read: {printable(error)}") from error
    return Weights(path, _clean(state, path), _known_info(info), metadata.get("entry", ""))


def _check_shapes(shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse shapes off which no architecture can be read.

    Raises:
        ValueError: saying which.
    """
    stages = set()
    for name, shape in shapes.items():
        if any(fnmatchcase(name, pattern) and len(shape) not in n for pattern, n in _NDIM.items()):
            raise ValueError(f"these are no weights of a ConvViT: {name} is {[*shape]}")
        if block := _BLOCK.match(name):
            stages.add(block[1])
        if 0 in shape and not name.endswith("relative_position_index"):
            raise ValueError(f"these are no weights of a ConvViT: {name} is empty, {[*shape]}")
    for stage in sorted(stages):
        if f"{stage}.0.mlp.fc1.weight" not in shapes:
            raise ValueError(f"its weights are not all there: {stage}.0.mlp.fc1.weight is missing")


_BLOCK = re.compile(r"(blocks[123])\.")
_NDIM = {
    "pos_embed": (3,),
    "patch_embed[123].proj.weight": (4, 5),
    "blocks[123].*.mlp.fc1.weight": (2, 4, 5),
    "blocks[12].*.attn.weight": (4, 5),
    "head.weight": (2,),
    "head.1.weight": (2,),
}
