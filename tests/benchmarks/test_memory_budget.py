"""The bytes that a compiled step keeps, counted."""

import torch
from torch import nn

from benchmarks.memory_budget import kept_bytes, partition


def test_what_is_kept_is_counted_without_the_parameters():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 1, bias=False))
    x = torch.randn(4, 8)
    torch.compiler.reset()
    loss = torch.compile(model, backend=partition, fullgraph=True)(x)
    assert kept_bytes(loss, model) == 4 * (4 * 8 + 4 * 16)  # the input and what is between
