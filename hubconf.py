"""torch.hub entry points: `torch.hub.load(FOLDER, "convvit_base_patch16", source="local")`.

Each entry takes `checkpoint=FILE` and the model's own arguments; `torch.hub.list` names them all.
"""

from collections.abc import Callable

from torch import nn

import models_convmae
import models_convvit
from util.errors import UsageError
from util.layers.architecture import SIZES, size_name
from util.weights.read import read_weights

dependencies = ["torch", "timm", "safetensors"]


def _entry(
    factory: Callable[..., nn.Module], from_checkpoint: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def entry(checkpoint: str | None = None, **kwargs) -> nn.Module:
        if checkpoint is None:
            return factory(**kwargs)
        size = size_name(read_weights(checkpoint).architecture)
        if size in SIZES and f"_{size}_" not in factory.__name__:
            raise UsageError(f"{checkpoint} holds a {size} model, not a {factory.__name__}")
        return from_checkpoint(checkpoint, **kwargs)

    entry.__name__ = factory.__name__
    entry.__doc__ = (
        f"{factory.__doc__}\n\n    `checkpoint`: a file of any kind to build from and fill with, "
        f"see `{from_checkpoint.__name__}`."
    )
    return entry


for _name, _factory in models_convvit.MODELS.items():
    globals()[_name] = _entry(_factory, models_convvit.convvit_from_checkpoint)
for _name, _factory in models_convmae.MODELS.items():
    globals()[_name] = _entry(_factory, models_convmae.convmae_from_checkpoint)
