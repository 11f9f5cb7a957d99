"""Checkpoint files: written so that a kill loses nothing, read so that a hostile one runs nothing.

`python -m util.checkpoint inspect FILE` says what a file is, and
`python -m util.checkpoint export FILE --to model.safetensors` writes its weights alone.
"""

import argparse
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from util.errors import TrainingError, UsageError
from util.parser import Parser


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is whole or not there: temporary name, flush to disk, rename.

    Args:
        path: the file's name in the end.
        write: takes the open file.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; an older file of that
            name stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch turns a failed write into a RuntimeError once its archive is open.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the previous one is intact" if path.exists() else ""
        raise TrainingError(f"cannot write {path}: {reason}{kept}") from error


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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m util.checkpoint", description="Look into checkpoints, and convert them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what files are and what they are good for")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE")
    export = commands.add_parser("export", help="write the weights alone")
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help=".safetensors, .pth or .pt"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Inspect or export."""
    from util import weights  # which reads files by this module

    if args.command == "inspect":
        print("\n\n".join(weights.describe(weights.read_weights(path)) for path in args.files))
        return
    found = weights.read_weights(args.file)
    if args.to.exists():
        raise UsageError(f"--to {args.to} exists already: give another name")
    weights.export_weights(found, args.to)
    print(f"{len(found.state)} tensors of {args.file} in {args.to}")


if __name__ == "__main__":
    from util.run import run_main

    sys.exit(run_main(main, parse_args()))
