"""A GPU that is not there: CUDA tensors without values, for what runs on a GPU alone.

torch works out shape, type and device of each result and computes nothing, so no card is needed.
A tensor that is made on the wrong device is an error, and so is what a GPU would be waited for.
"""

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.data.transforms import _scale_and_shift, normalize
from util.run.feed import DeviceFeed
from util.run.optim_step import OptimStep
from util.run.reporter import Reporter
from util.run.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = ("aten::_to_copy", "aten::copy_")


class Waited(Exception):
    """The host would have waited for the GPU."""


class NeverWait(TorchDispatchMode):
    """Refuse copies between host and GPU that wait, and host tensors among those of the GPU.

    torch itself refuses to tell values of tensors that have none (`item`, `tolist`, `nonzero`).
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten":  # a question, such as on which device a tensor is
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A single number of the host is an argument of the kernel.
        devices = {t.device.type for t in tensors if t.ndim or func.name() in COPIES}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            raise Waited(f"{func} of tensors on {' and '.join(sorted(devices))}")
        return out


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors have no values, of CUDA or not, and autocast is that of a GPU with bfloat16."""
    supported = mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    available = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    capability = mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0))
    with supported, available, capability, FakeTensorMode():
        try:
            yield
        finally:
            _scale_and_shift.cache_clear()  # whose tensors have no values either


def devices_of_maps(backbone: nn.Module, size: tuple[int, int], trained: tuple[int, int]) -> set:
    """The devices of the maps of a backbone in training, of two images `[3, *size]` on the GPU.

    The tables of another size than the trained one are made on the host, and only training on that
    one does not wait for them.
    """
    with fake_gpu():
        to_fake_gpu(backbone.train())
        waits = contextlib.nullcontext() if size != trained else NeverWait()
        with torch.autocast("cuda", torch.bfloat16), waits:
            maps = backbone(torch.empty(2, 3, *size, device=GPU))
    return {features.device for features in tree_leaves(maps)}


def to_fake_gpu(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers there, in place; they lose their values."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=GPU)
                    parameter = isinstance(old, nn.Parameter)
                    tensors[name] = nn.Parameter(new, old.requires_grad) if parameter else new
    return module


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """Autograd's backward pass node by node, as its engine wants a card."""
    edges, found = Counter(), [loss.grad_fn]
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                edges[node] += 1
                if edges[node] == 1:
                    found.append(node)
    grads, ready = {loss.grad_fn: [torch.ones_like(loss)]}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        got = grads.pop(node)
        if hasattr(node, "variable"):
            old, (new,) = node.variable.grad, got
            node.variable.grad = new if old is None else old + new
            continue
        call = node.apply if isinstance(node, BackwardCFunction) else node
        given = call(*got)
        given = given if isinstance(given, tuple) else (given,)
        # A function written in Python also gives a None for what is no tensor, behind the others.
        for (to, number), grad in zip(node.next_functions, given, strict=False):
            if to is None:
                continue
            wanted = to._input_metadata
            parts = grads.setdefault(to, [None] * len(wanted))
            if grad is not None:
                assert grad.device == wanted[number].device, (node, grad.device)
                grad = grad.sum_to_size(wanted[number].shape).to(wanted[number].dtype)
                parts[number] = grad if parts[number] is None else parts[number] + grad
            edges[to] -= 1
            if edges[to] == 0:
                ready.append(to)


class FakeRun(Run):
    """A run of one step, without log lines and files.

    Args:
        model: on the fake GPU.
        optimizer: of its parameters.
        batch: what the loader gives each time, on the host.
        dtype: autocast type.
        losses: names of the parts of the loss.
        **args: of the run.
    """

    def __init__(self, model, optimizer, batch, dtype=torch.bfloat16, losses=(), **args):
        args = argparse.Namespace(
            lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=1, print_freq=1, save_steps=0,
            accum_iter=1, effective_batch_size=4, **args,
        )  # fmt: skip
        loader = SimpleNamespace(steps_per_epoch=1, epoch=lambda *_: iter([(*batch, [])]))
        optim = OptimStep(model, optimizer, GPU, dtype, clip_grad=1.0)
        feed = DeviceFeed(CPU)
        feed.device = GPU
        with mock.patch("util.run.reporter.DeviceFeed", lambda device, stats: feed):
            report = Reporter(args, GPU, loader, losses)
        with mock.patch("signal.signal"):
            super().__init__(args, GPU, model, model, optim, loader, report, None, (0, 0))

    def means(self, epoch):
        return {}

    @contextlib.contextmanager
    def never_waiting(self) -> Iterator[None]:
        """The steps within must not wait for the GPU."""
        for shape in ((1, 3, 1, 1), (1, 3, 1, 1, 1)):  # its numbers are copied at the first batch
            normalize(torch.empty(shape, dtype=torch.uint8, device=GPU), 1)
        with (
            mock.patch.object(Tensor, "backward", backward),
            mock.patch.object(Reporter, "due", False),
            NeverWait(),
        ):
            yield
