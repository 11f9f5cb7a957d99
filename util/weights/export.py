"""Write weights alone, for other programs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from util.errors import UsageError
from util.weights.checkpoint import save_atomically
from util.weights.read import Weights
from util.weights.tensorfile import save_tensors

_MOST = 300  # lists in lists and the like; more are no argument of a run


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
    args = {name: _plain(value, iter(range(_MOST))) for name, value in weights.args.items()}
    info |= {"args": args} if args else {}
    if path.suffix == ".safetensors":
        save_tensors(weights.state, {"info": json.dumps(info)}, path)
    elif path.suffix in (".pth", ".pt"):
        state = {name: tensor.detach().clone() for name, tensor in weights.state.items()}
        save_atomically({"model": state, **info}, path)
    else:
        raise UsageError(f"{path} must end in .safetensors, .pth or .pt")


def _plain(value: object, budget: Iterator[int]) -> object:
    """A value as JSON has it: of other things their kind, of what is too much None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**63 else None
    if next(budget, None) is None:
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, budget) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, budget) for v in value]
    return str(value) if isinstance(value, PurePath) else f"<{type(value).__name__}>"
