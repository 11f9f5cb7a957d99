"""Changes to a config from the command line: each must name what is there, or can be there."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import mmseg.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from util.errors import UsageError

# Parts of a config beside the arguments of mmengine's Runner.
_MORE_PARTS = (
    *("tta_model", "tta_pipeline", "custom_imports", "model_wrapper_cfg", "sync_bn", "compile"),
    *("find_unused_parameters", "activation_checkpointing", "efficient_conv_bn_eval"),
)
# Variables of our configs, and what changes what they stand for.
_INSTEAD = {
    "crop_size": "--crop-size",
    "data_root": "--data-path",
    "dataset": "train_dataloader.dataset and those of val and test",
    "train_pipeline": "train_dataloader.dataset.pipeline",
    "test_pipeline": "val_dataloader.dataset.pipeline and test_dataloader's",
    "iterations": "train_cfg.max_iters and param_scheduler.1.end",
}
_PATHS = ("img_path", "seg_map_path")
# Entries that mmengine and mmseg read from objects without a type, by the name of the object.
_ENTRIES = {
    "env_cfg": ("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"),
    "mp_cfg": ("mp_start_method", "opencv_num_threads"),
    "dist_cfg": ("backend", "timeout"),
    "auto_scale_lr": ("enable", "base_batch_size"),
    "test_cfg": ("type", "mode", "crop_size", "stride", "size", "size_divisor", "fp16"),
    "train_cfg": ("type", "by_epoch", "max_iters", "max_epochs", "val_interval", "val_begin"),
    "val_cfg": ("type", "fp16"),
    "data_prefix": _PATHS,
    "paramwise_cfg": (
        *("layer_decay", "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult"),
        *("flat_decay_mult", "bypass_duplicate", "dwconv_decay_mult", "dcn_offset_lr_mult"),
    ),
    "default_hooks": (
        *("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"),
        "visualization",
    ),
    "optim_wrapper": ("type", "optimizer", "constructor", "paramwise_cfg"),
}
_DEFAULT_TYPES = {"log_processor": "LogProcessor"}
# Taken out of an object before it is built.
_OF_ANY_OBJECT = {"type", "_scope_", "_delete_", "init_cfg", "priority", "convert_to_iter_based"}
_OF_LOADERS = {"dataset", "sampler", "batch_sampler", "collate_fn", "num_batch_per_epoch"}


def apply_overrides(config: Config, options: Mapping[str, object]) -> None:
    """Change a config.

    Args:
        config: changed in place.
        options: values by their keys, such as `{"train_dataloader.batch_size": 4}`. A key must be
            there, or be an argument of what the config builds.

    Raises:
        UsageError: a key that names nothing, or nothing that is read.
    """
    types = {key: value for key, value in options.items() if key.split(".")[-1] == "type"}
    for some in (types, options):  # what may be said of an object depends on its type
        for key in some:
            _check_key(config, key)
        try:
            config.merge_from_dict(dict(some))
        except (KeyError, TypeError, IndexError) as error:
            raise UsageError(f"--cfg-options: {error}") from error


def _check_key(config: Config, key: str) -> None:
    first, *parts = key.split(".")
    known = {*inspect.signature(Runner).parameters, *_MORE_PARTS} - {"cfg"}
    if first not in known:
        if first in config:
            instead = _INSTEAD.get(first, "what it is used in")
            raise UsageError(
                f"--cfg-options {key} would change nothing: {first} is a variable of the config's "
                f"file; change {instead}"
            )
        raise _unknown(key, first, known)
    node, name = config.get(first), first
    for part in parts:
        if isinstance(node, Mapping):
            allowed = _entries(node, name)
            if part not in node and allowed is not None and part not in allowed:
                raise _unknown(key, part, {*node, *allowed})
            node = node.get(part)
        elif isinstance(node, Sequence) and not isinstance(node, str):
            if not (part.isdecimal() and int(part) < len(node)):
                raise _unknown(key, part, map(str, range(len(node))))
            node = node[int(part)]
        elif node is not None:
            raise UsageError(f"--cfg-options {key}: {name} is {node!r} and has no {part}")
        elif (allowed := _entries({}, name)) and part not in allowed:
            raise _unknown(key, part, allowed)
        name = part


def _entries(node: Mapping, name: str) -> set[str] | None:
    """Names that an object of a config may have; None for any.

    Args:
        node: the object; empty for one that would be new.
        name: by which it is known in the one around it.
    """
    if name == "clip_grad":
        return {*inspect.signature(clip_grad_norm_).parameters, "type"} - {"parameters"}
    if name == "randomness":
        return {*inspect.signature(Runner.set_randomness).parameters} - {"self"}
    if name.endswith("_dataloader"):
        return {*inspect.signature(DataLoader).parameters, *_OF_LOADERS}
    if kind := node.get("type", _DEFAULT_TYPES.get(name)):
        arguments = _arguments(_find(kind) if isinstance(kind, str) else kind)
        return arguments and {*arguments, *_ENTRIES.get(name, ()), *_OF_ANY_OBJECT}
    return {*_ENTRIES[name], *node} if name in _ENTRIES else ({*node} or None)


def _registries() -> list[Registry]:
    return [value for value in vars(mmseg.registry).values() if isinstance(value, Registry)]


def _find(kind: str) -> Callable | None:
    """The class that a type of a config names, in whichever registry; None without one."""
    return next((found for r in _registries() if (found := r.get(kind)) is not None), None)


def _arguments(target: Callable | None) -> set[str] | None:
    """The names of the arguments that a target takes; None if it takes any."""
    if target is None:
        return None
    makers: list[Callable] = [target]
    if inspect.isclass(target):  # a constructor hands on what it does not know to the one above
        makers = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
    names: set[str] = set()
    for maker in makers:
        try:
            parameters = inspect.signature(maker).parameters.values()
        except ValueError:  # compiled
            return None
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def nearest(word: str, names: Iterable[str]) -> str:
    """The end of a message on a word that is not known: the nearest name, or the names."""
    names = sorted({*names} - _OF_ANY_OBJECT)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f": did you mean {near[0]}?"
    return f"; there are {', '.join(names)}" if names else ""


def registered(group: str) -> list[str]:
    """The names in a registry, such as "model", that are there to be built."""
    return [name for r in _registries() if r.name == group for name in _names(r)]


def _names(registry: Registry | None) -> Iterable[str]:
    while registry is not None:
        yield from registry.module_dict
        registry = registry.parent


def _unknown(key: str, part: str, names: Iterable[str]) -> UsageError:
    return UsageError(f"--cfg-options {key}: there is no {part}{nearest(part, names)}")
