"""Modules and masks that many tests look at."""

import math

import torch

from util.layers.depthwise import VisibleGrid

# The least of an image and of a video model that has every kind of module.
SIZES = dict(embed_dim=(8, 8, 12), depth=(1, 1, 1), num_heads=2, mlp_ratio=(2, 2, 2))
DECODER = dict(decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
INPUTS = {
    "image": dict(img_size=32),
    "video": dict(img_size=(4, 32, 32), patch_size=((2, 4, 4), (1, 2, 2), (1, 2, 2))),
}


def randomize(module):
    """Give every parameter a value of its own: unit scales and zero biases hide mistakes."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def visible_positions(number, kept, grid):
    """For each of `number` images the sorted grid positions of `kept` visible tokens."""
    length = math.prod(grid)
    return torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(number)])


def visible_grid(positions, grid):
    first = torch.arange(len(positions)).unsqueeze(1) * math.prod(grid)
    return VisibleGrid((positions + first).flatten(), (len(positions), *grid))
