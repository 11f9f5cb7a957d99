from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from util.run.lars import LARS

GOLDEN = Path(__file__).parents[1] / "golden" / "lars_and_pos_embed.safetensors"


def test_three_steps_are_the_originals():
    with safe_open(GOLDEN, "pt") as golden:
        params = {n: torch.nn.Parameter(golden.get_tensor(f"{n}.0")) for n in ("weight", "bias")}
        optimizer = LARS(params.values(), lr=0.3, weight_decay=0.01)
        for step in range(3):
            for name, p in params.items():
                p.grad = golden.get_tensor(f"{name}.grad.{step}")
            optimizer.step()
            for name, p in params.items():
                expected = golden.get_tensor(f"{name}.{step + 1}")
                torch.testing.assert_close(p.data, expected, rtol=0, atol=1e-6)


def test_a_step_that_must_not_be_taken_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=0.3)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    before, momentum = p.detach().clone(), optimizer.state[p]["mu"].clone()
    p.grad = torch.full((2, 2), torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["mu"], momentum)
    optimizer.found_inf = torch.tensor(0.0)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_a_norm_of_zero_leaves_the_rate_alone(zero):
    p = torch.nn.Parameter(torch.zeros(2, 2) if zero == "parameter" else torch.ones(2, 2))
    p.grad = torch.ones(2, 2) if zero == "parameter" else torch.zeros(2, 2)
    expected = p.detach() - 0.5 * p.grad
    LARS([p], lr=0.5).step()
    torch.testing.assert_close(p.data, expected)
