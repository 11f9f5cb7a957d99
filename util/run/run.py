"""What every main does around its loop: exit codes, seeds, one epoch of steps."""

import argparse
import errno
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.data.datasets import FileDataset
from util.data.loader import BadImages, Loader
from util.data.samplers import EvalSampler, StepSampler
from util.data.shards import is_shards
from util.errors import TrainingError, UsageError
from util.run.args import check_same_run, check_writable, complete, plain
from util.run.distributed import (
    StopSignal,
    cores_per_process,
    gather_objects,
    is_main_process,
    print_once,
    rank,
    world_size,
    wrap_model,
)
from util.run.feed import DeviceFeed, Pace
from util.run.lock import hold
from util.run.logger import Meters, Progress, RunLog, peak_memory_mb
from util.run.lr_sched import adjust_learning_rate
from util.run.optim_step import OptimStep, amp_dtype
from util.run.original import comparable_args
from util.run.resume import BEST, LAST, Checkpoints, Stateful

# A larger share of waiting for data is said in a line, once so many steps of an epoch are done.
MAX_DATA_WAIT = 0.1
STEPS_TO_JUDGE = 100
# Environment variable by which a launcher can tell a run that stopped from one that is done.
STOPPED_EXIT_CODE = "STOPPED_EXIT_CODE"


class Stopped(Exception):
    """The run was asked to stop and has saved its state: exit 0."""


