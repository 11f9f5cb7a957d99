"""An image model's weights for a video model: kernels get an extent in time."""

import math
from dataclasses import replace

from torch import Tensor, nn

from util.errors import UsageError
from util.layers.pos_embed import resize_pos_embed
from util.weights.read import Weights

# What only a masked autoencoder has.
_PRETRAINING_ONLY = ("decoder_", "mask_token", "stage1_output_decode", "stage2_output_decode")


def inflate_weights(weights: Weights, model: nn.Module, how: str) -> Weights:
    """An image encoder's weights for a video model of the same widths and depths.

    A kernel `[C_out, C_in, H, W]` becomes `[C_out, C_in, T, H, W]`. Under "center" a video that
    stands still gives what its picture gave; "average" differs from that where a kernel reaches
    beyond the first or last frame. A position table that the model learns is repeated over time;
    one that is fixed is the model's own already, and left out. The decoder and the fusion of
    stages, which belong to another target, are left out, too.

    Args:
        weights: of an image model, with or without a head.
        model: the video model to fill with `load_weights`.
        how: "center": the kernel acts on the middle frame (of an even number the later one) and
            is zero elsewhere; "average": an equal part of it acts on each.

    Raises:
        UsageError: weights of a video model, or of none.
    """
    image = weights.architecture
    if image.ndim != 2:
        raise UsageError(f"checkpoint {weights.path} is no image model's: it needs no inflation")
    own, prefix = dict(model.named_parameters()), weights.encoder
    video = image.with_time(model.geometry.img_size[0], model.geometry.stride(3)[0])
    state = {}
    for name, tensor in weights.state.items():
        target = own.get(name.removeprefix(prefix))
        if name.removeprefix(prefix).startswith(_PRETRAINING_ONLY):
            continue
        if tensor.ndim == 4:
            length = target.shape[2] if target is not None and target.ndim == 5 else 1
            tensor = _inflate_kernel(tensor, length, how)
        elif name == f"{prefix}pos_embed":
            if not target.requires_grad:
                continue
            prefix_rows = tensor.shape[1] - math.prod(image.grid)
            tensor = resize_pos_embed(tensor, image.grid, video.grid, prefix_rows)
        state[name] = tensor
    return replace(weights, state=state, known=replace(video, temporal_kernel=model.kernel[0]))


def _inflate_kernel(kernel: Tensor, length: int, how: str) -> Tensor:
    """`[C_out, C_in, H, W]` to `[C_out, C_in, length, H, W]`, see `inflate_weights`."""
    kernel = kernel.unsqueeze(2)
    if how == "average":
        return kernel.expand(-1, -1, length, -1, -1) / length
    inflated = kernel.new_zeros(*kernel.shape[:2], length, *kernel.shape[3:])
    inflated[:, :, length // 2] = kernel[:, :, 0]
    return inflated
