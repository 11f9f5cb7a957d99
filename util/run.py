"""What every main does around its loop: exit codes, seeds, one epoch of steps."""

import argparse
import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.distributed import StopSignal, gather_objects, print_once, world_size
from util.errors import TrainingError, UsageError
from util.loader import BadImages, Loader
from util.logger import Meters, Progress, RunLog, peak_memory_mb
from util.lr_sched import adjust_learning_rate
from util.optim_step import OptimStep
from util.resume import LAST, Checkpoints


class Stopped(Exception):
    """The run was asked to stop and has saved its state: exit 0."""


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a main to its exit code: 0 done or saved on a signal, 2 bad use, 1 failed."""
    code = 0
    try:
        main(args)
    except Stopped as stop:
        print_once(stop)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except TrainingError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"failed: the disk or the quota is full: {error}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint counts", file=sys.stderr, flush=True)
        code = 130
    # Only where all processes get here: after a failure the others may wait in a collective.
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    return code


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike in all processes; `seed` is below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Run:
    """A training run: what takes steps, and what is told and saved on the way.

    Attributes:
        args: completed arguments.
        device: where the model runs.
        model: the bare model; `step.model` is the same in DDP, compiled.
        loader: yields micro-batches, the last entry of each being the files that failed.
        step: takes the optimizer steps.
        meters: of loss and gradient norm.
        checkpoints: of the run.
        log: TensorBoard and log.txt.
    """

    args: argparse.Namespace
    device: torch.device
    model: nn.Module
    loader: Loader
    step: OptimStep
    meters: Meters
    checkpoints: Checkpoints
    log: RunLog

    def __post_init__(self) -> None:
        self.stop = StopSignal()
        self.bad_images = BadImages(lambda text: print_once(text, error=True))
        self._new_bad: set[int] = set()

    def train_epoch(
        self, epoch: int, start: int, forward: Callable[..., Tensor]
    ) -> dict[str, float]:
        """Take the steps of one epoch, from `start` on.

        Args:
            epoch: number of the epoch, from 0.
            start: steps already done in it, after a resume.
            forward: from the entries of a micro-batch to its mean loss.

        Returns:
            The epoch's means, with MAE's keys ("train_loss", "train_lr").

        Raises:
            Stopped: a signal came; the state is saved.
            TrainingError: the run cannot go on.
        """
        args, steps = self.args, self.loader.steps_per_epoch
        title = f"Epoch {epoch + 1}/{args.epochs}"
        progress = Progress(title, steps, start, (args.epochs - epoch - 1) * steps)
        batches = self._batches(epoch, start)
        last_time, last_step = time.perf_counter(), start
        for done in range(start + 1, steps + 1):
            position = epoch + (done - 1) / steps
            rate = adjust_learning_rate(
                self.step.optimizer,
                position,
                lr=args.lr,
                min_lr=args.min_lr,
                warmup_epochs=args.warmup_epochs,
                epochs=args.epochs,
            )
            micro_batches = islice(batches, args.accum_iter)
            result = self.step.take(micro_batches, args.accum_iter, lambda b: forward(*b))
            self.meters.update(result.taken, loss=result.loss, grad_norm=result.grad_norm)
            progress.advance()

            report = done % args.print_freq == 0 or done == steps
            if report:
                values = self._report(rate)
                now = time.perf_counter()
                images = (done - last_step) * args.effective_batch_size
                values["images_per_s"] = images / (now - last_time)
                last_time, last_step = now, done
                self.log.scalars(epoch + done / steps, values)
                progress.show(done, values)
            cheap = world_size() == 1 or self.device.type == "cpu"
            if done < steps and (report or cheap) and self.stop.agreed(self.device):
                progress.close()
                self._save(epoch, done, LAST)
                raise Stopped(self._stopped(f"epoch {epoch + 1}, step {done} of {steps}"))
            if args.save_steps and done % args.save_steps == 0 and done < steps:
                self._save(epoch, done, LAST)
        progress.close()
        means = self.meters.read_epoch()
        return {"train_lr": rate, **{f"train_{name}": value for name, value in means.items()}}

    def end_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Write the epoch's line and checkpoints.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        self.log.epoch({**values, "epoch": epoch})
        self.meters.start_epoch()
        last = epoch + 1 == self.args.epochs
        keep = (epoch + 1) % self.args.save_freq == 0 or last
        # checkpoint.pth comes last: what a kill leaves unwritten before it is written again.
        self._save(epoch + 1, 0, *([f"checkpoint-{epoch}.pth"] if keep else []), LAST)
        if not last and self.stop.agreed(self.device):
            raise Stopped(self._stopped(f"the end of epoch {epoch + 1}"))

    def _save(self, epoch: int, step: int, *names: str) -> None:
        self.step.check()  # a run that is about to fail keeps its older checkpoint
        self.checkpoints.save(epoch, step, *names)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches on the device, the failed files noted."""
        for *batch, bad in self.loader.epoch(epoch, start):
            self._new_bad.update(bad)
            yield tuple(x.to(self.device, non_blocking=True) for x in batch)

    def _report(self, rate: float) -> dict[str, float]:
        """The numbers since the last report; the one place that waits for the device."""
        values = {"lr": rate, **self.meters.read(), "memory_mb": peak_memory_mb(self.device)}
        skipped = self.step.skipped.item()
        if skipped:
            values["skipped_steps"] = skipped
        for bad in gather_objects(sorted(self._new_bad)):
            self.bad_images.add(bad, self.loader.dataset)
        self._new_bad.clear()
        total = self.bad_images.count
        if total:
            values["bad_images"] = total
            self.bad_images.check(total, len(self.loader.dataset), self.args.max_bad_images)
        self.step.check()
        return values

    def _stopped(self, position: str) -> str:
        command = "--resume auto" if self.args.resume == "none" else "the same command"
        return (
            f"stopped by a signal at {position}: saved in {self.checkpoints.folder / LAST}; "
            f"{command} goes on from there"
        )
