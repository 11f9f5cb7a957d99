"""Files read whole: regular ones alone; an error of the storage is tried again, then ends the run.

So a disk or a network that fails for a while is never taken for a damaged image.
"""

import errno
import os
import resource
import stat
import time
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from util.errors import TrainingError

T = TypeVar("T")

# Seconds to wait before reading is tried again.
RETRY_DELAYS = (0.5, 1, 2, 4, 8, 16)
# An image of 120 megapixels with four channels of 16 bits, uncompressed, has less.
MAX_BYTES = 1 << 30
# What the storage or the machine is to blame for, by the names that the platform has.
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
_STORAGE_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EAGAIN", "EBUSY"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETRESET", "ENETUNREACH", "ENODEV", "ENOLINK", "ENOTCONN", "EPROTO", "EREMOTEIO"),
        *("ESHUTDOWN", "EBADMSG", "EUCLEAN", "EKEYEXPIRED"),
    )
    if hasattr(errno, name)
)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read, without a buffer; what is no regular file could hang for ever.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device, a socket or a folder.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}")
    return open(path, "rb", buffering=0)


def read_file(path: str | os.PathLike) -> BytesIO:
    """The content of a regular file, in memory and with the file's name.

    Raises:
        OSError: the file is to blame: it is not there, may not be read, is no regular one or has
            more than `MAX_BYTES`.
        TrainingError: the storage fails, see `retried`.
    """
    return retried(partial(_read_once, path), path)


def _read_once(path: str | os.PathLike) -> BytesIO:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise OSError(f"{path} cannot be read: its {size} bytes are more than {MAX_BYTES}")
        content = BytesIO(file.read())
    content.name = os.fspath(path)
    return content


def retried(read: Callable[[], T], path: str | os.PathLike) -> T:
    """The result of `read`, which is called again, after longer and longer, if the storage fails.

    Args:
        read: may raise OSErrors.
        path: what it reads, for the message.

    Raises:
        OSError: of `read`, if the file is to blame and not the storage.
        TrainingError: the storage still fails after the last of `RETRY_DELAYS`.
    """
    for delay in RETRY_DELAYS:
        try:
            return read()
        except OSError as error:
            if not is_of_storage(error):
                raise
        time.sleep(delay)
    try:
        return read()
    except OSError as error:
        if not is_of_storage(error):
            raise
        raise TrainingError(
            f"{path} cannot be read, tried {len(RETRY_DELAYS) + 1} times in "
            f"{sum(RETRY_DELAYS):g} s: {error.strerror} ({errno.errorcode[error.errno]}); "
            f"{_remedy(error.errno)}"
        ) from error


def is_of_storage(error: OSError) -> bool:
    """True for an error that the storage or the machine is to blame for, and not the file."""
    return error.errno in _STORAGE_ERRORS


def _remedy(number: int) -> str:
    if number in _TOO_MANY_OPEN:
        return too_many_open_files()
    return "the file may be sound, its storage is not: start again when it answers"


def too_many_open_files() -> str:
    """Advice for a process that has come to its limit of open files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"raise the limit of open files (`ulimit -n` is {limit}), or lower --num_workers"


def is_one_of(path: Path, files: Iterable[str | os.PathLike]) -> bool:
    """True if a path leads to one of some files, by whatever name: writing there would lose it."""
    return find_lost([path], files) is not None


def find_lost(targets: Iterable[Path], files: Iterable[str | os.PathLike]) -> Path | None:
    """The first of the paths to write that leads to one of some files; None if there is none."""
    targets = [path for path in targets if path.exists()]
    there = {_identity(f) for f in files if os.path.exists(f)} if targets else ()
    return next((path for path in targets if _identity(path) in there), None)


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def reason_of(error: OSError, path: str) -> str:
    """One line on why a file cannot be used, without the file's name."""
    text = error.strerror if error.errno and error.strerror else str(error)
    for known in ("decoded", "read"):
        text = text.removeprefix(f"{path} cannot be {known}: ")
    return " ".join(text.splitlines())
