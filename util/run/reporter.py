"""The account a run gives of itself as it trains: console, TensorBoard, log.txt, bad files."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from util.data.loader import BadImages, Loader
from util.run.distributed import cores_per_process, gather_objects, print_once
from util.run.feed import DeviceFeed, Pace, Stopwatch
from util.run.logger import Meters, Progress, clock, peak_memory_mb
from util.run.normalization import given_stats
from util.run.optim_step import OptimStep, StepResult
from util.run.run_log import RunLog
from util.run.same_run import hyperparameters

# A larger share of waiting for data is said in a line, once so many seconds of an epoch have
# passed since its first log line: in its first steps the workers start.
MAX_DATA_WAIT = 0.1
SECONDS_TO_JUDGE = 60.0


class Reporter:
    """Means, pace, progress and bad files of the epoch that runs.

    Args:
        args: completed arguments.
        device: where the model is.
        loader: the training data.
        parts: names of the parts of the loss that steps tell.

    Attributes:
        meters: of loss, gradient norm and the parts of the loss; checkpoints hold them.
        watches: of parts of the steps, by what they are called in the logs.
        log: TensorBoard and log.txt, once `open_log` was called.
    """

    log: RunLog

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        loader: Loader,
        parts: Sequence[str] = (),
    ) -> None:
        self.args, self.device, self.loader = args, device, loader
        self.meters = Meters(("loss", "grad_norm", *parts), device)
        self.watches: dict[str, Stopwatch] = {}
        self.feed = DeviceFeed(device, given_stats(args))
        self.bad_images = BadImages(lambda text: print_once(text, error=True))
        self._new_bad: set = set()
        self._told_of_waiting = False

    def open_log(self, epoch: int, step: int) -> None:
        """Begin the logs, or go on with them where `step` steps of an epoch are done."""
        part = step / self.loader.steps_per_epoch
        self.log = RunLog(self.args.output_dir, self.args.log_dir, epoch, part)
        self.log.hyperparameters(hyperparameters(self.args))

    def begin_epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Begin to count; return the epoch's micro-batches on the device.

        Args:
            epoch: number of the epoch, from 0.
            start: steps already done in it.
        """
        self.epoch, self.start, self.done = epoch, start, start
        steps = self.loader.steps_per_epoch
        title = f"Epoch {epoch + 1}/{self.args.epochs}"
        self.progress = Progress(title, steps, start, (self.args.epochs - epoch - 1) * steps)
        batches = self.feed(self._note_bad_files(epoch, start))
        self.pace = Pace(self.feed, start, self.args.effective_batch_size, self.watches)
        return batches

    def count(self, result: StepResult) -> None:
        """Count a step; nothing here waits for the device."""
        self.done += 1
        told = {"loss": result.loss, "grad_norm": result.grad_norm, **result.parts}
        self.meters.update(result.taken, **told)
        self.progress.advance()

    @property
    def due(self) -> bool:
        """True if this step has a log line: every `--print_freq`, and the epoch's last."""
        return self.done % self.args.print_freq == 0 or self.done == self.loader.steps_per_epoch

    def show(self, lr: float, step: OptimStep) -> None:
        """Write the log line (a collective); the one place that waits for the device.

        Raises:
            TrainingError: too many files are bad.
        """
        steps = self.loader.steps_per_epoch
        train = {"lr": lr, **self.meters.read()}
        if skipped := step.skipped.item():
            train["skipped_steps"] = skipped
        if bad := self._count_bad_files():
            train["bad_images"] = bad
        perf = {"memory_mb": peak_memory_mb(self.device), **self.pace.read(self.done)}
        for group, values in {"train": train, "perf": perf}.items():
            self.log.scalars(self.epoch + self.done / steps, group, values)
        self.progress.show(self.done, train | perf)
        self._judge_waiting()

    def finish(self) -> dict[str, float]:
        """End the epoch's progress.

        Returns:
            Its means with MAE's keys, the share of waiting for data, seconds a step of the
            watches, and its seconds, of a resumed epoch those since then.
        """
        means, seconds = self.meters.read_epoch(), self.progress.seconds()
        self.progress.finish({**means, "time": clock(seconds)})
        means = {f"train_{name}": value for name, value in means.items()}
        times = {"data_wait": self.pace.data_wait, **self.pace.seconds_a_step()}
        times = {name: round(value, 4) for name, value in times.items()}
        return {**means, **times, "epoch_seconds": round(seconds, 2)}

    def _note_bad_files(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """The loader's micro-batches without their last entry, the files that failed."""
        for *batch, bad in self.loader.epoch(epoch, start):
            self._new_bad.update(bad)
            yield batch

    def _count_bad_files(self) -> int:
        """Name the new bad files of all processes, and count all of the run."""
        dataset = self.loader.dataset
        for bad in gather_objects(sorted(self._new_bad)):
            self.bad_images.add(bad, dataset)
        self._new_bad.clear()
        total = self.bad_images.count
        self.bad_images.check(total, len(dataset), self.args.max_bad_images, dataset.what)
        return total

    def _judge_waiting(self) -> None:
        """Say once if the model waits for its data."""
        share, seconds = self.pace.settled_wait()
        if self._told_of_waiting or seconds < SECONDS_TO_JUDGE or share <= MAX_DATA_WAIT:
            return
        self._told_of_waiting = True
        cores, workers = cores_per_process(), self.args.num_workers
        raised = f"raise --num_workers (now {workers} a process, there are {cores} cores for each)"
        print_once(
            f"the model waits for data {share:.0%} of the time: "
            f"{raised + ', or ' if workers < cores else ''}"
            f'see PRETRAIN.md, "When the model waits for data"'
        )
