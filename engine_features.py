"""Frozen models: their outputs for every file once, over any number of processes."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models_convvit import ConvViT
from util.data.datasets import BadFile, FileDataset
from util.data.loader import BadImages, Loader
from util.errors import UsageError
from util.run.distributed import is_main_process, print_once

# From a model and a batch to its outputs, a row for each sample.
Predict = Callable[[nn.Module, Tensor], Tensor]


class Outputs(NamedTuple):
    """A model's outputs for a batch, without the files that cannot be decoded.

    Attributes:
        rows: `[n, …]`, float32, on the CPU.
        labels: `[n]`; `NO_LABEL` where they are not known.
        indices: `[n]`, places in the data set.
        bad: the batch's files that cannot be decoded.
    """

    rows: Tensor
    labels: Tensor
    indices: Tensor
    bad: Sequence[BadFile]


@torch.inference_mode()
def each_output(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    dtype: torch.dtype | None = None,
    predict: Predict = nn.Module.__call__,
    stopping: Callable[[], bool] = lambda: False,
    title: str = "evaluate",
) -> Iterator[Outputs]:
    """Run a model on this process's share of a data set, a progress bar on a terminal.

    Args:
        model: the bare model, in evaluation mode afterwards.
        loader: of items `(sample, label, index, bad)`, in the order of an `EvalSampler`.
        device: where the model is.
        dtype: autocast type; None for full precision.
        predict: from the model and a batch to rows.
        stopping: whether this process was asked to stop, looked at before each batch.
        title: of the progress bar.
    """
    model.eval()
    hidden = not (is_main_process() and sys.stderr.isatty())
    batches = tqdm(loader.epoch(0), title, len(loader.sampler), disable=hidden, leave=False)
    with batches:
        for samples, labels, indices, failed in batches:
            if stopping():
                return
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                rows = predict(model, samples.to(device, non_blocking=True))
            # A bad file's place holds another one, so its row is taken out again.
            bad = dict(failed)
            keep = torch.tensor([i not in bad for i in indices.tolist()])
            yield Outputs(rows.float().cpu()[keep], labels[keep], indices[keep], failed)


def check_bad_files(
    bad: Mapping[int, str], dataset: FileDataset, max_bad: float, some_left: bool
) -> None:
    """Name the files that cannot be decoded, and refuse too many of them.

    Args:
        bad: of all processes, index to reason.
        dataset: what they are of.
        max_bad: share of the files that may be bad.
        some_left: whether any other file was there.

    Raises:
        TrainingError: more are.
        UsageError: none is left.
    """
    bad_images = BadImages(lambda text: print_once(text, error=True))
    bad_images.add(sorted(bad.items()), dataset)
    bad_images.check(bad_images.count, len(dataset), max_bad, dataset.what)
    if not some_left:
        raise UsageError(f"none of the {dataset.what} of {dataset.root} can be decoded")


def encode(model: ConvViT, x: Tensor, stage: int = 3, tokens: bool = False) -> Tensor:
    """Features of a stage.

    Args:
        model: the encoder, with a head or without.
        x: `[N, in_chans, *size]`.
        stage: 1, 2 or 3.
        tokens: all of them, not their mean.

    Returns:
        `[N, C]`: of stage 3 what the head sees (after `fc_norm`; an encoder that never had a head
        has it without weights, as in a linear probe), of stages 1 and 2 the mean over the tokens.
        Or all tokens, `[N, *grid, C]`, of stage 3 those that are pooled.
    """
    if stage == 3 and not tokens:
        return model.forward_head(model.forward_features(x), pre_logits=True)
    (grid,) = model.forward_intermediates(
        x, [stage - 1], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    return grid if tokens else grid.flatten(1, -2).mean(1)


def encode_views(model: ConvViT, views: Tensor, stage: int = 3, tokens: bool = False) -> Tensor:
    """`encode` of several views of each sample, `[N, V, …]`: the mean over them."""
    features = encode(model, views.flatten(0, 1), stage, tokens)
    return features.unflatten(0, views.shape[:2]).mean(1)


@torch.inference_mode()
def attention_map(model: ConvViT, x: Tensor) -> Tensor:
    """Attention that the last block pays to each token of stage 3, the mean over its heads.

    Args:
        model: the encoder.
        x: `[N, in_chans, *size]`.

    Returns:
        `[N, *grid]`, float32: the class token's attention, or without one the mean over all
        tokens', which is what their mean is made of.
    """
    attention, seen = model.blocks3[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model.forward_stages(x)
    finally:
        hook.remove()
    received = []
    for tokens in seen[0].split(1):  # [1, prefix + L, C]; the weights of a clip are large
        q, k, _ = attention.split_heads(tokens)  # [1, heads, prefix + L, C / heads]
        weights = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
        prefix = model.num_prefix_tokens
        queries = weights[:, :, :1] if prefix else weights
        received.append(queries[..., prefix:].mean((1, 2)))
    grid = [s // p for s, p in zip(x.shape[2:], model.geometry.stride(3), strict=True)]
    return torch.cat(received).unflatten(1, grid)
