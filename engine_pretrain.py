"""One epoch of masked-autoencoder pretraining."""

import torch
from torch import Tensor

from util.distributed import rank, world_size
from util.run import Run


def train_one_epoch(run: Run, epoch: int, start_step: int, mask_ratio: float) -> dict[str, float]:
    """Pretrain for one epoch (paper section 3.2).

    Args:
        run: the run of a `MaskedAutoencoderConvViT`.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        mask_ratio: share of the blocks to remove.

    Returns:
        The epoch's means.
    """
    run.model.train()
    num_patches = run.model.geometry.num_patches

    def forward(imgs: Tensor) -> Tensor:
        # Every process draws the noise of the whole batch and takes its rows, so that any number
        # of processes mask alike.
        n = len(imgs)
        noise = torch.rand(n * world_size(), num_patches, device=imgs.device)
        noise = noise[n * rank() : n * (rank() + 1)]
        loss, _, _ = run.step.model(imgs, mask_ratio, noise, predict=False)
        return loss

    return run.train_epoch(epoch, start_step, forward)
