import math
import os
import subprocess
import sys

import pytest
import torch

from util.layers import depthwise_triton
from util.layers.depthwise import VisibleGrid, _conv_of_visible

CASES = [((2, 6, 8), (5, 5), 24), ((2, 7, 5), (3, 3), 130), ((1, 3, 6, 4), (3, 5, 5), 8)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def case(canvas, kernel, channels, **kwargs):
    """Tokens on a third of a canvas, a kernel, a bias, the places and a gradient."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(math.prod(canvas), generator=generator)[: math.prod(canvas) // 3]
    shapes = ((len(index), channels), (channels, 1, *kernel), (channels,), (len(index), channels))
    x, weight, bias, grad = (torch.randn(s, generator=generator).to(**kwargs) for s in shapes)
    return [t.requires_grad_() for t in (x, weight, bias)], index.to(x.device), grad


@pytest.mark.skipif(depthwise_triton.triton is None, reason="needs Triton")
def test_kernels_equal_the_convolution_of_a_canvas():
    """Triton's interpreter runs them without a GPU; it is chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", __name__], env=environment, check=True)


@needs_cuda
@pytest.mark.parametrize(("canvas", "kernel", "channels"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_kernels_on_a_gpu_equal_the_convolution_of_a_canvas(
    canvas, kernel, channels, dtype, tolerance
):
    inputs, index, grad = case(canvas, kernel, channels, device="cuda", dtype=dtype)
    grid = VisibleGrid(index, canvas, token_map=depthwise_triton.token_map(index, canvas))
    x, *parameters = inputs
    out = grid.depthwise(x.view(1, *x.shape[:1], 1, -1), *parameters).view_as(x)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = _conv_of_visible(*exact, index, canvas)
    close = dict(rtol=tolerance, atol=tolerance * math.sqrt(len(index)), check_dtype=False)
    torch.testing.assert_close(out, expected, **close)
    grads = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, exact, grad.double()), **close)


def main():
    """Compare each kernel, run by Triton's interpreter, with the convolution of a canvas."""
    depthwise_triton.wrap_triton = lambda kernel: kernel
    for canvas, kernel, channels in CASES:
        (x, weight, bias), index, grad = case(canvas, kernel, channels)
        expected = _conv_of_visible(x, weight, bias, index, canvas)
        expected_x, expected_weight = torch.autograd.grad(expected, (x, weight), grad)
        where = (
            index,
            depthwise_triton.token_map(index, canvas),
            *(depthwise_triton._three(size) for size in (kernel, canvas[1:])),
        )
        with torch.no_grad():
            taps = weight.flatten(1).t().contiguous()
            out = depthwise_triton._convolve(x, taps, *where) + bias
            grad_x = depthwise_triton._convolve(grad, taps.flip(0), *where)
            grad_weight = depthwise_triton._weight_gradient(grad, x, *where)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad_x, expected_x)
        torch.testing.assert_close(
            grad_weight.t(), expected_weight.flatten(1), rtol=1e-5, atol=1e-5
        )


if __name__ == "__main__":
    main()