def run_main(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Run a main to its exit code: 0 done or saved on a signal, 2 bad use, 1 failed.

    The environment variable `STOPPED_EXIT_CODE` is that of a run saved on a signal.
    """
    code = together = 0
    try:
        main(args)
    except Stopped as stop:
        print_once(stop)
        code = together = int(os.environ.get(STOPPED_EXIT_CODE, 0))
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
    if dist.is_initialized() and code == together:
        dist.destroy_process_group()
    return code


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, alike in all processes; `seed` is below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def complete_run(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the arguments and check all that can be checked before anything is built.

    The output folder is this run's until the process ends.

    Raises:
        UsageError: values that do not go together or that this machine cannot do; another run
            has the output folder.
    """
    complete(args, device.type, world_size())
    amp_dtype(args.amp, device)
    check_writable(args.output_dir, "--output_dir")
    check_writable(args.log_dir, "--log_dir")
    hold(args.output_dir)


def train_loader(args: argparse.Namespace, dataset: FileDataset) -> Loader:
    """A data set in the order in which steps take it.

    Raises:
        UsageError: the run would write its pictures among the images.
    """
    root = Path(dataset.root).resolve()
    if root.is_dir() and not is_shards(root) and args.output_dir.resolve().is_relative_to(root):
        raise UsageError(
            f"--output_dir {args.output_dir} lies within the data, {dataset.root}: its pictures "
            f"would be taken for {dataset.what}; choose a folder outside"
        )
    sampler = StepSampler(
        *(len(dataset), args.batch_size, args.accum_iter, rank(), world_size(), args.seed),
        group_sizes=dataset.group_sizes,
    )
    return Loader(dataset, sampler, args.num_workers, args.pin_mem)


def eval_loader(args: argparse.Namespace, dataset: FileDataset, batch_size: int) -> Loader:
    """Every sample of a data set once, each in one process."""
    if args.dist_eval:
        sampler = EvalSampler(len(dataset), batch_size, rank(), world_size())
    else:
        sampler = EvalSampler(len(dataset) * is_main_process(), batch_size)
    return Loader(dataset, sampler, args.num_workers, args.pin_mem)


def check_program(content: Mapping, program: str) -> None:
    """Refuse to go on from the state of another kind of run.

    Args:
        content: the checkpoint to resume from.
        program: what kind of run this is, such as "pretraining".

    Raises:
        UsageError: saying what to do instead.
    """
    other = content.get("program", program)
    if other != program:
        raise UsageError(
            f"the checkpoint to resume from belongs to a {other} run, and this is {program}: give "
            f"another --output_dir, and the checkpoint as --finetune to start from its weights"
        )


def check_state(content: Mapping, args: argparse.Namespace, num_images: int) -> None:
    """Refuse to go on from the state of another run.

    Args:
        content: the checkpoint to resume from.
        args: this run's arguments, completed.
        num_images: images of the data set.

    Raises:
        UsageError: saying what differs.
    """
    saved = content["args"]
    if content.get("original"):
        saved = comparable_args(saved, plain(args))
    check_same_run(args, saved)
    if content["step"] and content["num_images"] != num_images:
        raise UsageError(
            f"cannot go on at step {content['step']} of an epoch of {content['num_images']} "
            f"images: there are {num_images} now; give the same images, or resume from the end "
            f"of an epoch"
        )


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
        position: epoch and steps done in it at which the run begins.
        after_step: called after each step.
    """

    args: argparse.Namespace
    device: torch.device
    model: nn.Module
    loader: Loader
    step: OptimStep
    meters: Meters
    checkpoints: Checkpoints
    log: RunLog
    position: tuple[int, int]
    after_step: Callable[[], object] = lambda: None

    @classmethod
    def prepare(
        cls,
        args: argparse.Namespace,
        device: torch.device,
        loader: Loader,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        content: Mapping | None,
        *,
        program: str,
        parts: Mapping[str, Stateful] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> "Run":
        """Put a run together and set it to the state to go on from.

        Args:
            args: completed arguments.
            device: where `model` is.
            loader: the training data.
            model: bare.
            optimizer: of the model's parameters, one that honours `found_inf`.
            content: a checkpoint's contents, checked by `check_state`; None to begin.
            program: what kind of run this is.
            parts: what checkpoints hold beside model, optimizer, scaler and meters.
            extra: further plain values for the checkpoints.

        Raises:
            UsageError: the processes do not see the same files.
        """
        trained = wrap_model(model, device, args.compile)
        step = OptimStep(trained, optimizer, device, amp_dtype(args.amp, device), args.clip_grad)
        meters = Meters(("loss", "grad_norm"), device)
        parts = {"model": model, "optimizer": optimizer, "scaler": step, "meters": meters} | dict(
            parts or {}
        )
        extra = {"program": program, "num_images": len(loader.dataset)} | dict(extra or {})
        checkpoints = Checkpoints(args.output_dir, plain(args), parts, extra)
        position = checkpoints.restore(content) if content else (0, 0)
        views = gather_objects((*position, len(loader.dataset)))
        if len(set(views)) > 1:
            raise UsageError(
                f"the processes see different things (epoch, step, images: {views}): "
                f"--output_dir and --data_path must be the same folders on every node"
            )
        begin = position[0] + position[1] / loader.steps_per_epoch
        log = RunLog(args.output_dir, args.log_dir, begin)
        return cls(args, device, model, loader, step, meters, checkpoints, log, position)

    def describe(self, title: str) -> None:
        """Print what is about to run, `title` first."""
        args, (epoch, step) = self.args, self.position
        if epoch >= args.epochs:
            print_once(f"nothing to train: {args.output_dir} holds all {args.epochs} epochs")
            return
        precision = str(self.step.dtype or torch.float32).removeprefix("torch.")
        begin = f"from epoch {epoch + 1}, step {step}" if epoch or step else "from the beginning"
        print_once(
            f"{title}\n"
            f"{len(self.loader.dataset)} {self.loader.dataset.what} of "
            f"{self.loader.dataset.root}, "
            f"{self.loader.steps_per_epoch} steps of {args.batch_size} x {args.accum_iter} x "
            f"{world_size()} = {args.effective_batch_size} an epoch\n"
            f"{args.epochs} epochs {begin}, peak lr {args.lr:.3g}, {precision} on {self.device}"
            f"{', compiled' if args.compile else ''}, output in {args.output_dir}"
        )

    def epochs(self) -> Iterator[tuple[int, int]]:
        """The epochs to run, each with the steps already done in it."""
        first, step = self.position
        for epoch in range(first, self.args.epochs):
            yield epoch, step
            step = 0

    def __post_init__(self) -> None:
        self.stop = StopSignal()
        self.bad_images = BadImages(lambda text: print_once(text, error=True))
        self.feed = DeviceFeed(self.device)
        self._new_bad: set[int] = set()
        self._told_of_waiting = False

    def train_epoch(
        self, epoch: int, start: int, forward: Callable[..., Tensor]
    ) -> dict[str, float]:
        """Take the steps of one epoch, from `start` on.

        Args:
            epoch: number of the epoch, from 0.
            start: steps already done in it, after a resume.
            forward: from the entries of a micro-batch to its mean loss.

        Returns:
            The epoch's means, with MAE's keys ("train_loss", "train_lr"), and the share of the
            time that was waiting for data ("data_wait").

        Raises:
            Stopped: a signal came; the state is saved.
            TrainingError: the run cannot go on.
        """
        args, steps = self.args, self.loader.steps_per_epoch
        title = f"Epoch {epoch + 1}/{args.epochs}"
        progress = Progress(title, steps, start, (args.epochs - epoch - 1) * steps)
        batches = self.feed(self._batches(epoch, start))
        pace = Pace(self.feed, start, args.effective_batch_size)
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
            self.after_step()
            self.meters.update(result.taken, loss=result.loss, grad_norm=result.grad_norm)
            progress.advance()

            report = done % args.print_freq == 0 or done == steps
            if report:
                values = self._report(rate)
                values |= pace.read(done)
                self.log.scalars(epoch + done / steps, values)
                progress.show(done, values)
                if done == steps or done - start >= STEPS_TO_JUDGE:
                    self._judge(pace.data_wait)
            cheap = world_size() == 1 or self.device.type == "cpu"
            if done < steps and (report or cheap) and self.stop.agreed(self.device):
                progress.close()
                self._save(epoch, done, LAST)
                raise Stopped(self._stopped(f"epoch {epoch + 1}, step {done} of {steps}"))
            if args.save_steps and done % args.save_steps == 0 and done < steps:
                self._save(epoch, done, LAST)
        progress.close()
        means = {f"train_{name}": value for name, value in self.meters.read_epoch().items()}
        return {"train_lr": rate, **means, "data_wait": round(pace.data_wait, 4)}

    def end_epoch(self, epoch: int, values: dict[str, float], *, best: bool = False) -> None:
        """Write the epoch's line and checkpoints.

        Args:
            epoch: the one that is done.
            values: for log.txt.
            best: whether it gave the best model so far.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        self.log.epoch({**values, "epoch": epoch})
        self.meters.start_epoch()
        last = epoch + 1 == self.args.epochs
        keep = (epoch + 1) % self.args.save_freq == 0 or last
        # checkpoint.pth comes last: what a kill leaves unwritten before it is written again.
        names = [BEST] * best + [f"checkpoint-{epoch}.pth"] * keep
        self._save(epoch + 1, 0, *names, LAST)
        if not last and self.stop.agreed(self.device):
            raise Stopped(self._stopped(f"the end of epoch {epoch + 1}"))

    def _save(self, epoch: int, step: int, *names: str) -> None:
        self.step.check()  # a run that is about to fail keeps its older checkpoint
        self.checkpoints.save(epoch, step, *names)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches from the loader, the failed files noted."""
        for *batch, bad in self.loader.epoch(epoch, start):
            self._new_bad.update(bad)
            yield batch

    def _judge(self, data_wait: float) -> None:
        """Say once if the model waits for its data."""
        if data_wait > MAX_DATA_WAIT and not self._told_of_waiting:
            self._told_of_waiting = True
            print_once(
                f"the model waits for data {data_wait:.0%} of the time: raise --num_workers (now "
                f"{self.args.num_workers} a process, there are {cores_per_process()} cores for "
                f'each), or see PRETRAIN.md, "When the model waits for data"'
            )

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
            dataset = self.loader.dataset
            self.bad_images.check(total, len(dataset), self.args.max_bad_images, dataset.what)
        self.step.check()
        return values

    def _stopped(self, position: str) -> str:
        command = "--resume auto" if self.args.resume == "none" else "the same command"
        return (
            f"stopped by a signal at {position}: saved in {self.checkpoints.folder / LAST}; "
            f"{command} goes on from there"
        )
