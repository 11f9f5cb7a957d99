"""The bytes that a compiled step keeps, counted."""

import torch
from torch import nn

from benchmarks.memory_budget import kept_bytes, partition, table


def test_what_is_kept_is_counted_without_the_parameters():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 1, bias=False))
    x = torch.randn(4, 8)
    torch.compiler.reset()
    loss = torch.compile(model, backend=partition, fullgraph=True)(x)
    assert kept_bytes(loss, model) == 4 * (4 * 8 + 4 * 16)  # the input and what is between


def test_times_stand_beside_those_of_the_first_form():
    printed = table({"all": 2**20, "half": 2**19}, {"all": [1.0, 2.0], "half": [1.5, 3.0]})
    (half,) = (line for line in printed.splitlines() if line.startswith("| half"))
    assert [cell.strip() for cell in half.split("|")[2:-1]] == [
        "0.5",
        "2.25 (1.5–3)",
        "1.5 (1.5–1.5)",
    ]
