"""Layer-wise decay of the learning rate, as an optimizer-wrapper constructor of mmengine."""

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """A layer's learning rate is `layer_decay` times that of the next one.

    Layer 0 is the embeddings and stages 1 and 2, layer i + 1 is `blocks3.i`, the rest of the
    backbone and the heads are the last one, which learns at the full rate. Parameters with one
    dimension and position tables have no weight decay.

    Use as `optim_wrapper=dict(constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.75), …)`, for a model whose `backbone` is a `ConvMAE`.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """Append the parameter groups of a segmentor to `params`."""
        backbone = module.backbone
        groups = param_groups_layer_decay(
            backbone,
            self.base_wd,
            no_weight_decay_list=backbone.no_weight_decay(),
            layer_decay=self.paramwise_cfg["layer_decay"],
        )
        heads = nn.ModuleList(child for child in module.children() if child is not backbone)
        groups += param_groups_weight_decay(heads, self.base_wd)
        for group in groups:
            group["lr"] = self.base_lr * group.setdefault("lr_scale", 1.0)
        params += groups
