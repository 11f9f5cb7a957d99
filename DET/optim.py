"""The optimizer's parameter groups."""

from detectron2.solver.build import get_default_optimizer_params
from timm.models._manipulate import group_with_matcher
from torch import nn

from models_convvit import ConvViT


def parameter_groups(model: nn.Module, layer_decay: float, **options: object) -> list[dict]:
    """Detectron2's parameter groups, the learning rate falling from layer to layer to the input.

    Args:
        model: a detector on a ConvViT.
        layer_decay: learning rate of a layer over that of the next, 1 for all alike. Layer 0 is
            the embeddings and stages 1 and 2, block i of stage 3 is layer i + 1, then the rest.
        **options: of `get_default_optimizer_params`; `base_lr` must be one of them.
    """
    prefix, encoder = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, ConvViT)
    )
    layers = group_with_matcher(encoder.named_parameters(), encoder.group_matcher(), reverse=True)
    last = len(encoder.blocks3) + 1
    return get_default_optimizer_params(
        model,
        lr_factor_func=lambda name: (
            layer_decay ** (last - layers.get(name.removeprefix(f"{prefix}."), last))
        ),
        **options,
    )
