"""Files that are whole or not there: temporary name, flush to disk, rename."""

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from util.errors import TrainingError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def temporary_name(path: Path) -> Path:
    """A name beside a file that no other process writes to."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had half written to a folder that nobody else writes to."""
    for path in folder.iterdir():
        if _TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def _flush_folder(path: Path) -> None:
    """Have what was renamed in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is whole or not there: temporary name, flush to disk, rename.

    Args:
        path: the file's name in the end.
        write: takes the open file.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; an older file of that
            name stays.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch turns a failed write into a RuntimeError once its archive is open.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the previous one is intact" if path.exists() else ""
        raise TrainingError(f"cannot write {path}: {reason}{kept}") from error
