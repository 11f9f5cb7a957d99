"""Pictures of a run: reconstructions of a masked autoencoder, and the loss curve."""

import contextlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid

from util.data.array_views import ArrayFormat, centre_transform, split_nodata
from util.data.datasets import open_images
from util.data.files import open_regular
from util.data.folders import find_train_folder
from util.data.images import MAX_PIXELS
from util.data.transforms import Stats, denormalize, eval_transform
from util.errors import UsageError
from util.run.run_log import read_log

GRAY = 0.5  # what a removed patch looks like
PERCENTILES = (2, 98)  # of channels of any range, shown as black and white
# From inputs and the dimension of their channels to pictures in [0, 1].
Show = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """Images filled in again where patches were removed, and how far off that is.

    The trivial fill is the mean of an image's visible pixels, channel by channel; where the model
    is given the mean of each patch (`norm_pix_loss`), it is that.

    Attributes:
        original: pictures `[N, C, *img_size]`, in [0, 1].
        masked: the same, removed patches gray.
        filled: removed patches predicted, visible ones as they were.
        error: root mean square of `filled - original` over the removed pixels.
        trivial: the same of the trivial fill.
        means_given: the trivial fill is each patch's mean.
    """

    original: Tensor
    masked: Tensor
    filled: Tensor
    error: float
    trivial: float
    means_given: bool

    @property
    def errors(self) -> str:
        """Both errors in words."""
        fill = "each patch's own mean" if self.means_given else "the mean of the visible ones"
        return (
            f"root mean square error of the removed pixels, of 0 to 1: {self.error:.3f}; of "
            f"filling in {fill}: {self.trivial:.3f}"
        )


class Drawing(NamedTuple):
    """A picture `[3, height, width]` in [0, 1], on the CPU, and the errors written below it."""

    picture: Tensor
    errors: str


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    imgs: Tensor,
    mask_ratio: float,
    seed: int = 0,
    show: Show = denormalize,
) -> Reconstruction:
    """Mask images and fill them in again.

    The model's mode and the random state stay as they are.

    Args:
        model: a `MaskedAutoencoderConvViT`.
        imgs: `[N, C, *img_size]`, pictures or clips, normalised; NaN where there are no data.
        mask_ratio: share of patches to remove.
        seed: of the masks.
        show: from inputs, and the dimension of their channels, to pictures.
    """
    original = show(imgs, 1)
    imgs, valid = split_nodata(imgs)
    noise = torch.rand(
        len(imgs), model.geometry.num_mask_units, generator=torch.Generator().manual_seed(seed)
    )
    training = model.training
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise.to(imgs.device))
    pred, mask = pred[: len(imgs)], mask[: len(imgs)]  # of several masks the first
    model.train(training)

    removed = model.unpatchify(mask.unsqueeze(-1).expand_as(pred)).bool()
    has_data = model.patchify(valid.float())
    trivial = model.unpatchify(model.undo_target(torch.zeros_like(pred), imgs, has_data))
    if not model.norm_pix_loss:
        pixels, visible = tuple(range(2, imgs.ndim)), valid & ~removed
        total = (imgs * visible).sum(pixels, keepdim=True)
        trivial = (total / visible.sum(pixels, keepdim=True).clamp(min=1)).expand_as(imgs)
    removed = removed[:, :1]
    judged = (removed & valid.any(1, keepdim=True)).expand_as(original)

    def filled_with(values: Tensor) -> tuple[Tensor, float]:
        filled = show(values.masked_fill(~valid, torch.nan), 1)
        differences = (filled - original)[judged]
        return torch.where(removed, filled, original), differences.square().mean().sqrt().item()

    filled, error = filled_with(model.unpatchify(model.undo_target(pred, imgs, has_data)))
    _, trivial_error = filled_with(trivial)
    masked = original.masked_fill(removed, GRAY)
    return Reconstruction(original, masked, filled, error, trivial_error, model.norm_pix_loss)


def enlarged(pictures: Tensor, side: int) -> Tensor:
    """Small pictures `[…, H, W]` a whole number of times as large, up to `side` pixels wide."""
    scale = max(1, side // pictures.shape[-1])
    return pictures.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)


def triples_grid(found: Reconstruction, columns: int = 2) -> Tensor:
    """Original, masked and filled side by side for each image.

    Args:
        found: of pictures.
        columns: triples next to each other.

    Returns:
        `[3, height, width]` in [0, 1], on the CPU.
    """
    triples = torch.stack([found.original, found.masked, found.filled], dim=1)  # [N, 3, C, H, W]
    triples = enlarged(triples.flatten(0, 1)[:, :3].cpu(), 96)  # without alpha
    rows = [make_grid(triple, nrow=3, padding=4, pad_value=1) for triple in triples.split(3)]
    return make_grid(rows, nrow=columns, padding=8, pad_value=1)


def captioned(picture: Tensor, text: str) -> Tensor:
    """A picture `[3, H, W]` in [0, 1] with black text on white below it, in lines as wide."""
    font = ImageFont.load_default(13)
    columns = int(picture.shape[2] / font.getlength(text) * len(text)) - 4
    lines = textwrap.wrap(text, max(1, columns))
    strip = Image.new("RGB", (picture.shape[2], 17 * len(lines) + 6), "white")
    ImageDraw.Draw(strip).multiline_text((8, 0), "\n".join(lines), "black", font, spacing=3)
    return torch.cat([picture, to_tensor(strip)], dim=1)


