"""Safetensors files with a digest of what is in them."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.atomic import write_atomically
from util.data.files import retried
from util.errors import TrainingError, UsageError, printable

DIGEST = "sha256"


def save_tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write tensors and texts to a file that is whole or not there.

    Raises:
        TrainingError: the file cannot be written.
    """
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", **metadata}
    metadata[DIGEST] = _digest(state, metadata)
    data = safetensors.torch.save(state, metadata)
    write_atomically(path, lambda file: file.write(data))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and texts; a file of `save_tensors` is checked to be what was written.

    Raises:
        UsageError: no such file, another kind of file, or a damaged one.
        TrainingError: the storage fails, see `retried`.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file")
    try:
        state, metadata = retried(partial(_read, path), path)
    except TrainingError:
        raise
    except Exception as error:  # types of numbers that torch does not have raise their own
        raise UsageError(f"checkpoint {path} cannot be read: {printable(error)}") from error
    digest = metadata.pop(DIGEST, None)
    if digest not in (None, _digest(state, metadata)):
        raise UsageError(
            f"checkpoint {path} is damaged: its content is not what was written; copy or export "
            f"it anew"
        )
    return state, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # By its number, as the library takes only names in UTF-8.
    with (
        open(path, "rb") as opened,
        safetensors.safe_open(f"/dev/fd/{opened.fileno()}", "pt") as file,
    ):
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return state, file.metadata() or {}


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
