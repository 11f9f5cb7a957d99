"""Batches of an epoch: one order for any split of the work, through workers that may be lost."""

import logging
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from util.datasets import FileDataset
from util.errors import TrainingError, UsageError

_logger = logging.getLogger(__name__)  # Prints warnings even if nobody sets it up.

# Samples among which those of shards are shuffled; beyond that only the shards are.
WINDOW = 16_384
# How often workers may be lost in an epoch before the run is given up.
MAX_LOST_WORKERS = 3


def collate(items: Sequence[tuple]) -> tuple:
    """Items `(sample, …, bad)` to a batch `([N, *sample], …, bad)`.

    A list of items, several views of one file, counts as so many. `bad` is the sorted list of the
    indices that any of the items reports.
    """
    flat = [i for item in items for i in (item if isinstance(item, list) else [item])]
    *columns, bad = zip(*flat, strict=True)
    return *(default_collate(column) for column in columns), sorted(set().union(*bad))


class StepSampler:
    """Batch sampler that yields lists of `(index, seed)`, the same images however they are split.

    A step is one of the optimizer and takes `batch_size * accum_iter * world_size` images, a
    contiguous part of the epoch's permutation. Its micro-batches are contiguous parts of that,
    and what a process gets is a contiguous part of a micro-batch. So several processes or
    accumulation see the images of one process with all of the batch, in the same order. The rest
    of an epoch that fills no step is dropped.

    Args:
        num_samples: images in the data set.
        batch_size: images of a micro-batch and process.
        accum_iter: micro-batches of a step.
        rank: which of the processes this is.
        world_size: number of processes.
        seed: of the run, not negative.
        shuffle: permute; else the order is that of the data set.
        group_sizes: if samples lie in groups (shards), the number of each; they are then shuffled
            so that few groups are read at a time, see `shuffle_groups`.

    Raises:
        UsageError: fewer images than one step takes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accum_iter: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_sizes: Sequence[int] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accum_iter = accum_iter
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_sizes = group_sizes
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"{num_samples} images are fewer than one step of "
                f"{batch_size} x {accum_iter} x {world_size} = "
                f"{batch_size * accum_iter * world_size} (batch size x accumulation x processes): "
                f"lower --batch_size or --accum_iter"
            )
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.num_samples // (self.batch_size * self.accum_iter * self.world_size)

    def set_epoch(self, epoch: int, start_step: int = 0, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: decides the permutation, together with the seed.
            start_step: steps of the epoch to leave out.
            start_batch: further micro-batches to leave out.

        Raises:
            UsageError: a step beyond the epoch's end.
        """
        if start_step > self.steps_per_epoch:
            raise UsageError(
                f"cannot go on at step {start_step} of an epoch of {self.steps_per_epoch} steps: "
                f"use the data and batch size of the run that is resumed"
            )
        self.epoch = epoch
        self.first_batch = start_step * self.accum_iter + start_batch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accum_iter - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seeds = self._draw_epoch()
        for batch in range(self.first_batch, self.first_batch + len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))

    def _draw_epoch(self) -> tuple[Tensor, Tensor]:
        """The epoch's order of the images and the seed of each place in it, both `[num_samples]`.

        Seeds belong to places, not to images, so that an image looks different in each epoch.
        """
        # Hashed, because with a sum the next epoch would be the next seed's.
        epoch_seed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(epoch_seed[0]))
        seeds = torch.randint(2**63 - 1, (self.num_samples,), generator=generator)
        if not self.shuffle:
            return torch.arange(self.num_samples), seeds
        if self.group_sizes is not None:
            return shuffle_groups(self.group_sizes, WINDOW, generator), seeds
        return torch.randperm(self.num_samples, generator=generator), seeds


def shuffle_groups(sizes: Sequence[int], window: int, generator: torch.Generator) -> Tensor:
    """A permutation of samples that lie in groups, with no more than a few groups in use at a time.

    The groups are permuted as they are; then the samples are, but only within windows of so many.

    Args:
        sizes: number of samples of each group; those of a group are neighbours.
        window: how many samples in a row are shuffled.
        generator: decides both.

    Returns:
        `[sum(sizes)]`, the samples in their new order.
    """
    groups = torch.arange(sum(sizes)).split(list(sizes))
    order = torch.cat([groups[i] for i in torch.randperm(len(sizes), generator=generator)])
    parts = order.split(window)
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


class EvalSampler:
    """Batch sampler of `(index, seed)` that gives every sample once, in order.

    Each process gets its own samples, none of them twice, and none is left out; the last batch is
    as small as it comes. It stands where a `StepSampler` can.

    Args:
        num_samples: images in the data set.
        batch_size: images of a batch.
        rank: which of the processes this is.
        world_size: number of processes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.own = range(rank, num_samples, world_size)
        self.batch_size = batch_size
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this process."""
        return -(-len(self.own) // self.batch_size)

    def set_epoch(self, epoch: int, start_step: int = 0, start_batch: int = 0) -> None:
        """Leave out the first batches; all epochs are alike."""
        self.first_batch = start_step + start_batch

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.first_batch, self.steps_per_epoch):
            part = self.own[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(index, 0) for index in part]


class BadImages:
    """The files of a run that could not be decoded; each is named once.

    Args:
        warn: takes a line for the user.
    """

    def __init__(self, warn: Callable[[str], object] = _logger.warning) -> None:
        self.warn = warn
        self.paths: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Number of different files."""
        return len(self.paths)

    def add(self, indices: Iterable[int], dataset: FileDataset) -> None:
        """Take note of what a batch of `dataset` reports as bad."""
        for index in indices:
            if index not in self.paths:
                self.paths[index] = dataset.path(index)
                self.warn(f"{self.paths[index]} cannot be decoded: skipped")

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
            first = next((f"; first: {path}" for path in self.paths.values()), "")
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
            except TrainingError as error:
                # torch puts the worker's stack before the message.
                raise TrainingError(str(error).rsplit("TrainingError: ")[-1].strip()) from error
            except Exception as error:
                if not self._lost_worker():
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
            _let_only_fetching_raise()
        return batches

    def _lost_worker(self) -> bool:
        """Whether a worker has ended. An error can be seen a moment before its cause."""
        sentinels = [worker.sentinel for worker in self._workers]
        return bool(sentinels and multiprocessing.connection.wait(sentinels, timeout=1))

    def _report_lost_worker(self, lost: int, error: Exception) -> None:
        if lost > MAX_LOST_WORKERS:
            raise TrainingError(
                f"{lost} data workers were lost in this epoch, probably for want of memory "
                f"or of shared memory (/dev/shm): lower --num_workers, or give the job more memory"
            ) from error
        self.warn(
            "a data worker was killed or crashed: starting the workers again, no image is lost"
        )


def _let_only_fetching_raise() -> None:
    """Remove the signal handler by which torch reports a lost worker.

    It raises wherever the main thread happens to be, in an optimizer step, say. Without it the
    loss is noticed, within seconds, when the worker's batch is waited for.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
