import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.optim import param_groups_layer_decay

from benchmarks.reference import GridConvViT
from models_convvit import ConvViT
from util.layers.architecture import SIZES

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(embed_dim=(16, 24, 32), depth=(2, 1, 2), num_heads=2)
MODES = ["global_pool", "first_token"]


def tiny(**kwargs):
    return timm.create_model("convvit_tiny_patch16", **{"img_size": 64, **kwargs}).eval()


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_originals(mode):
    model = ConvViT(**TINY, num_classes=10, global_pool=mode == "global_pool").eval()
    with safe_open(GOLDEN / "convvit_tiny.safetensors", "pt") as golden:
        prefix = f"{mode}.state."
        state = {
            name.removeprefix(prefix): golden.get_tensor(name)
            for name in golden.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }
        imgs = golden.get_tensor("imgs_uint8").float() / 127.5 - 1
        expected = golden.get_tensor(f"{mode}.logits")
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(imgs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_names_and_shapes_of_base_are_the_originals(mode):
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())
    with torch.device("meta"):
        model = ConvViT(**SIZES["base"], global_pool=mode == "global_pool")
    actual = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert actual == expected[f"convvit_base_patch16[{mode}]"]


def test_layer_decay_groups_are_the_originals():
    with torch.device("meta"):
        model = ConvViT(**SIZES["base"])
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65
    )
    names = {id(p): name for name, p in model.named_parameters()}
    actual = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    expected = json.loads((GOLDEN / "layer_decay_base_0.65.json").read_text())
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values, rel=1e-6), name


def test_the_dense_encoder_equals_the_published_form_on_grids():
    model, published = tiny(), GridConvViT(**SIZES["tiny"], img_size=64).eval()
    published.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    *early, last = model.forward_stages(x)
    *early_grids, expected = published.forward_stages(x)
    for actual, grid in zip(early, early_grids, strict=True):
        torch.testing.assert_close(actual.movedim(-1, 1), grid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 160)])
def test_features_only_gives_three_maps_for_any_size_that_divides(size):
    model = tiny(features_only=True)
    maps = model(torch.randn(2, 3, *size))
    assert model.feature_info.reduction() == [4, 8, 16]
    assert model.feature_info.channels() == [32, 64, 128]
    for x, stride, channels in zip(maps, (4, 8, 16), (32, 64, 128), strict=True):
        assert x.shape == (2, channels, size[0] // stride, size[1] // stride)


@pytest.mark.parametrize("last", [0, 1])
def test_features_of_early_stages_alone_run_without_the_rest(last):
    model = tiny(features_only=True, out_indices=(last,))
    (features,) = model(torch.randn(1, 3, 64, 64))
    assert features.shape[1] == (32, 64)[last]
    assert not any("blocks3" in name for name, _ in model.named_parameters())


def test_intermediates_are_what_features_only_gives_and_the_final_tokens():
    model, x = tiny(global_pool="token"), torch.randn(2, 3, 64, 64)
    tokens, maps = model.forward_intermediates(x)
    torch.testing.assert_close(tokens, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    (early,) = model.forward_intermediates(
        x, [0], stop_early=True, intermediates_only=True, output_fmt="NHWC"
    )
    torch.testing.assert_close(early.movedim(-1, 1), maps[0])


def test_a_model_without_classes_returns_pooled_features():
    assert tiny(num_classes=0)(torch.randn(2, 3, 64, 64)).shape == (2, 128)


def test_the_head_can_be_replaced_with_its_pooling():
    model = tiny()
    model.reset_classifier(7, "token")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert "norm.weight" in model.state_dict() and "fc_norm.weight" not in model.state_dict()
    assert model.get_classifier() is model.head


def test_recomputing_activations_changes_no_gradient():
    torch.manual_seed(0)
    model, x = tiny().train(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_class_token_stands_before_the_grid_and_is_not_pooled():
    model = tiny(class_token=True)
    assert model.pos_embed.shape == (1, 17, 128)
    tokens = model.forward_features(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 17, 128)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, model.fc_norm(tokens[:, 1:].mean(1)))


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"72x64 pixels is not divisible .* 16x16"):
        tiny()(torch.randn(1, 3, 72, 64))


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max' must be 'avg' or 'token'"):
        ConvViT(**TINY, global_pool="max")


def test_the_classifier_compiles_to_one_graph():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_drop_path_rises_over_all_blocks_of_all_stages():
    model = ConvViT(**TINY, drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob for s in (1, 2, 3) for b in getattr(model, f"blocks{s}")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert math.isclose(rates[-1], 0.4, rel_tol=1e-6)
