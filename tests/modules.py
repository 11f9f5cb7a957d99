"""Modules and masks that many tests look at."""

import math

import torch

from util.layers.depthwise import VisibleGrid


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
