"""Files that are whole or not there: temporary name, flush to disk, rename."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from util.errors import TrainingError


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
