"""Detectron2's training loop with this project's step, and the hooks of a run."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import Tensor, nn
from torch.utils.data import Sampler

from DET.checkpoint import Checkpointer
from util.errors import TrainingError
from util.run.distributed import StopSignal, print_once, rank, world_size
from util.run.logger import Meters
from util.run.optim_step import MAX_SKIPPED_IN_A_ROW, OptimStep

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
    """Save and leave with exit code 0 when SIGTERM or SIGUSR1 comes."""

    def __init__(self, checkpointer: Checkpointer, device: torch.device, period: int) -> None:
        self.checkpointer, self.device, self.period = checkpointer, device, period
        self.stop = StopSignal()

    def after_step(self) -> None:
        """Look whether a signal came: on several GPUs only with the log lines, as it waits."""
        done = self.trainer.iter + 1
        cheap = world_size() == 1 or self.device.type == "cpu"
        if done == self.trainer.max_iter or not (cheap or done % self.period == 0):
            return
        if self.stop.agreed(self.device):
            self.checkpointer.save("model_stopped", iteration=self.trainer.iter)
            print_once(
                f"stopped by a signal after {done} of {self.trainer.max_iter} iterations: saved in "
                f"{self.checkpointer.save_dir}; the same command with --resume goes on from there"
            )
            raise SystemExit(0)  # no Exception: Detectron2 would log it as a crash
