"""Detectron2's training loop with this project's step, and the hooks of a run."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from torch import Tensor, nn
from torch.utils.data import Sampler

from DET.checkpoint import Checkpointer
from util.errors import TrainingError
from util.run.distributed import StopSignal, rank, world_size
from util.run.logger import Meters
from util.run.optim_step import MAX_SKIPPED_IN_A_ROW, OptimStep
from util.run.program import Stopped

DIVERGED = (
    "the last checkpoint is intact. Go on from it with train.clip_grad=1 or train.amp=bf16; or "
    "start anew with a lower optimizer.lr or a longer train.warmup_epochs"
)


class Trainer(SimpleTrainer):
    """Takes steps over micro-batches, in mixed precision; skips those that are not finite.

    Args:
        model: the detector, in DDP if there are several processes.
        loader: yields micro-batches without end; may be set later, as `data_loader`.
        step: takes the optimizer's steps.
        accum_iter: micro-batches of a step.
        log_period: iterations between two reports of the losses, their means.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[list[dict]] | None,
        step: OptimStep,
        accum_iter: int,
        log_period: int,
    ) -> None:
        super().__init__(model, loader, step.optimizer)
        self.step, self.accum_iter, self.log_period = step, accum_iter, log_period
        self.meters: Meters | None = None
        self._losses: dict[str, Tensor] = {}
        self._data_time = 0.0

    def run_step(self) -> None:
        """One optimizer step."""
        self._losses, self._data_time = {}, 0.0
        self.step.begin(self._micro_batches(), self.accum_iter)
        for batch in self.step.micro_batches:
            with self.step.autocast():
                loss = self._forward(batch)
            self.step.backward(loss)
        result = self.step.update()
        values = {**self._losses, "total_loss": result.loss, "grad_norm": result.grad_norm}
        if self.meters is None:  # the heads say at the first step which losses there are
            self.meters = Meters(tuple(values), self.step.device)
        self.meters.update(result.taken, **values)
        self.storage.put_scalar("data_time", self._data_time)
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self._report()

    def _micro_batches(self) -> Iterator[list[dict]]:
        for _ in range(self.accum_iter):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            self._data_time += time.perf_counter() - start
            yield batch

    def _forward(self, batch: list[dict]) -> Tensor:
        try:
            losses = self.model(batch)
        except FloatingPointError as error:  # Detectron2's: proposals that are not finite
            raise TrainingError(f"predictions are not finite; {DIVERGED}") from error
        for name, loss in losses.items():
            share = loss.detach() / self.accum_iter
            self._losses[name] = self._losses.get(name, 0) + share
        return sum(losses.values())

    def _report(self) -> None:
        """The means since the last report; the one place that waits for the device."""
        skipped = self.step.skipped.item()
        if skipped:
            self.storage.put_scalar("skipped_steps", skipped, smoothing_hint=False)
        self.storage.put_scalars(smoothing_hint=False, **self.meters.read())
        if self.step.skipped_in_a_row.item() >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"loss or gradient were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; "
                f"{DIVERGED}"
            )

    def state_dict(self) -> dict:
        """State of the run in a checkpoint, beside the model."""
        return {**super().state_dict(), "step": self.step.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self.step.load_state_dict(state["step"])


class ShuffledStream(Sampler[int]):
    """Images without end, epoch after epoch in new order, this process's share of them.

    Args:
        size: number of images.
        seed: of the order, the same in all processes.
        start: images, over all processes, that are done already.
    """

    def __init__(self, size: int, seed: int, start: int = 0) -> None:
        self.size, self.seed, self.start = size, seed, start

    def __iter__(self) -> Iterator[int]:
        return islice(self._all(), rank(), None, world_size())

    def _all(self) -> Iterator[int]:
        epoch, done = divmod(self.start, self.size)
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            yield from torch.randperm(self.size, generator=generator)[done:].tolist()
            epoch, done = epoch + 1, 0


class SaveOnSignal(HookBase):
    """Save and leave when SIGTERM or SIGUSR1 comes."""

    def __init__(
        self, checkpointer: Checkpointer, stop: StopSignal, device: torch.device, period: int
    ) -> None:
        self.checkpointer, self.stop, self.device, self.period = checkpointer, stop, device, period

    def after_step(self) -> None:
        """Look whether a signal came: on several GPUs only with the log lines, as it waits."""
        done = self.trainer.iter + 1
        cheap = world_size() == 1 or self.device.type == "cpu"
        if done == self.trainer.max_iter or not (cheap or done % self.period == 0):
            return
        if self.stop.agreed(self.device):
            self.checkpointer.save("model_stopped", iteration=self.trainer.iter)
            raise Stopped(stopped_at(self, f"after {done}", self.checkpointer))


class PeriodicEvaluation(EvalHook):
    """Evaluates now and then and at the end; what was trained is saved before.

    A run that goes on from where an evaluation is due begins with that.

    Args:
        period: iterations between two evaluations.
        evaluate: takes what the loader of the images is put in, and returns the results.
        checkpointer: of the run.
        stop: looked at before each batch.
        device: where the model is.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[Callable[[Iterable], Iterable]], dict],
        checkpointer: Checkpointer,
        stop: StopSignal,
        device: torch.device,
    ) -> None:
        super().__init__(period, lambda: evaluate(lambda loader: UntilStopped(loader, self)))
        self.checkpointer, self.stop, self.device = checkpointer, stop, device
        self._done = 0

    def before_train(self) -> None:
        """Evaluate where the run was stopped in an evaluation."""
        self._done = self.trainer.start_iter
        if self._done and self._done % self._period == 0:
            self._do_eval()

    def after_step(self) -> None:
        """Save, if no other hook has just done it, and evaluate, if it is time."""
        self._done = self.trainer.iter + 1
        if self._done % self._period == 0 and self._done != self.trainer.max_iter:
            if self.checkpointer.iteration != self.trainer.iter:
                self.checkpointer.save("model_before_evaluation", iteration=self.trainer.iter)
            self._do_eval()

    def leave_if_stopped(self) -> None:
        """Leave if any process was asked to stop; all processes call this once an evaluation."""
        if self.stop.agreed(self.device):
            place = f"in the evaluation after {self._done}"
            raise Stopped(stopped_at(self, place, self.checkpointer))


class UntilStopped:
    """The batches of a loader, until this process is asked to stop.

    Args:
        loader: of an evaluation.
        hook: that evaluates.
    """

    def __init__(self, loader: Iterable, hook: PeriodicEvaluation) -> None:
        self.loader, self.hook = loader, hook

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            if self.hook.stop.received:
                break
            yield batch
        self.hook.leave_if_stopped()


def stopped_at(hook: HookBase, place: str, checkpointer: Checkpointer) -> str:
    """Message for the user when a signal ended the run."""
    return (
        f"stopped by a signal {place} of {hook.trainer.max_iter} iterations: saved in "
        f"{checkpointer.save_dir}; the same command with --resume goes on from there"
    )
