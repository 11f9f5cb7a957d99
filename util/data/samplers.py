"""Batch samplers: one order of samples for any split over processes and accumulation."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from util.errors import UsageError

# Samples among which those of shards are shuffled; beyond that only the shards are.
WINDOW = 16_384


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
        group_sizes: Sequence[int] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accum_iter = accum_iter
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
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
