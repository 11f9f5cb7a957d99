"""Write weights alone, for other programs."""

import json
from pathlib import Path

import safetensors
import safetensors.torch

from util.atomic import write_atomically
from util.errors import UsageError
from util.weights.checkpoint import save_atomically
from util.weights.read import Weights


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
