import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from models_convmae import MaskedAutoencoderConvViT
from tests.modules import DECODER, INPUTS, SIZES
from util.layers import recompute
from util.layers.recompute import apply_recomputed


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


FIRST = {"norm": nn.LayerNorm(4), "gelu": F.gelu}
every_first = pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)


def gradients(model, *args, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*args)[0]
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", INPUTS.values(), ids=INPUTS)
def test_gradients_are_those_of_kept_outputs_bit_for_bit(size, autocast, monkeypatch):
    model = MaskedAutoencoderConvViT(**SIZES, **DECODER, **size)
    imgs = torch.randn(2, 3, *model.geometry.img_size)
    args = imgs, 0.5, torch.rand(2, model.geometry.num_patches)
    recomputed = gradients(model, *args, autocast=autocast)
    monkeypatch.setattr(recompute, "_way_to_compute", lambda *_: None)
    kept = gradients(model, *args, autocast=autocast)
    assert all(map(torch.equal, recomputed, kept))


def output_storage(first, autocast=False):
    """The storage of what a linear map takes, while its backward pass is still to come."""
    linear, seen = nn.Linear(4, 5), []
    linear.register_forward_pre_hook(
        lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
    )
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = apply_recomputed(first, linear, x)
    return y, seen[0]


@every_first
def test_the_output_is_not_kept_for_the_backward_pass(first):
    y, storage = output_storage(first)
    assert y.requires_grad and storage.expired()


def test_what_autocast_makes_of_a_norms_output_is_not_kept_either():
    packed = []
    original = recompute._pack

    def pack(tensor):
        packed.append((tuple(tensor.shape), original(tensor)))
        return packed[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "_pack", pack)
        output_storage(nn.LayerNorm(4), autocast=True)
    inputs = [kept for shape, kept in packed if shape == (3, 4)]
    assert inputs and not any(isinstance(kept, torch.Tensor) for kept in inputs)


def doubled(x):
    """Double `x` in place."""
    x.mul_(2)


@every_first
def test_an_output_that_a_hook_changes_in_place_is_kept(first):
    linear = nn.Linear(4, 5)
    linear.register_forward_pre_hook(lambda _, args: doubled(args[0]))
    x = torch.randn(3, 4)
    x.requires_grad_()
    inputs = [x, *linear.parameters()]
    grads = torch.autograd.grad(apply_recomputed(first, linear, x).square().sum(), inputs)
    expected = torch.autograd.grad(linear(first(x)).square().sum(), inputs)
    assert all(map(torch.equal, grads, expected))


def test_a_norms_output_that_its_hook_changes_without_a_record_is_kept():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 5)

    def change(_, args, output):
        with torch.no_grad():
            output.mul_(2)

    norm.register_forward_hook(change)
    x = torch.randn(3, 4, requires_grad=True)
    grads = torch.autograd.grad(
        apply_recomputed(norm, linear, x).square().sum(), linear.parameters()
    )
    expected = torch.autograd.grad(linear(norm(x)).square().sum(), linear.parameters())
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nn.Identity()])
def test_another_first_module_gives_the_same_gradients(norm):
    linear = nn.Linear(4, 5)
    x = torch.randn(3, 4, requires_grad=True)
    inputs = [x, *linear.parameters()]
    grads = torch.autograd.grad(apply_recomputed(norm, linear, x).square().sum(), inputs)
    expected = torch.autograd.grad(linear(norm(x)).square().sum(), inputs)
    assert all(map(torch.equal, grads, expected))


def test_hooks_of_somebody_else_see_what_they_see_without_it():
    """Such as `save_on_cpu`, which takes each tensor as it is."""
    linear, x = nn.Linear(4, 5), torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = apply_recomputed(nn.LayerNorm(4), copy.deepcopy(linear), x)
        expected = copy.deepcopy(linear)(nn.LayerNorm(4)(x))
    grads = [torch.autograd.grad(value.square().sum(), x)[0] for value in (y, expected)]
    assert torch.equal(*grads)
