"""AdamW, and the two recipes' learning rates over time."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

from DET.optim import parameter_groups

optimizer = L(torch.optim.AdamW)(
    params=L(parameter_groups)(
        base_lr="${..lr}",
        layer_decay=1.0,
        weight_decay_norm=0.0,
        # ViTDet's relative tables, `rel_pos_h` and `rel_pos_w`, do decay.
        overrides={
            name: dict(weight_decay=0.0) for name in ("pos_embed", "relative_position_bias_table")
        },
    ),
    lr=8e-5,
    betas=(0.9, 0.999),
    weight_decay=0.1,
    fused=True,  # its step can be skipped on the device, when a gradient is not finite
)

# The length of the warm-up, as a share of the run, follows from train.warmup_epochs.
cosine = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=None,
    warmup_factor=0.001,
)

steps = L(WarmupParamScheduler)(
    # A tenth after 88.9 % of the run, a hundredth after 96.3 %.
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163_889, 177_546], num_updates=184_375
    ),
    warmup_length=None,
    warmup_factor=0.001,
)
