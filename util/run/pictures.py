"""Pictures of a run: reconstructions of a masked autoencoder, and the loss curve."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from util.data.datasets import open_images
from util.data.folders import find_train_folder
from util.data.images import MAX_PIXELS
from util.data.transforms import denormalize, eval_transform
from util.errors import UsageError
from util.run.run_log import read_log

GRAY = 0.5  # what a removed patch looks like


@torch.no_grad()
def reconstruct(
    model: nn.Module, imgs: Tensor, mask_ratio: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mask images and fill them in again.

    The model's mode and the random state stay as they are.

    Args:
        model: a `MaskedAutoencoderConvViT`.
        imgs: `[N, C, *img_size]`, pictures or clips, normalised.
        mask_ratio: share of patches to remove.
        seed: of the masks.

    Returns:
        masked: as `imgs`, in [0, 1], removed patches gray.
        filled: as `imgs`, in [0, 1], removed patches predicted, visible ones as they were.
    """
    noise = torch.rand(
        len(imgs), model.geometry.num_mask_units, generator=torch.Generator().manual_seed(seed)
    )
    training = model.training
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise.to(imgs.device))
    pred, mask = pred[: len(imgs)], mask[: len(imgs)]  # of several masks the first
    model.train(training)

    patches = model.patchify(imgs)
    if model.norm_pix_loss:  # undo the normalisation of the target
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        pred = pred * (var + 1e-6) ** 0.5 + mean
    removed = model.unpatchify(mask.unsqueeze(-1).expand_as(patches)).bool()
    originals = denormalize(imgs, 1)
    masked = originals.masked_fill(removed, GRAY)
    filled = torch.where(removed, denormalize(model.unpatchify(pred), 1), originals)
    return masked, filled


def reconstruction_grid(
    model: nn.Module, imgs: Tensor, mask_ratio: float, seed: int = 0, columns: int = 2
) -> Tensor:
    """Original, masked and filled side by side for each image.

    Args:
        model: a `MaskedAutoencoderConvViT` of images.
        imgs: `[N, C, H, W]`, normalised.
        mask_ratio: share of patches to remove.
        seed: of the masks.
        columns: triples next to each other.

    Returns:
        `[3, height, width]` in [0, 1], on the CPU.
    """
    masked, filled = reconstruct(model, imgs, mask_ratio, seed)
    triples = torch.stack([denormalize(imgs), masked, filled], dim=1)  # [N, 3, C, H, W]
    triples = triples.flatten(0, 1)[:, :3].cpu()  # without alpha
    # Small pictures are enlarged so that a person sees them.
    scale = max(1, 96 // triples.shape[-1])
    triples = triples.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    rows = [make_grid(triple, nrow=3, padding=4, pad_value=1) for triple in triples.split(3)]
    return make_grid(rows, nrow=columns, padding=8, pad_value=1)


def load_images(paths: Sequence[Path], img_size: tuple[int, int], in_chans: int) -> Tensor:
    """Files as a normalised batch `[N, C, H, W]`, resized and cropped from the centre.

    Raises:
        UsageError: a file that cannot be decoded.
    """
    transform = eval_transform(img_size, in_chans)
    images = []
    for path in paths:
        try:
            images.append(transform(path))
        except OSError as error:
            raise UsageError(str(error)) from error
    return torch.stack(images)


def load_samples(
    data_path: Path,
    img_size: tuple[int, int],
    in_chans: int,
    count: int = 16,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Images to watch a run by: spread over `val/`, else over the training images.

    Returns:
        `[N, C, H, W]`, at most `count`; files that cannot be decoded are left out.

    Raises:
        UsageError: not one can be decoded.
    """
    transform = eval_transform(img_size, in_chans, max_pixels)
    for source in (data_path / "val", find_train_folder(data_path)):
        images = []
        with contextlib.suppress(UsageError):  # no such folder, or no image in it
            files = open_images(source)
            count = min(count, len(files))
            for i in range(count):
                with contextlib.suppress(OSError), files.open(i * len(files) // count) as file:
                    images.append(transform(file))
        if images:
            return torch.stack(images)
    raise UsageError(f"none of the images tried below {data_path} can be decoded")


def save_loss_curve(log: Path, output: Path) -> None:
    """Draw the training loss and the learning rate of a log.txt over its epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, _ = read_log(log)
    epochs = [row["epoch"] + 1 for row in rows]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in rows], color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(epochs, [row["train_lr"] for row in rows], color="tab:gray", linestyle=":")
    right.set_ylabel("learning rate (dotted)")
    figure.savefig(output, dpi=120)
    plt.close(figure)
