"""Linear maps with what comes before them, which keep less for the backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GeluLinear(torch.autograd.Function):
    """`linear(gelu(x))` that keeps `x` alone for the backward pass and computes GELU again.

    GELU's output is the widest activation of a block; without it a step takes about a fifth less
    memory, for one more elementwise operation.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        rows, (_, weight_too, bias_too) = grad.flatten(0, -2), ctx.needs_input_grad
        grad_weight = rows.T @ F.gelu(x).flatten(0, -2) if weight_too else None
        return grad_x, grad_weight, rows.sum(0) if bias_too else None


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU and a linear map: `x` `[…, C_in]`, `weight` `[C_out, C_in]`, to `[…, C_out]`."""
    # The casts of autocast happen out here, where their gradient is recorded.
    bias = bias if bias is None else bias.to(x.dtype)
    return _GeluLinear.apply(x, weight.to(x.dtype), bias)


class _NormLinear(torch.autograd.Function):
    """`linear(layer_norm(x))` that keeps `x` alone for the backward pass and norms it again.

    `x` is kept anyway, for the norm's gradient; without the norm's output a step takes about a
    seventh less memory.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, eps, weight, bias):
        y, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd, weight)
        ctx.eps = eps
        return F.linear(y.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, rstd, weight = ctx.saved_tensors
        rows, (weight_too, bias_too) = grad.flatten(0, -2), ctx.needs_input_grad[4:]
        grad_weight = None
        if weight_too:
            y = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0].to(grad.dtype)
            grad_weight = rows.T @ y.flatten(0, -2)
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight).to(x.dtype), x, scale.shape, mean, rstd, scale, shift,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        grad_bias = rows.sum(0) if bias_too else None
        return grad_x, grad_scale, grad_shift, None, grad_weight, grad_bias


def norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A norm and a linear map: `x` `[…, C_in]`, `weight` `[C_out, C_in]`, to `[…, C_out]`."""
    scaled = is_bare(norm, nn.LayerNorm) and norm.weight is not None
    if not scaled or x.dtype != norm.weight.dtype or x.is_meta:
        return F.linear(norm(x), weight, bias)
    # The casts of autocast happen out here, where their gradient is recorded.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = bias if bias is None else bias.to(dtype)
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight.to(dtype), bias)


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is what its class alone says: no adapter, no hook.

    Only then its parameters may be used without calling it.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    hooks += (module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def apply_normed(layer: nn.Module, x: Tensor, norm: nn.Module | None) -> Tensor:
    """`layer(norm(x))`, with `norm_linear` where the layer is a plain linear map."""
    if norm is not None and is_bare(layer, nn.Linear):
        return norm_linear(x, norm, layer.weight, layer.bias)
    return layer(x if norm is None else norm(x))
