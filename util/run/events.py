"""A TensorBoard event file that a full disk, a deleted folder or a wrong clock cannot break.

torch's `SummaryWriter` writes in a thread of its own, which dies with a traceback at the first
error, and names its files by the clock alone.
"""

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

# What waits for a file that cannot be written is dropped beyond so many bytes.
MAX_PENDING = 32 << 20


class EventFile:
    """One event file of a run, appended to.

    Args:
        folder: of the events.
        purge_step: TensorBoard drops what earlier files of the folder have from this step on.
    """

    def __init__(self, folder: str | Path, purge_step: int) -> None:
        folder = Path(folder)
        # TensorBoard reads files by name: one more than the newest, even if the clock went back.
        newest = max(map(_stamp, folder.glob("events.out.tfevents.*")), default=0)
        stamp = max(int(time.time()), newest + 1)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._pending = io.BytesIO()
        self._written = 0
        self._first_step = purge_step
        version = Event(
            wall_time=time.time(), file_version="brain.Event:2", source_metadata=_source()
        )
        start = Event(
            wall_time=time.time(),
            step=purge_step,
            session_log=SessionLog(status=SessionLog.START),
        )
        for event in (version, start):
            RecordWriter(self._pending).write(event.SerializeToString())

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point of a curve, to be written by `flush`."""
        self._add(Event(summary=summary.scalar(name, value)), step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Add a picture `[3, H, W]` with values in [0, 1], to be written by `flush`."""
        self._add(Event(summary=summary.image(name, image, dataformats="CHW")), step)

    def hyperparameters(self, values: Mapping[str, object]) -> None:
        """Add what TensorBoard's table of runs shows, to be written by `flush`.

        They stand in the run itself: `SummaryWriter.add_hparams` makes another run for them.

        Args:
            values: numbers, switches and texts by name; of None the table has an empty cell.
        """
        plain = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        # Without the first, an experiment's columns: TensorBoard would show one run's for all.
        _, start, _ = summary.hparams(plain, {})
        self._add(Event(summary=start), self._first_step)

    def flush(self) -> None:
        """Write what is pending to the file.

        Raises:
            OSError: the file cannot be written; what is pending waits for the next time.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # Half a record, which a full disk leaves, would hide all that follows it.
                file.truncate(min(self._written, os.fstat(file.fileno()).st_size))
                file.write(self._pending.getvalue())
                file.flush()
                self._written = file.tell()
        except OSError:
            if self._pending.tell() < MAX_PENDING:
                raise
        self._pending = io.BytesIO()

    def _add(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        RecordWriter(self._pending).write(event.SerializeToString())


def _stamp(path: Path) -> int:
    found = re.match(r"events\.out\.tfevents\.(\d+)", path.name)
    return int(found[1]) if found else 0


def _source() -> SourceMetadata:
    return SourceMetadata(writer="util.run.events")
