import math

import pytest
import torch
import torch.nn.functional as F

from tests.modules import visible_grid, visible_positions

CONV_FUNCTIONS = {2: F.conv2d, 3: F.conv3d}
DEPTHWISE = [((5, 6), (5, 5)), ((4, 7), (3, 5)), ((3, 4, 4), (3, 3, 5))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def depthwise_case(grid, kernel, channels=2):
    positions = visible_positions(2, math.prod(grid) // 3, grid)
    x = torch.randn(2, positions.shape[1], 1, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    return positions, x, weight, bias


@pytest.mark.parametrize(("grid", "kernel"), DEPTHWISE)
def test_visible_depthwise_equals_the_convolution_of_a_zero_canvas(grid, kernel):
    positions, x, weight, bias = depthwise_case(grid, kernel)
    out = visible_grid(positions, grid).depthwise(x, weight, bias)

    canvas = torch.zeros(2, 2, math.prod(grid), dtype=torch.float64)
    for image, visible in enumerate(positions):
        for token, position in enumerate(visible):
            canvas[image, :, position] = x[image, token, 0]
    padding = [k // 2 for k in kernel]
    convolve = CONV_FUNCTIONS[len(grid)]
    dense = convolve(canvas.view(2, 2, *grid), weight, bias, padding=padding, groups=2).flatten(2)
    expected = torch.stack([dense[i, :, visible].T for i, visible in enumerate(positions)])
    torch.testing.assert_close(out, expected.unsqueeze(2))

    target = torch.randn_like(out)
    grads = torch.autograd.grad((out * target).sum(), (x, weight, bias))
    dense_grads = torch.autograd.grad((expected.unsqueeze(2) * target).sum(), (x, weight, bias))
    torch.testing.assert_close(grads, dense_grads)


@pytest.mark.parametrize(("grid", "kernel"), DEPTHWISE)
def test_visible_depthwise_gradient_equals_finite_differences(grid, kernel):
    positions, *inputs = depthwise_case(grid, kernel)
    visible = visible_grid(positions, grid)

    def depthwise(x, weight, bias):
        return visible.depthwise(x, weight, bias)

    assert torch.autograd.gradcheck(depthwise, inputs)
