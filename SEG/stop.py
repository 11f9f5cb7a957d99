"""A training run that is asked to stop: it saves, in the midst of a validation too, and leaves."""

from pathlib import Path

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.registry import HOOKS

from util.run.distributed import StopSignal, world_size
from util.run.program import Stopped, stop_early_on_signals


@HOOKS.register_module()
class StopHook(Hook):
    """Saves and leaves when SIGTERM or SIGUSR1 comes to a run that counts iterations.

    What is trained is saved before each validation, and that is left at the next batch. A run
    that goes on from where a validation is due begins with it.

    Args:
        period: optimizer steps between two looks on several GPUs, as looking waits for them.
    """

    priority = "LOWEST"  # after the schedules are stepped and the regular checkpoint is written

    def __init__(self, period: int = 50) -> None:
        self.period = period
        self.stop: StopSignal | None = None
        self.saved = -1

    def before_train(self, runner: Runner) -> None:
        """From here on there is something to save."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self.stop = StopSignal()
            self.device = next(runner.model.parameters()).device
            self.saved = runner.iter

    def before_train_epoch(self, runner: Runner) -> None:
        """Validate where the run was stopped in a validation."""
        loop, done = runner.train_loop, runner.iter
        if self.stop is None or runner.val_loop is None or done < max(loop.val_begin, 1):
            return
        if done % loop.val_interval == 0 or done == loop.max_iters:
            runner.val_loop.run()

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: object, **__: object) -> None:
        """Called by the runner after each micro-batch; looks after those that end a step."""
        accumulated = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        steps, rest = divmod(runner.iter + 1, accumulated)
        if self.stop is None or rest:
            return
        cheap = world_size() == 1 or self.device.type == "cpu"
        if (cheap or steps % self.period == 0) and self.stop.agreed(self.device):
            self._save(runner, runner.iter + 1)
            raise Stopped(_message(runner, f"after iteration {runner.iter + 1}"))

    def before_val(self, runner: Runner) -> None:
        """Called by the runner before a validation."""
        if self.stop:
            self._save(runner, runner.iter)

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: object, **__: object) -> None:
        """Called by the runner after each batch; each process asks the others once."""
        if self.stop is None:
            return
        asks = self.stop.received or batch_idx + 1 == len(runner.val_dataloader)
        if asks and self.stop.agreed(self.device):
            raise Stopped(_message(runner, f"in the validation after iteration {runner.iter}"))

    def after_train(self, runner: Runner) -> None:
        """All is saved: what follows may be ended at once."""
        if self.stop:
            stop_early_on_signals()

    def _save(self, runner: Runner, done: int) -> None:
        """Write the regular checkpoint of `done` iterations, unless it is there."""
        hook = next((h for h in runner.hooks if isinstance(h, CheckpointHook)), None)
        if hook is None or done == self.saved:
            return
        self.saved = done
        if Path(hook.last_ckpt or "").name != hook.filename_tmpl.format(done):
            meta = {"epoch": runner.epoch, "iter": done}
            hook._save_checkpoint_with_step(runner, done, meta=meta)


def _message(runner: Runner, place: str) -> str:
    return (
        f"stopped by a signal {place} of {runner.max_iters}: saved in {runner.work_dir}; the same "
        f"command with --resume goes on from there"
    )
