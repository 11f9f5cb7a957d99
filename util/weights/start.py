"""The start of a pretraining from weights: an encoder, with its decoder or a new one."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from util.layers.decoder import Decoder
from util.layers.geometry import show_size
from util.weights.inflate import inflate_weights
from util.weights.load import Report, load_weights
from util.weights.read import Weights

# What begins anew where it is missing; a class token is one row among the tokens.
_NEW = ("norm", "decoder_*", "mask_token", "stage*_output_decode", "cls_token", "mimic")
# Fixed sine-cosine tables: they follow from the grid, and are the model's own.
_TABLES = {"pos_embed", "decoder_pos_embed"}


def start_from(model: nn.Module, weights: Weights, inflate: str | None = None) -> Report:
    """Fill a masked autoencoder with what weights of any kind have of it.

    The encoder must be there whole and fit. The decoder is taken whole, or begins anew if it has
    another size; its last layer does if the channels are others. Position tables are not resized,
    as they are computed for any grid.

    Args:
        model: freshly made; what is not there keeps its values.
        weights: of a pretraining, an encoder, a classifier or a probe, of the same or another
            size of input; for a video model also those of an image model.
        inflate: how an image model's kernels become a video model's, see `inflate_weights`.

    Raises:
        UsageError: an encoder that does not fit, with the reason.
    """
    there, taken = weights.state, weights
    tables = {name: model.get_parameter(name).clone() for name in _TABLES}
    if weights.architecture.ndim < model.geometry.ndim:
        taken = inflate_weights(weights, model, inflate)
    if not _has_decoder_of(taken, model):
        taken = taken.without("decoder_*", "mask_token")
    elif taken.state["decoder_pred.weight"].shape != model.decoder_pred.weight.shape:
        taken = taken.without("decoder_pred.*")  # of other channels
    mimic = taken.state.get("mimic.bias")
    own = getattr(model, "mimic", None)
    if mimic is not None and (own is None or len(mimic) != own.out_features):
        taken = taken.without("mimic.*")  # of another teacher, or none here
    report = load_weights(model, taken, new=(*_NEW, "pos_embed"))
    model.load_state_dict(tables, strict=False)
    kept = _TABLES & {"pos_embed", *taken.state}
    sizes = [show_size(grid) for grid in (weights.architecture.grid, model.geometry.grid(3))]
    change = f" ({sizes[0]} to {sizes[1]})" if sizes[0] != sizes[1] else ""
    loaded = taken.state.keys() - report.unexpected - _TABLES
    return replace(
        report,
        loaded=len(loaded),
        resized=[text for text in report.resized if text.split()[0] not in _TABLES],
        recomputed=[n + change for n in sorted(kept) if not _same(there[n], tables[n])],
        missing=[name for name in report.missing if name not in kept],
        unexpected=sorted(there.keys() - loaded - kept),
    )


def _has_decoder_of(weights: Weights, model: nn.Module) -> bool:
    """True for weights with a decoder of the model's size, heads counted where they are known."""
    if weights.kind != "autoencoder":
        return False
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    heads = {"decoder_num_heads": model.decoder_num_heads}
    own, there = Decoder.from_shapes(shapes, heads), weights.decoder
    if "decoder_num_heads" in weights.guessed:
        there = replace(there, **heads)
    return replace(there, multi_scale=own.multi_scale) == own


def _same(there: Tensor, own: Tensor) -> bool:
    """True for tables of the same values, but for rounding and a class token's row."""
    there = there[:, -own.shape[1] :].to(own)
    return there.shape == own.shape and torch.allclose(there, own, atol=1e-4)
