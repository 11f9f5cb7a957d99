"""One run at a time in an output folder, however the one before ended."""

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

from util.atomic import remove_leftovers
from util.errors import UsageError, printable
from util.run.distributed import gather_objects, is_main_process

LOCK = "run.lock"
# A holder touches its file so often, in seconds; another machine looks on for as long as WATCH
# before it takes a silent holder for dead.
BEAT, WATCH = 5.0, 20.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[Path] = set()


class FolderLock:
    """The right to write to a folder, for one process; a context, or `acquire` and `release`.

    The file `run.lock` in the folder is locked as long as the process lives (the kernel ends that
    with it, its children do not prolong it) and says who it is. Where the file system does not
    carry locks from machine to machine, or has none, who it is and a sign of life decide.

    Args:
        folder: an existing folder.
        flag: the option that chose it, for messages.
    """

    def __init__(self, folder: str | Path, flag: str = "--output_dir") -> None:
        self.folder, self.flag = Path(folder), flag
        self.path = self.folder.resolve() / LOCK
        self.file, self.pid = -1, 0
        self.ended = threading.Event()

    def acquire(self) -> None:
        """Take the folder, from a dead holder too, and remove what that had half written.

        Raises:
            UsageError: another run has it, or it cannot be written.
        """
        if self.path in _held:  # a process does not lock itself out
            self._refuse(_identity())
        try:
            # Looking at the file first: to close it again would give up a lock on it.
            seen = _peek(self.path)
            if seen and seen.get("boot") != _boot() and self._beats():
                self._refuse(seen)
            supported = self._open()
            holder = _read(self.file)
            if holder and (holder != seen or (not supported and _runs(holder))):
                os.close(self.file)
                self._refuse(holder)
            self._write()
        except OSError as error:
            raise UsageError(f"{self.flag} {self.folder} cannot be locked: {error}") from error
        if not supported:
            time.sleep(1)  # of two that came here together the later one has written over this
            if _read(self.file) != self.identity:
                self._refuse(_read(self.file))
        self.pid = os.getpid()
        _held.add(self.path)
        self.ended.clear()
        threading.Thread(target=self._beat, daemon=True).start()
        remove_leftovers(self.folder)

    def release(self) -> None:
        """Give the folder back; nothing happens if it is not held, or in a child process."""
        if self.pid != os.getpid():
            return
        self.pid = 0
        self.ended.set()
        _held.discard(self.path)
        if self._is_current():
            self.path.unlink(missing_ok=True)
        os.close(self.file)

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> bool:
        """Open and lock the file; False where the file system has no locks."""
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            supported = True
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = _read(self.file)
                    os.close(self.file)
                    self._refuse(holder)
                if error.errno not in _NO_LOCKS:
                    raise
                supported = False
            if self._is_current():
                return supported
            os.close(self.file)  # its holder removed it meanwhile

    def _is_current(self) -> bool:
        """True if the open file is the one in the folder."""
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _beats(self) -> bool:
        """Watch for signs of life of a holder on another machine: there may be no locks between."""
        before, end = os.stat(self.path).st_mtime_ns, time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH / 10))
            with open(self.path) as file:  # network file systems look anew on opening
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
        return False

    def _write(self) -> None:
        self.identity = _identity()
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(self.identity).encode(), 0)
        os.fsync(self.file)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                os.utime(self.file)
            except OSError:
                return  # the folder is gone, or the file was closed just now

    def _refuse(self, holder: dict | None) -> None:
        who = "another run"
        if holder:
            pid, host, since = (printable(holder.get(k, "?")) for k in ("pid", "host", "since"))
            who = f"process {pid} on {host}, since {since}"
        raise UsageError(
            f"{self.flag} {self.folder} is in use by {who}: wait for its end, stop it, or give "
            f"another folder"
        )


def hold(folder: str | Path, flag: str = "--output_dir") -> None:
    """Keep a folder for this run until it ends; all its processes call this together.

    Args:
        folder: an existing folder.
        flag: the option that chose it, for messages.

    Raises:
        UsageError: in all processes; another run has it, or it cannot be written.
    """
    problem = None
    if is_main_process():
        lock = FolderLock(folder, flag)
        try:
            lock.acquire()
            atexit.register(lock.release)
        except UsageError as error:
            problem = str(error)
    if problem := gather_objects(problem)[0]:
        raise UsageError(problem)


def _identity() -> dict[str, object]:
    """Who this process is."""
    pid = os.getpid()
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    host = socket.gethostname()
    return {"host": host, "pid": pid, "since": since, "ticks": _started(pid), "boot": _boot()}


def _boot() -> str:
    """A name of the running kernel, which containers share; the host's where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _started(pid: object) -> str | None:
    """When a process of this machine began, so that its number alone does not count; else None."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, TypeError, OverflowError):
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "running"


def _runs(holder: dict) -> bool:
    """True if the process that wrote this lives on this machine."""
    ticks = _started(holder.get("pid"))
    return holder.get("boot") == _boot() and ticks is not None and ticks == holder.get("ticks")


def _peek(path: Path) -> dict | None:
    """Contents of a file that may not be there."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read(file)
    finally:
        os.close(file)


def _read(file: int) -> dict | None:
    """Record that a holder wrote; None for an empty or damaged file."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None
