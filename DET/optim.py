"""The optimizer's parameter groups."""

from collections.abc import Mapping

from detectron2.solver.build import get_default_optimizer_params
from timm.models._manipulate import group_with_matcher
from torch import nn

from models_convvit import ConvViT


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    layer_decay: float = 1.0,
    weight_decay_norm: float | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict]:
    """Detectron2's parameter groups, the learning rate falling from layer to layer to the input.

    Layer 0 is the patch embeddings and stages 1 and 2, block i of stage 3 is layer i + 1, then
    comes the rest. The position embedding counts to the rest, as in the original's recipe.

    Args:
        model: a detector on a ConvViT.
        base_lr: learning rate of the last layer.
        layer_decay: learning rate of a layer over that of the next, 1 for all alike.
        weight_decay_norm: of the norms; None for the optimizer's.
        overrides: settings of the parameters of a name, such as `{"pos_embed": {"lr": 0.1}}`.
    """
    prefix, encoder = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, ConvViT)
    )
    layers = group_with_matcher(encoder.named_parameters(), encoder.group_matcher(), reverse=True)
    last = layers["pos_embed"] = len(encoder.blocks3) + 1
    return get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay_norm=weight_decay_norm,
        overrides=overrides,
        lr_factor_func=lambda name: (
            layer_decay ** (last - layers.get(name.removeprefix(f"{prefix}."), last))
        ),
    )
