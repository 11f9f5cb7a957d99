"""Batches of an epoch, through worker processes that may be lost."""

import contextlib
import errno
import logging
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from util.data.datasets import BadFile, FileDataset
from util.data.files import too_many_open_files
from util.data.samplers import EvalSampler, StepSampler
from util.errors import TrainingError, UsageError

_logger = logging.getLogger(__name__)  # Prints warnings even if nobody sets it up.
# How often workers may be lost in an epoch before the run is given up.
MAX_LOST_WORKERS = 3
_SHARED_MEMORY = "/dev/shm"


def collate(items: Sequence[tuple]) -> tuple:
    """Items `(sample, …, bad)` to a batch `([N, *sample], …, bad)`.

    A list of items, several views of one file, counts as so many. `bad` is the sorted list of what
    any of the items reports: `(index, reason)`.
    """
    flat = [i for item in items for i in (item if isinstance(item, list) else [item])]
    *columns, bad = zip(*flat, strict=True)
    batch = [default_collate(column) for column in columns]
    if get_worker_info():
        # Here a want of shared memory is an error; in torch's queue the batch would be lost.
        batch = [column.share_memory_() for column in batch]
    return *batch, sorted(set().union(*bad))


class BadImages:
    """The files of a run that could not be decoded; each is named once.

    Args:
        warn: takes a line for the user.
    """

    def __init__(self, warn: Callable[[str], object] = _logger.warning) -> None:
        self.warn = warn
        self.named: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Number of different files."""
        return len(self.named)

    def add(self, bad: Iterable[BadFile], dataset: FileDataset) -> None:
        """Take note of what a batch of `dataset` reports as bad."""
        for index, reason in bad:
            if index not in self.named:
                path = dataset.path(index)
                self.named[index] = f"{path} ({reason})"
                self.warn(f"{path} cannot be decoded: skipped ({reason})")

    def check(self, total: int, num_files: int, max_share: float, what: str = "images") -> None:
        """Stop a run on damaged data.

        Args:
            total: bad files of all processes.
            num_files: files of the data set.
            max_share: share of them that may be bad.
            what: they are.

        Raises:
            TrainingError: more are.
        """
        if total > max_share * num_files:
            first = next((f"; first: {name}" for name in self.named.values()), "")
            raise TrainingError(
                f"{total} of {num_files} {what} cannot be decoded, "
                f"more than --max_bad_images {max_share} allows{first}"
            )


class Loader:
    """Micro-batches of an epoch, through worker processes of which some may be lost.

    A worker that dies (the out-of-memory killer likes them) costs a warning and a restart of the
    workers; no batch is lost or given twice.

    Args:
        dataset: takes the sampler's keys.
        sampler: which samples make up which batch.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: put batches where a GPU can fetch them from.
        warn: takes a line for the user.
    """

    def __init__(
        self,
        dataset: FileDataset,
        sampler: StepSampler | EvalSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        warn: Callable[[str], object] = _logger.warning,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.warn = warn
        self._new_dataloader = partial(
            DataLoader,
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own, because each epoch draws a number from it that is of no use here.
            generator=torch.Generator(),
        )
        self._dataloader = self._new_dataloader()
        self._workers: list[multiprocessing.Process] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple]:
        """Yield what `collate` made of each micro-batch from `start_step` on.

        Raises:
            TrainingError: too many workers were lost, or a sample was given up.
        """
        delivered = lost = 0
        batches = None
        while True:
            try:
                if batches is None:
                    self.sampler.set_epoch(epoch, start_step, delivered)
                    batches = self._start()
                batch = next(batches, None)
            except (TrainingError, UsageError) as error:
                # torch puts the worker's stack before the message.
                kind = type(error)
                raise kind(str(error).rsplit(f"{kind.__name__}: ")[-1].strip()) from error
            except Exception as error:
                # A lost worker may look like any of the troubles that there is advice for.
                if not self._lost_worker():
                    if advice := self._advice(error):
                        raise TrainingError(advice) from error
                    raise
                lost += 1
                self._report_lost_worker(lost, error)
                self._dataloader, batches = self._new_dataloader(), None
                continue
            if batch is None:
                return
            delivered += 1
            yield batch

    def _start(self) -> Iterator[tuple]:
        batches = iter(self._dataloader)
        if self._dataloader.num_workers > 0:
            self._workers = batches._workers
            _ignore_signals_of_workers()
        return batches

    def _lost_worker(self) -> bool:
        """True if a worker has ended; waits a moment, as the error may come before its cause."""
        sentinels = [worker.sentinel for worker in self._workers]
        return bool(sentinels and multiprocessing.connection.wait(sentinels, timeout=1))

    def _advice(self, error: Exception) -> str:
        """Remedy for an error of the machinery between workers and this process; "" if none.

        torch raises it with the worker's stack before it, and at times as "Success".
        """
        text = str(error)
        if "Too many open files" in text or "ancdata" in text:
            return f"the data workers cannot send their batches: {too_many_open_files()}"
        if "</torch_" in text or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return (
                f"the shared memory is too small for the batches of the "
                f"{self._dataloader.num_workers} data workers: {self._enlarge()}"
            )
        return ""

    def _enlarge(self) -> str:
        with contextlib.suppress(OSError):
            state = os.statvfs(_SHARED_MEMORY)
            size = state.f_blocks * state.f_frsize / 2**20
            return (
                f"{_SHARED_MEMORY} has {size:.0f} MiB; start the container with --shm-size=8g or "
                f"--ipc=host, or lower --num_workers or --batch_size"
            )
        return "lower --num_workers or --batch_size"

    def _report_lost_worker(self, lost: int, error: Exception) -> None:
        if lost > MAX_LOST_WORKERS:
            advice = self._advice(error) or (
                f"probably for want of memory or of shared memory: give the job more memory; "
                f"{self._enlarge()}"
            )
            raise TrainingError(f"{lost} data workers were lost in this epoch, {advice}") from error
        self.warn(
            "a data worker was killed or crashed: starting the workers again, no image is lost"
        )


def _ignore_signals_of_workers() -> None:
    """Remove the signal handler by which torch reports a lost worker.

    It raises wherever the main thread happens to be, in an optimizer step, say. Without it the
    loss is noticed, within seconds, when the worker's batch is waited for.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
