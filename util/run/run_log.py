"""The files in which a run keeps its numbers: log.txt and TensorBoard's events.

A run does not end because they cannot be written: it says so once and trains on.
"""

import contextlib
import errno
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from util.run.distributed import is_main_process, print_once
from util.run.events import EventFile


class RunLog:
    """TensorBoard's events, and log.txt with a JSON line an epoch under MAE's keys.

    Only the main process writes.

    Args:
        folder: `--output_dir`, for log.txt.
        log_dir: for TensorBoard's events.
        epoch: the epoch to go on with; its line and later ones of an interrupted run are dropped.
        part: share of its steps that are done; later scalars are dropped.
    """

    def __init__(
        self, folder: str | Path, log_dir: str | Path, epoch: int = 0, part: float = 0.0
    ) -> None:
        self.path = Path(folder) / "log.txt"
        self.events = None
        self._told: set[str] = set()
        if is_main_process():
            self.events = EventFile(log_dir, purge_step=round((epoch + part) * 1000) + 1)
            with self.unless_it_fails(self.path):
                self._drop_from(epoch)

    def hyperparameters(self, values: Mapping[str, object]) -> None:
        """Have TensorBoard's table of runs show values, beside the curves' last points."""
        if self.events:
            self.events.hyperparameters(values)
            self.flush()

    def scalars(self, epoch: float, group: str, values: Mapping[str, float]) -> None:
        """Add points to TensorBoard's curves `group/name`.

        Args:
            epoch: fractional; the x axis is epoch * 1000, as in MAE.
            group: train, test or perf.
            values: by name.
        """
        if self.events:
            for name, value in values.items():
                self.events.scalar(f"{group}/{name}", value, round(epoch * 1000))
            self.flush()

    def picture(self, epoch: float, name: str, image: Tensor) -> None:
        """Add a picture `[3, H, W]` with values in [0, 1] to TensorBoard's `pictures/name`."""
        if self.events:
            self.events.image(f"pictures/{name}", image, round(epoch * 1000))
            self.flush()

    def epoch(self, values: dict[str, float]) -> None:
        """Append an epoch's line to log.txt; a value that is not finite becomes null."""
        if self.events:
            self.flush()
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            with self.unless_it_fails(self.path), open(self.path, "a") as file:
                file.write(json.dumps(finite) + "\n")

    def flush(self) -> None:
        """Write TensorBoard's pending events."""
        if self.events:
            with self.unless_it_fails(self.events.path):
                self.events.flush()

    close = flush

    @contextlib.contextmanager
    def unless_it_fails(self, path: Path) -> Iterator[None]:
        """Say once for each file that it cannot be written, and go on."""
        try:
            yield
        except OSError as error:
            if str(path) not in self._told:
                self._told.add(str(path))
                reason = error.strerror or error
                print_once(
                    f"warning: {path} cannot be written ({reason}): the run goes on without it",
                    error=True,
                )

    def _drop_from(self, epoch: int) -> None:
        """Remove the lines of epochs that will be run again.

        A log of which nothing would be left, or that has lines of something else, is kept under
        another name.
        """
        if not self.path.is_file():
            return
        rows, strange = read_log(self.path)
        kept = [row for row in rows if row["epoch"] < epoch]
        if (rows and not kept) or strange:
            names = (self.path.with_name(f"log-{number}.txt") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.path.rename(aside)
            what = f"{strange} lines that are not an epoch's" if strange else "an earlier run"
            print_once(f"warning: {self.path} has {what}: kept as {aside.name}", error=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)


def read_log(path: Path) -> tuple[list[dict], int]:
    """The epochs' lines of a log.txt, and the number of lines that are something else.

    A last line without an end is neither: a kill leaves such a one.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():  # a device would be read without end
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("epoch")) is int:
                rows.append(row)
    return rows, len(lines) - len(rows)
