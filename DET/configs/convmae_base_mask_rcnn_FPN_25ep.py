"""The published repository's recipe: base, 25 epochs (the paper: 53.2 box AP, 47.1 mask AP)."""

from .common.data import data, dataloader
from .common.mask_rcnn_fpn import model
from .common.optim import cosine as lr_multiplier
from .common.optim import optimizer
from .common.train import train
