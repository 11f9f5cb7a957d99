"""The ViTDet-style recipe: base, 25 epochs (the paper: 53.9 box AP, 47.6 mask AP)."""

from .common.data_vitdet import data, dataloader
from .common.mask_rcnn_vitdet import model
from .common.optim import optimizer
from .common.optim import steps as lr_multiplier
from .common.train import train

dataloader.train.total_batch_size = train.base_batch_size = 16
train.warmup_epochs = 250 * 16 / 118_000  # 250 iterations on COCO
optimizer.lr = 1e-4
optimizer.params.layer_decay = 0.8
