"""Configurations: a LazyConfig file, with overrides that must name what is there."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import detectron2
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.nn.parallel import DistributedDataParallel

from DET.settings import check_settings
from util.errors import UsageError

CONFIGS = Path(__file__).parent / "configs"


def detectron2_config(name: str) -> DictConfig:
    """A configuration file of Detectron2's own, installed or from a checkout on `PYTHONPATH`.

    Args:
        name: its path below Detectron2's `configs`.
    """
    package = Path(detectron2.__file__).parent
    installed, checkout = package / "model_zoo" / "configs", package.parent / "configs"
    return LazyConfig.load(str((installed if installed.is_dir() else checkout) / name))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig file, override some of its values, and check them.

    Args:
        path: a Python file, or the config.yaml that a run has left.
        overrides: `key.key=value`, in Hydra's syntax. A key must be there already, or be an
            argument of something that the configuration builds.

    Raises:
        UsageError: no such file or one that cannot be run, an override that cannot be read or
            names nothing, or a value that cannot be.
    """
    path = Path(path)
    if path.suffix not in (".py", ".yaml") or not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.py")))
        raise UsageError(f"there is no configuration {path}; in DET/configs are {known}")
    try:
        cfg = LazyConfig.load(str(path))
    except UsageError:
        raise
    except Exception as error:  # a configuration is a program
        raise UsageError(f"the configuration {path} cannot be read: {_reason(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise UsageError(f"the configuration {path} holds no settings")
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(f"overrides have the form key.key=value: {_reason(error)}") from error
    for override in parsed:
        _check_override(cfg, override)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except Exception as error:  # omegaconf's, of many kinds: what a value refers to is not there
        raise UsageError(f"the settings of {path} do not fit together: {_reason(error)}") from error
    check_settings(resolved, path)
    return cfg


def build(cfg: Mapping, name: str) -> object:
    """Build what a part of a configuration describes.

    Args:
        cfg: the part.
        name: of the part, for the error.

    Raises:
        UsageError: its settings are not such that it can be built.
    """
    try:
        return instantiate(cfg)
    except UsageError:
        raise
    except Exception as error:  # whatever a constructor thinks of its arguments
        raise UsageError(f"{name} cannot be built with its settings: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error's first line, and its type where the line alone says too little."""
    cause = error.__cause__ if isinstance(error, SyntaxError) and error.__cause__ else error
    lines = str(cause).strip().splitlines()
    kind = type(cause).__name__
    return f"{lines[0]} ({kind})" if lines else kind


def _check_override(cfg: DictConfig, override: Override) -> None:
    """Refuse a key that would override nothing: a slip that Detectron2 lets pass."""
    key = override.key_or_group
    if override.is_delete():
        raise UsageError(f"override ~{key}: settings cannot be deleted; try {key}=null")
    if override.is_sweep_override():
        raise UsageError(f"override {key}: one value, please; a list is written [1,2]")
    node = cfg
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if parents == ["train", "ddp"] and last not in node:
        names = {*inspect.signature(DistributedDataParallel).parameters}
        if last not in names:
            raise _unknown(key, last, sorted({*names, *map(str, node)} - {"module", "device_ids"}))
    elif isinstance(node, DictConfig) and "_target_" in node and last not in node:
        names = _arguments(node["_target_"])
        if names is not None and last not in names:
            raise _unknown(key, last, sorted({*names, *map(str, node)} - {"_target_", "self"}))
    else:
        there, given = _kind(_child(node, last, key)), override.value()
        # Null takes a part out; a reference is as good as what it refers to.
        referring = isinstance(given, str) and "${" in given
        if there and given is not None and not referring and _kind(given) != there:
            raise UsageError(f"override {key}: {given!r} must be {there}, as it is in the recipe")


def _kind(value: object) -> str | None:
    """Kind of a value; None for null and objects, which have no fixed kind."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, Sequence) else None


def _child(node: object, part: str, key: str) -> object:
    if isinstance(node, DictConfig) and part in node:
        return node[part]
    if isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    names = range(len(node)) if isinstance(node, ListConfig) else node
    known = isinstance(node, DictConfig | ListConfig)
    raise _unknown(key, part, [str(name) for name in names] if known else [])


def _unknown(key: str, part: str, names: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(part, names, n=1)
    hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(names) or 'none'}"
    return UsageError(f"override {key}: there is no {part}{hint}")


def _arguments(target: str | Callable) -> set[str] | None:
    """The names of the arguments that a target takes; None if it takes any."""
    target = locate(target) if isinstance(target, str) else target
    makers = [target]
    if isinstance(target, type):  # a constructor hands on what it does not know to the one above
        makers = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    names: set[str] = set()
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return names if isinstance(target, type) else None
