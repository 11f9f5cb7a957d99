import pytest
import torch
import torch.nn.functional as F

from tests.modules import randomize
from util.layers.fused import gelu_linear, norm_linear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gelu_linear_case(dtype=torch.float64):
    shapes = ((2, 3, 4), (5, 4), (5,))  # x, weight, bias
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_gelu_linear_and_its_gradient_equal_the_two_functions():
    inputs = gelu_linear_case()
    out, expected = gelu_linear(*inputs), F.linear(F.gelu(inputs[0]), *inputs[1:])
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads, expected_grads = (
        torch.autograd.grad((value * weight).sum(), inputs) for value in (out, expected)
    )
    torch.testing.assert_close(grads, expected_grads)


def test_gelu_linear_of_half_precision_gives_its_parameters_their_own():
    x, weight, bias = gelu_linear_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gelu_linear(x.bfloat16(), weight, bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, weight, bias)} == {torch.float32}


def norm_linear_case(norm, dtype=torch.float64):
    """x, and a norm and a linear map with random numbers."""
    norm, linear = (randomize(module).to(dtype) for module in (norm, torch.nn.Linear(4, 5)))
    return torch.randn(2, 3, 4, dtype=dtype, requires_grad=True), norm, linear


NORMS = [
    lambda: torch.nn.LayerNorm(4, eps=1e-3),
    lambda: torch.nn.LayerNorm(4, bias=False),
    lambda: torch.nn.LayerNorm(4, elementwise_affine=False),
    lambda: torch.nn.RMSNorm(4),
]


@pytest.mark.parametrize("norm", NORMS, ids=["plain", "no bias", "no scale", "another norm"])
def test_norm_linear_and_its_gradient_equal_the_two_modules(norm):
    x, norm, linear = norm_linear_case(norm())
    out, expected = norm_linear(x, norm, linear.weight, linear.bias), linear(norm(x))
    assert torch.equal(out, expected)
    inputs, weight = [x, *norm.parameters(), *linear.parameters()], torch.randn_like(out)
    grads, expected_grads = (
        torch.autograd.grad((value * weight).sum(), inputs) for value in (out, expected)
    )
    torch.testing.assert_close(grads, expected_grads)


def test_norm_linear_under_autocast_is_the_two_modules():
    x, norm, linear = norm_linear_case(torch.nn.LayerNorm(4), torch.float32)
    inputs, results = [x, *norm.parameters(), *linear.parameters()], []
    for fused in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm_linear(x, norm, linear.weight, linear.bias) if fused else linear(norm(x))
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert {t.dtype for t in results[0][1:]} == {torch.float32}
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("frozen", range(5))
def test_norm_linear_leaves_out_the_gradient_that_nobody_wants(frozen):
    x, norm, linear = norm_linear_case(torch.nn.LayerNorm(4))
    inputs = [x, norm.weight, norm.bias, linear.weight, linear.bias]
    inputs.pop(frozen).requires_grad_(False)
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    grads, expected = (
        torch.autograd.grad((out * weight).sum(), inputs)
        for out in (norm_linear(x, norm, linear.weight, linear.bias), linear(norm(x)))
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("frozen", range(3))
def test_gelu_linear_leaves_out_the_gradient_that_nobody_wants(frozen):
    inputs = x, weight, bias = gelu_linear_case()
    wanted = [tensor for i, tensor in enumerate(inputs) if i != frozen]
    inputs[frozen].requires_grad_(False)
    grads, expected = (
        torch.autograd.grad(out.square().sum(), wanted)
        for out in (gelu_linear(x, weight, bias), F.linear(F.gelu(x), weight, bias))
    )
    torch.testing.assert_close(grads, expected)
