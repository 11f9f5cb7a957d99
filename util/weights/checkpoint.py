"""Checkpoint files: written whole or not at all, read so that a hostile one runs nothing."""

import argparse
import pickle
import re
import warnings
from pathlib import Path

import torch

from util.atomic import write_atomically
from util.errors import UsageError


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint that is whole or not there, see `write_atomically`."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_file(path: str | Path) -> dict:
    """Read a checkpoint's contents to the CPU. Nothing in the file can run code.

    Raises:
        UsageError: no such file, not a checkpoint, truncated, or one with objects in it other
            than tensors, plain values and argparse.Namespace.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what they hint at ends in an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises how to get round the refusal.
        culprit = re.search(r"Unsupported \S+ \S+ \S+", str(error))
        raise UsageError(
            f"checkpoint {path} is refused: it is damaged, or holds objects other than tensors and "
            f"plain values, which could run code{f' ({culprit[0]})' if culprit else ''}"
        ) from error
    except Exception as error:  # Damaged bytes make the unpickler raise nearly anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"checkpoint {path} cannot be read, it is truncated or no PyTorch file ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary")
    return content