def draw_images(
    model: nn.Module,
    imgs: Tensor,
    mask_ratio: float,
    seed: int = 0,
    columns: int = 2,
    show: Show = denormalize,
) -> Drawing:
    """Reconstruct images and draw them, see `reconstruct` and `triples_grid`."""
    found = reconstruct(model, imgs, mask_ratio, seed, show)
    text = f"Original, masked, filled in; {found.errors}"
    return Drawing(captioned(triples_grid(found, columns), text), found.errors)


def stretched(imgs: Tensor, rgb: Sequence[int] | None = None) -> Show:
    """A way to look at channels of any range: from `PERCENTILES` of them, dark, to bright.

    Args:
        imgs: `[N, C, H, W]`, normalised, whose range counts; NaN where there are no data.
        rgb: channels to show as red, green and blue, counted from 1; by default the first three,
            and of one or two channels the first in false colours.

    Returns:
        From `[N, C, H, W]` to `[N, 3, H, W]` in [0, 1], black where there are no data.
    """
    chosen = [number - 1 for number in rgb or (range(1, 4) if imgs.shape[1] > 2 else [1])]
    bounds = []
    for values in imgs[:, chosen].transpose(0, 1).flatten(1).cpu().numpy():
        values = values[~np.isnan(values)]
        bounds.append(np.percentile(values, PERCENTILES) if len(values) else (0.0, 1.0))
    low, high = np.array(bounds).T[..., None, None]
    span = np.where(high > low, high - low, 1.0)

    def show(inputs: Tensor, dim: int = 1) -> Tensor:
        values = inputs.movedim(dim, 1)[:, chosen]
        low_, span_ = (values.new_tensor(v) for v in (low, span))
        values, valid = split_nodata(((values - low_) / span_).clamp(0, 1))
        return values if len(chosen) == 3 else _false_colours(values) * valid

    return show


def _false_colours(values: Tensor) -> Tensor:
    """Numbers in [0, 1], `[N, 1, H, W]`, as colours `[N, 3, H, W]`."""
    from matplotlib import colormaps

    table = torch.tensor(colormaps["viridis"].colors, dtype=values.dtype, device=values.device)
    steps = (values[:, 0] * (len(table) - 1)).round().long()
    return table[steps].movedim(-1, 1)


def load_images(
    paths: Sequence[Path],
    img_size: tuple[int, int],
    in_chans: int,
    form: ArrayFormat | None = None,
    stats: Stats | None = None,
) -> Tensor:
    """Files as a normalised batch `[N, C, H, W]`, resized and cropped from the centre.

    Of arrays NaN stands for no data.

    Args:
        paths: of the files.
        img_size: (H, W).
        in_chans: channels of the images.
        form: of files of arrays; 8-bit pictures by default.
        stats: to normalise pictures by; ImageNet's by default.

    Raises:
        UsageError: a file that cannot be decoded.
    """
    transform = _whole_view(img_size, in_chans, MAX_PIXELS, form, stats)
    images = []
    for path in paths:
        try:
            if form is None:
                images.append(transform(path))
                continue
            with open_regular(path) as file:
                images.append(transform(file))
        except OSError as error:
            raise UsageError(str(error)) from error
    return torch.stack(images)


def load_samples(
    data_path: Path,
    img_size: tuple[int, int],
    in_chans: int,
    count: int = 16,
    max_pixels: int = MAX_PIXELS,
    form: ArrayFormat | None = None,
    stats: Stats | None = None,
) -> Tensor:
    """Images to watch a run by: spread over `val/`, else over the training images.

    Args:
        data_path: of the run.
        img_size: (H, W).
        in_chans: channels of the images.
        count: the most images.
        max_pixels: a larger image is left out.
        form: of files of arrays; 8-bit pictures by default.
        stats: to normalise pictures by; ImageNet's by default.

    Returns:
        `[N, C, H, W]`, at most `count`, of arrays with NaN for no data; files that cannot be
        decoded are left out.

    Raises:
        UsageError: not one can be decoded, or not one holds data.
    """
    transform, first = _whole_view(img_size, in_chans, max_pixels, form, stats), ""
    for source in (data_path / "val", find_train_folder(data_path)):
        images = []
        with contextlib.suppress(UsageError):  # no such folder, or no image in it
            files = open_images(source, arrays=form is not None)
            count = min(count, len(files))
            for i in range(count):
                try:
                    with files.open(i * len(files) // count) as file:
                        images.append(transform(file))
                except OSError as error:
                    first = first or f", the first: {error}"
        if images:
            samples = torch.stack(images)
            if samples.isnan().all():
                raise UsageError(f"the {len(images)} files of {source} tried hold no data at all")
            return samples
    raise UsageError(f"none of the images tried below {data_path} can be decoded{first}")


def _whole_view(
    img_size: tuple[int, int],
    in_chans: int,
    max_pixels: int,
    form: ArrayFormat | None,
    stats: Stats | None,
) -> Callable[[BinaryIO], Tensor]:
    """As much of a picture as the proportions allow, normalised."""
    if form is None:
        return eval_transform(img_size, in_chans, max_pixels, stats)
    return centre_transform(form, tuple(img_size), keep_nodata=True)


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
