"""Modules of the models are called: hooks fire, adapters and parametrisations take part."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from tests.modules import DECODER, INPUTS, SIZES

KINDS = {
    "autoencoder": lambda **size: MaskedAutoencoderConvViT(**SIZES, **DECODER, **size),
    "classifier": lambda **size: ConvViT(**SIZES, num_classes=3, **size),
    "classifier with token": lambda **size: ConvViT(
        **SIZES, num_classes=3, global_pool="token", class_token=True, **size
    ),
}
every_model = pytest.mark.parametrize("kind", KINDS)
every_input = pytest.mark.parametrize("size", INPUTS.values(), ids=INPUTS)
HEAD = ("head", "head_drop", "fc_norm")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(kind, size):
    """A small model, every parameter moved from its initial value."""
    model = KINDS[kind](**size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double()


def images(model):
    return torch.randn(2, 3, *model.geometry.img_size, dtype=torch.float64)


def output(model, imgs):
    """The prediction or the logits, with the same mask each time."""
    if isinstance(model, MaskedAutoencoderConvViT):
        length = model.geometry.num_patches
        return model(imgs, 0.5, torch.linspace(0, 1, 2 * length).view(2, length).sin())[1]
    return model(imgs)


def called_modules(model, run):
    """Names of the modules whose forward hooks fire in `run`."""
    called, hooks = set(), []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    run()
    for hook in hooks:
        hook.remove()
    return called


def callable_modules(model):
    """Names of all modules that have a `forward`: all but lists of them."""
    return {n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}


def layers(model):
    """Names of the linear maps, convolutions and norms."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@every_model
@every_input
def test_forward_hooks_of_all_modules_fire_in_training(kind, size):
    model = build(kind, size)
    called = called_modules(model, lambda: output(model.train(), images(model)).sum().backward())
    assert called == callable_modules(model)


@every_model
@every_input
def test_forward_hooks_of_all_modules_fire_in_evaluation(kind, size):
    model = build(kind, size).eval()
    with torch.no_grad():
        called = called_modules(model, lambda: output(model, images(model)))
    assert called == callable_modules(model)


@every_input
def test_forward_hooks_of_the_encoder_fire_where_features_are_extracted(size):
    model = build("classifier with token", size).eval()
    called = called_modules(model, lambda: model.forward_intermediates(images(model), norm=True))
    assert called == callable_modules(model) - {"", *HEAD}


@every_model
def test_backward_hooks_of_all_modules_fire_and_change_no_gradient(kind):
    model = build(kind, INPUTS["image"])
    imgs, called = images(model).requires_grad_(), set()
    inputs = [imgs, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(output(model, imgs).square().sum(), inputs)
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: called.add(name))
    grads = torch.autograd.grad(output(model, imgs).square().sum(), inputs)
    assert called == callable_modules(model)
    torch.testing.assert_close(grads, expected)


class Adapter(nn.Module):
    """A layer with a number of its own added to each channel."""

    def __init__(self, layer, shift):
        super().__init__()
        self.layer, self.shift = layer, nn.Parameter(shift)

    def forward(self, *args):
        return self.layer(*args) + self.shift


@every_model
@every_input
def test_an_adapter_in_the_place_of_any_layer_is_called(kind, size):
    model = build(kind, size)
    imgs = images(model)
    plain = output(model, imgs)
    for name in layers(model):
        adapted, shifted = copy.deepcopy(model), copy.deepcopy(model)
        bias = shifted.get_submodule(name).bias
        shift = torch.linspace(-1, 1, len(bias), dtype=bias.dtype)
        bias.data += shift
        adapted.set_submodule(name, Adapter(adapted.get_submodule(name), shift))
        actual, expected = output(adapted, imgs), output(shifted, imgs)
        assert not torch.allclose(expected, plain), name
        torch.testing.assert_close(actual, expected, msg=name)
        grads = [
            torch.autograd.grad(value.square().sum(), parameter)[0]
            for value, parameter in (
                (actual, adapted.get_submodule(name).shift),
                (expected, bias),
            )
        ]
        torch.testing.assert_close(*grads, msg=name)


def test_the_map_to_a_teachers_tokens_is_called_and_may_be_adapted():
    model = MaskedAutoencoderConvViT(**SIZES, **DECODER, **INPUTS["image"], mimic_dim=5)
    imgs, noise, features = torch.randn(2, 3, 32, 32), torch.rand(2, 4), torch.randn(2, 4, 5)

    def value(model):
        return model(imgs, 0.5, noise, features=features)[0]

    assert called_modules(model, lambda: value(model)) == callable_modules(model)
    adapted, shifted = copy.deepcopy(model), copy.deepcopy(model)
    adapted.mimic = Adapter(adapted.mimic, torch.ones(5))
    shifted.mimic.bias.data += 1
    assert not torch.allclose(value(shifted), value(model))
    torch.testing.assert_close(value(adapted), value(shifted))


class Warped(nn.Module):
    """A parametrisation that changes each weight by a number of its own."""

    def forward(self, weight):
        return weight + torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)


@every_model
@every_input
def test_a_parametrisation_of_any_layer_is_called(kind, size):
    model = build(kind, size)
    imgs = images(model)
    plain = output(model, imgs)
    for name in layers(model):
        parametrized, changed = copy.deepcopy(model), copy.deepcopy(model)
        parametrize.register_parametrization(parametrized.get_submodule(name), "weight", Warped())
        weight = changed.get_submodule(name).weight
        weight.data = Warped()(weight.data)
        expected = output(changed, imgs)
        assert not torch.allclose(expected, plain), name
        torch.testing.assert_close(output(parametrized, imgs), expected, msg=name)


@every_model
@every_input
def test_any_layer_may_have_no_bias(kind, size):
    model = build(kind, size)
    imgs = images(model)
    for name in layers(model):
        without, zero = copy.deepcopy(model), copy.deepcopy(model)
        nn.init.zeros_(zero.get_submodule(name).bias)
        without.get_submodule(name).bias = None
        outputs = [output(m, imgs) for m in (without, zero)]
        torch.testing.assert_close(*outputs, msg=name)
        grads = [
            torch.autograd.grad(y.square().sum(), m.get_submodule(name).weight)[0]
            for y, m in zip(outputs, (without, zero), strict=True)
        ]
        torch.testing.assert_close(*grads, msg=name)


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
@every_input
def test_gradients_of_each_image_by_vmap_are_those_of_images_one_by_one(kind, size):
    model = build(kind, size)
    imgs = images(model)
    noise = torch.rand(2, model.geometry.num_patches)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def value(parameters, img, noise):
        args = (img[None], 0.5, noise[None]) if kind == "autoencoder" else (img[None],)
        result = functional_call(model, parameters, args)
        return (result[1] if kind == "autoencoder" else result).square().sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    each = vmap(grad(value), in_dims=(None, 0, 0))(detached, imgs, noise)
    for i in range(2):
        alone = torch.autograd.grad(value({}, imgs[i], noise[i]), parameters.values())
        for name, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(each[name][i], expected, msg=name)


@pytest.mark.parametrize("kind", INPUTS)
def test_models_run_in_inference_mode(kind):
    model = ConvViT(**SIZES, **INPUTS[kind], num_classes=3).eval()
    imgs = torch.randn(2, model.in_chans, *model.geometry.img_size)
    with torch.no_grad():
        expected = model(imgs)
    with torch.inference_mode():
        assert torch.equal(model(imgs), expected)
