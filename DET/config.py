"""Configurations: a LazyConfig file, with overrides that must name what is there."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig

from util.errors import UsageError

CONFIGS = Path(__file__).parent / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig file and override some of its values.

    Args:
        path: a Python file, or the config.yaml that a run has left.
        overrides: `key.key=value`, in Hydra's syntax. A key must be there already, or be an
            argument of something that the configuration builds.

    Raises:
        UsageError: no such file, or an override that cannot be read or names nothing.
    """
    path = Path(path)
    if path.suffix not in (".py", ".yaml") or not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.py")))
        raise UsageError(f"there is no configuration {path}; in DET/configs are {known}")
    cfg = LazyConfig.load(str(path))
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"overrides have the form key.key=value: {reason}") from error
    for override in parsed:
        _check_key(cfg, override.key_or_group)
    return LazyConfig.apply_overrides(cfg, list(overrides))


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuse a key that would override nothing: a slip that Detectron2 lets pass."""
    node = cfg
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if not (isinstance(node, DictConfig) and "_target_" in node):
        _child(node, last, key)


def _child(node: object, part: str, key: str) -> object:
    if isinstance(node, DictConfig) and part in node:
        return node[part]
    if isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    names = [str(name) for name in node] if isinstance(node, DictConfig) else []
    near = difflib.get_close_matches(part, names, n=1)
    hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(names) or 'none'}"
    raise UsageError(f"override {key}: there is no {part}{hint}")
