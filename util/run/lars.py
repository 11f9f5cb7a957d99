"""LARS: momentum SGD with a rate for each layer (arXiv 1708.03888), as MoCo v3 and MAE probe."""

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Scale each update by the norm of its parameter over that of its gradient.

    Parameters of one dimension (biases) get neither weight decay nor the scaling.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        weight_decay: added to the gradient.
        momentum: of the updates.
        trust_coefficient: norm of an update relative to its parameter's, at a rate of 1.
    """

    # `OptimStep` sets `found_inf`: 1 for a step that must not be taken.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """One step, unless `found_inf` is set."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, found_inf)

    def _update(self, p: Tensor, group: dict, found_inf: Tensor | None) -> None:
        update = p.grad
        if p.ndim > 1:
            update = update.add(p, alpha=group["weight_decay"])
            norm, update_norm = p.norm(), update.norm()
            ratio = group["trust_coefficient"] * norm / update_norm
            update = update * torch.where((norm > 0) & (update_norm > 0), ratio, 1.0)
        momentum = self.state[p].setdefault("mu", torch.zeros_like(p))
        update = group["momentum"] * momentum + update
        if found_inf is not None:
            # On the device, so that nothing waits for it: an update of the old momentum by zero.
            update = torch.where(found_inf > 0, momentum, update)
            momentum.copy_(update)
            p.sub_(torch.where(found_inf > 0, 0.0, group["lr"] * update))
        else:
            momentum.copy_(update)
            p.sub_(group["lr"] * update)
