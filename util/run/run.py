"""A training run: its state, its steps, its checkpoints."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from util.data.loader import Loader
from util.errors import UsageError
from util.run.distributed import StopSignal, gather_objects, print_once, world_size, wrap_model
from util.run.lr_sched import adjust_learning_rate
from util.run.optim_step import OptimStep, amp_dtype
from util.run.program import Stopped
from util.run.record import write_record
from util.run.reporter import Reporter
from util.run.resume import BEST, LAST, Checkpoints, Stateful
from util.run.same_run import changed_data, plain


@dataclass
class Run:
    """A training run.

    Attributes:
        args: completed arguments.
        device: where the model is.
        model: the bare model.
        ddp_model: the same as it is trained: in DDP if there are several processes, compiled.
        optim: takes the optimizer's steps.
        loader: the training data.
        report: what the run tells.
        checkpoints: of the run.
        position: epoch and steps done in it at which the run begins.
        changed: flags that give a run that goes on other data than it had, for people.
    """

    args: argparse.Namespace
    device: torch.device
    model: nn.Module
    ddp_model: nn.Module
    optim: OptimStep
    loader: Loader
    report: Reporter
    checkpoints: Checkpoints
    position: tuple[int, int]
    changed: str = ""

    def __post_init__(self) -> None:
        self.stop = StopSignal()

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
        losses: Sequence[str] = (),
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
            losses: names of the parts of the loss that the steps tell, see `OptimStep.backward`.

        Raises:
            UsageError: the processes do not see the same files, or the checkpoint's step is none
                of the epoch's.
        """
        ddp_model = wrap_model(model, device, args.compile)
        dtype = amp_dtype(args.amp, device)
        optim = OptimStep(ddp_model, optimizer, device, dtype, args.clip_grad)
        report = Reporter(args, device, loader, losses)
        own = {"model": model, "optimizer": optimizer, "scaler": optim, "meters": report.meters}
        parts = {**own, **(parts or {})}
        extra = {"program": program, "num_images": len(loader.dataset), **(extra or {})}
        checkpoints = Checkpoints(args.output_dir, plain(args), parts, extra)
        position = checkpoints.restore(content) if content else (0, 0)
        if position[1] > loader.steps_per_epoch:
            raise UsageError(
                f"the checkpoint to resume from is at step {position[1]} of an epoch, which has "
                f"{loader.steps_per_epoch}: give another one"
            )
        views = gather_objects((*position, len(loader.dataset)))
        if len(set(views)) > 1:
            raise UsageError(
                f"the processes see different things (epoch, step, images: {views}): "
                f"--output_dir and --data_path must be the same folders on every node"
            )
        report.open_log(*position)
        if not (args.output_dir / LAST).exists():  # one that goes on keeps that of its beginning
            write_record(args.output_dir, args.given)
        changed = changed_data(args, content["args"]) if content else ""
        state = (report, checkpoints, position, changed)
        return cls(args, device, model, ddp_model, optim, loader, *state)

    def describe(self, title: str) -> None:
        """Print what is about to run, `title` first."""
        args, (epoch, step) = self.args, self.position
        if epoch >= args.epochs:
            changed = self.changed and (
                f", and no other data are used ({self.changed}): give another --output_dir for a "
                f"new run"
            )
            print_once(
                f"nothing to train: {args.output_dir} holds all {args.epochs} epochs{changed}"
            )
            return
        if self.changed:
            print_once(f"note: the run goes on with other data ({self.changed})")
        precision = str(self.optim.dtype or torch.float32).removeprefix("torch.")
        begin = f"from epoch {epoch + 1}, step {step}" if epoch or step else "from the beginning"
        print_once(
            f"{title}\n"
            f"{len(self.loader.dataset)} {self.loader.dataset.what} of "
            f"{self.loader.dataset.root}, "
            f"{self.loader.steps_per_epoch} steps an epoch, each of {args.batch_size} x "
            f"{args.accum_iter} x {world_size()} = {args.effective_batch_size} (batch_size x "
            f"accum_iter x processes)\n"
            f"{args.epochs} epochs {begin}, peak lr {args.lr:.3g} after a warm-up of "
            f"{args.warmup_epochs:g}, {precision} on {self.device}"
            f"{', compiled' if args.compile else ''}, output in {args.output_dir}"
        )

    def epochs(self) -> Iterator[tuple[int, int]]:
        """The epochs to run, each with the steps already done in it.

        All steps done means that the epoch's evaluation is next.
        """
        first, step = self.position
        for epoch in range(first, self.args.epochs):
            yield epoch, step
            step = 0

    def steps(self, epoch: int, start: int) -> Iterator[OptimStep]:
        """The steps of one epoch, each to be taken by the caller as `OptimStep` says.

        Between two of them the run tells of itself, saves, and stops if a signal came.

        Args:
            epoch: number of the epoch, from 0.
            start: steps already done in it, after a resume.

        Raises:
            Stopped: a signal came; the state is saved.
            TrainingError: the run cannot go on.
        """
        steps, report = self.loader.steps_per_epoch, self.report
        batches = report.begin_epoch(epoch, start)
        for done in range(start + 1, steps + 1):
            lr = self._set_learning_rate(epoch + (done - 1) / steps)
            self.optim.begin(islice(batches, self.args.accum_iter), self.args.accum_iter)
            yield self.optim
            report.count(self.optim.result)
            if report.due:
                report.show(lr, self.optim)
                self.optim.check()
            if done < steps:
                self._save_within(epoch, done)

    def means(self, epoch: int) -> dict[str, float]:
        """The epoch's means, with MAE's keys ("train_loss", "train_lr"); its progress ends."""
        steps = self.loader.steps_per_epoch
        return {"train_lr": self._set_learning_rate(epoch + 1 - 1 / steps), **self.report.finish()}

    def save_trained(self, epoch: int) -> None:
        """Save an epoch that is trained and not yet evaluated.

        Raises:
            Stopped: a signal came.
        """
        steps = self.loader.steps_per_epoch
        self._save(epoch, steps, LAST)
        if self.stop.agreed(self.device):
            raise Stopped(self.stopped_at(f"the evaluation of epoch {epoch + 1}"))

    def end_epoch(self, epoch: int, values: dict[str, float], *, best: bool = False) -> None:
        """Write the epoch's line and checkpoints.

        Args:
            epoch: the one that is done.
            values: for log.txt.
            best: whether it gave the best model so far.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        self.report.log.epoch({**values, "epoch": epoch})
        self.report.meters.start_epoch()
        last = epoch + 1 == self.args.epochs
        names = [BEST] if best else []
        # That of the last epoch would be checkpoint.pth once more.
        numbered = not last and (epoch + 1) % self.args.save_freq == 0
        if numbered:
            names.append(f"checkpoint-{epoch}.pth")
        # checkpoint.pth comes last: after a kill before that, the others are written again.
        self._save(epoch + 1, 0, *names, LAST)
        if numbered and (keep := self.args.keep):
            # The one that is now too many; files of other runs and settings stay.
            self.checkpoints.remove(f"checkpoint-{epoch - keep * self.args.save_freq}.pth")
        if not last and self.stop.agreed(self.device):
            raise Stopped(self.stopped_at(f"the end of epoch {epoch + 1}"))

    def stopped_at(self, place: str) -> str:
        """Message for the user when a signal ended the run."""
        command = "--resume auto" if self.args.resume == "none" else "the same command"
        return (
            f"stopped by a signal at {place}: saved in {self.checkpoints.folder / LAST}; "
            f"{command} goes on from there"
        )

    def _set_learning_rate(self, epoch: float) -> float:
        args = self.args
        return adjust_learning_rate(
            self.optim.optimizer,
            epoch,
            lr=args.lr,
            min_lr=args.min_lr,
            warmup_epochs=args.warmup_epochs,
            epochs=args.epochs,
        )

    def _save_within(self, epoch: int, done: int) -> None:
        """Save in the middle of an epoch if it is time or a signal came, and then stop."""
        # On several GPUs asking waits for all of them, so they ask where they wait anyway.
        asks = self.report.due or world_size() == 1 or self.device.type == "cpu"
        stop = asks and self.stop.agreed(self.device)
        if stop or (self.args.save_steps and done % self.args.save_steps == 0):
            self._save(epoch, done, LAST)
        if stop:
            self.report.progress.close()
            steps = self.loader.steps_per_epoch
            raise Stopped(self.stopped_at(f"epoch {epoch + 1}, step {done} of {steps}"))

    def _save(self, epoch: int, step: int, *names: str) -> None:
        self.optim.check()  # a run that is about to fail keeps its older checkpoint
        self.checkpoints.save(epoch, step, *names)
