"""An optimizer step: autocast, accumulation, clipping, and steps that are not finite."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from util.errors import TrainingError, UsageError
from util.run.distributed import all_reduce_max

MAX_SKIPPED_IN_A_ROW = 10


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp` on a device; None for full precision.

    Args:
        amp: auto (bf16 where the GPU has it, else fp16 on CUDA, none elsewhere), bf16, fp16, none.
        device: where the model runs.

    Raises:
        UsageError: fp16 without a GPU.
    """
    if amp == "auto":
        amp = "none"
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs a CUDA GPU, not {device.type}; use bf16 or none")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


class StepResult(NamedTuple):
    """Result of a step, as scalars on the device: reading one waits for the device.

    Attributes:
        loss: mean over the step's micro-batches, of this process.
        grad_norm: L2 norm of the whole gradient, before clipping.
        taken: 1.0, or 0.0 if the step was skipped because loss or gradient were not finite.
        parts: of the loss, by name; means as the loss is.
    """

    loss: Tensor
    grad_norm: Tensor
    taken: Tensor
    parts: Mapping[str, Tensor]


class OptimStep:
    """The optimizer step, one after the other:

        step.begin(batches, count)
        for batch in step.micro_batches:
            with step.autocast():
                loss = model(batch)
            step.backward(loss)
        step.update()

    A step whose loss or gradient is not finite on any process changes nothing on all of them:
    the flag stays on the device and the optimizer obeys it there, so nothing waits for it.
    After ten such steps in a row every further one is skipped too, and `check` raises.

    Args:
        model: the trained model, in DDP and compiled if it is.
        optimizer: one that honours a `found_inf` tensor, as torch's fused optimizers do.
        device: where the model runs.
        dtype: autocast type, see `amp_dtype`; float16 brings a gradient scaler.
        clip_grad: largest norm of the gradient; None for no clipping.

    Attributes:
        micro_batches: of the step that has begun.
        result: of the last step; None while one is under way.

    Raises:
        ValueError: an optimizer that would ignore `found_inf`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        clip_grad: float | None = None,
    ) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(f"{type(optimizer).__name__} must be fused: it has to obey found_inf")
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.dtype = dtype
        self.clip_grad = clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.micro_batches: Iterator = iter(())
        self.result: StepResult | None = None

    def begin(self, batches: Iterable, count: int) -> None:
        """Begin a step: forget the last one's gradients and set `micro_batches`.

        Args:
            batches: yields the micro-batches.
            count: how many there are, `--accum_iter`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.count = count
        self.loss = torch.zeros((), device=self.device)
        self.parts: dict[str, Tensor] = {}
        self.result = None
        self.micro_batches = self._synchronize_last(batches)

    def _synchronize_last(self, batches: Iterable) -> Iterator:
        """The micro-batches; DDP sums gradients over processes with the last of them alone."""
        ddp = getattr(self.model, "_orig_mod", self.model)  # below torch.compile
        for number, batch in enumerate(batches, start=1):
            if isinstance(ddp, DistributedDataParallel):
                ddp.require_backward_grad_sync = number == self.count
            yield batch

    def autocast(self) -> torch.autocast:
        """The context of the forward pass: mixed precision, if there is any."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor, parts: Mapping[str, Tensor] | None = None) -> None:
        """Add a micro-batch's gradient to that of the step.

        Args:
            loss: mean over the micro-batch, a scalar with a gradient.
            parts: of it, by name, scalars without a gradient; told beside it.
        """
        loss = loss / self.count
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()
        for name, part in (parts or {}).items():
            self.parts[name] = self.parts.get(name, 0) + part / self.count

    def update(self) -> StepResult:
        """End the step: agree on whether it is finite, clip, change the weights."""
        self.result = self._update(self.loss)
        return self.result

    def _update(self, loss: Tensor) -> StepResult:
        self.scaler.unscale_(self.optimizer)
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in params])
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        skip |= self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
        skip = all_reduce_max(skip.float())

        if self.clip_grad is not None:
            clip_grads_with_norm_(params, self.clip_grad, norm)
        self.optimizer.found_inf = skip
        self.optimizer.step()
        self.scaler.update()
        self.skipped += skip
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        return StepResult(loss, norm, 1 - skip, self.parts)

    def check(self) -> None:
        """Raise once ten steps in a row were skipped (waits for the device).

        Raises:
            TrainingError: with what to try.
        """
        if self.skipped_in_a_row.item() >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"loss or gradient were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the "
                f"last checkpoint is intact. Go on from it with --clip_grad 1.0 or --amp bf16 or "
                f"none; or start anew with a lower --blr or a longer --warmup_epochs; or look at "
                f"the images"
            )

    def state_dict(self) -> dict:
        """The scaler's state and the number of skipped steps."""
        return {
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.item(),
            "skipped_in_a_row": self.skipped_in_a_row.item(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state["skipped"])
        self.skipped_in_a_row.fill_(state["skipped_in_a_row"])
