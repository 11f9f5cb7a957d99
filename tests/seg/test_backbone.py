import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from SEG.backbone import ConvMAE
from tests.fake_gpu import GPU, devices_of_maps
from util.errors import UsageError
from util.layers.geometry import to_cells
from util.layers.rel_pos import resize_relative_table

GOLDEN = Path(__file__).parent.parent / "golden" / "state_dict_keys.json"
SIZES = dict(embed_dim=(16, 24, 32), depth=(1, 1, 2), num_heads=2)
SMALL = dict(SIZES, img_size=64, norm_cfg=dict(type="BN"))


def small(**kwargs) -> ConvMAE:
    torch.manual_seed(0)
    return ConvMAE(**{**SMALL, **kwargs})


def randomize(model: ConvMAE) -> ConvMAE:
    """Give position tables and layer scale values that matter."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias_table", "pos_embed")) or "gamma" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_names_shapes_and_parameter_count_of_base_are_the_originals():
    expected = json.loads(GOLDEN.read_text())["SEG ConvMAE backbone base, 512x512"]
    with torch.device("meta"):
        model = ConvMAE()
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected
    buffers = ("relative_position_index", "running_mean", "running_var", "num_batches_tracked")
    count = sum(math.prod(s) for name, s in expected.items() if not name.endswith(buffers))
    assert sum(p.numel() for p in model.parameters()) == count == 91_091_716


@pytest.mark.parametrize("size", [(512, 512), (384, 640), (513, 387)])
def test_features_of_any_size_have_the_strides_4_to_32(size):
    model = small(img_size=512).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    for features, stride, channels in zip(maps, (4, 8, 16), (16, 24, 32), strict=False):
        assert features.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
    height, width = maps[2].shape[2:]
    assert maps[3].shape == (1, 32, (height - 1) // 2, (width - 1) // 2)


def test_features_are_the_originals():
    with safe_open(GOLDEN.parent / "seg_backbone.safetensors", "pt") as golden:
        tensors = {name: golden.get_tensor(name) for name in golden.keys()}  # noqa: SIM118
        config = json.loads(golden.metadata()["config"])
    state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    model = ConvMAE(**config, norm_cfg=dict(type="BN")).eval()
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    with torch.no_grad():
        maps = model(tensors["input"])
    for i, features in enumerate(maps):
        expected = tensors[f"map{i}"]
        assert features.shape == expected.shape
        assert (features - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("side", [16, 32])
def test_an_image_of_few_tokens_has_a_last_map_too(side):
    with torch.no_grad():
        maps = small().eval()(torch.randn(1, 3, side, side))
    assert maps[3].shape == (1, 32, 1, 1)


def test_a_position_of_a_map_sees_what_lies_there_in_the_image():
    model = small().eval()
    image = torch.randn(1, 3, 96, 160)
    changed = image.clone()
    changed[..., 64:68, 128:132] += 1  # a cell of stage 1
    with torch.no_grad():
        first, second = model(image)[0], model(changed)[0]
    rows, columns = (first != second).any(dim=1)[0].nonzero(as_tuple=True)
    assert rows.float().mean() == 16 and columns.float().mean() == 32


def test_an_odd_size_is_the_even_one_padded_and_cropped():
    model = randomize(small()).eval()
    image = torch.randn(1, 3, 75, 101)
    padded = torch.zeros(1, 3, 80, 112)
    padded[..., :75, :101] = image
    with torch.no_grad():
        maps, whole = model(image), model(padded)
    for features, reference in zip(maps[:3], whole[:3], strict=True):
        height, width = features.shape[2:]
        torch.testing.assert_close(features, reference[..., :height, :width])


def test_stage_3_is_the_encoders_when_tables_are_zero_and_scales_one():
    model = small()
    encoder = ConvViT(**SIZES, img_size=64, num_classes=0, norm_layer=torch.nn.LayerNorm)
    encoder.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 64)
    expected = encoder.forward_intermediates(image, intermediates_only=True)
    for features, reference in zip(model.eval()(image), expected, strict=False):
        torch.testing.assert_close(features, reference)


def test_the_relative_bias_and_layer_scale_take_part():
    model, image = randomize(small()).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)[2]
        for name in ("attn.relative_position_bias_table", "gamma_1", "gamma_2"):
            parameter = model.blocks3[1].get_parameter(name)
            kept = parameter.clone()
            parameter.add_(1 + torch.arange(len(kept)).view(-1, *[1] * (kept.ndim - 1)) % 2)
            assert not torch.allclose(model(image)[2], before)
            parameter.copy_(kept)


def test_tables_follow_the_grid_of_the_input():
    model = randomize(small()).eval()
    attention = model.blocks3[0].attn
    bias = attention.relative_position_bias((6, 10))
    table = resize_relative_table(attention.relative_position_bias_table, (4, 4), (6, 10))
    assert bias.shape == (2, 60, 60)
    # Down one row, right two columns, from the first token.
    row = (5 - 1) * 19 + (9 - 2)
    torch.testing.assert_close(bias[:, 0, 12], table[row])


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("with_cp", [False, True])
def test_every_parameter_gets_a_gradient(size, with_cp):
    model = randomize(small(with_cp=with_cp, drop_path_rate=0.1)).train()
    sum(features.square().mean() for features in model(torch.randn(2, 3, *size))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_mixed_precision_reaches_every_parameter_too():
    model = randomize(small(with_cp=True)).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(torch.randn(2, 3, 64, 64))
    sum(features.float().square().mean() for features in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_no_gradient():
    image, gradients = torch.randn(2, 3, 64, 64), []
    for with_cp in (False, True):
        model = randomize(small(with_cp=with_cp))
        sum(features.square().mean() for features in model(image)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def autoencoder(path: Path, **kwargs) -> MaskedAutoencoderConvViT:
    """Save a small masked autoencoder as pretraining does, and return it."""
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = MaskedAutoencoderConvViT(**{**SIZES, **decoder, "img_size": 64, **kwargs})
    args = {"input_size": list(model.geometry.img_size)}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return model


def test_a_pretraining_checkpoint_loads_all_that_is_shared(tmp_path):
    source = autoencoder(tmp_path / "a.pth")
    model = small(pretrained=str(tmp_path / "a.pth"))
    model.init_weights()
    own, shared = model.state_dict(), source.state_dict()
    new = {name for name in own if name not in shared}
    assert all(
        name.startswith("fpn.") or "gamma_" in name or "relative_position" in name for name in new
    )
    for name in own.keys() - new:
        torch.testing.assert_close(own[name], shared[name], rtol=0, atol=0)


def test_the_report_of_a_checkpoint_says_what_is_new_and_what_was_changed(tmp_path):
    autoencoder(tmp_path / "a.pth", img_size=(64, 32), in_chans=1)
    report = small().load(str(tmp_path / "a.pth"))
    assert report.resized == [
        "patch_embed1.proj.weight (1 to 3 channels)", "pos_embed (4x2 to 4x4)"
    ]  # fmt: skip
    assert report.unexpected == []
    assert all("fpn" in n or "gamma" in n or "bias_table" in n for n in report.missing)


def test_a_gray_encoder_gives_the_same_features_for_gray_pictures_in_colour(tmp_path):
    source = autoencoder(tmp_path / "a.pth", in_chans=1)
    model, gray = small().eval(), torch.randn(2, 1, 64, 64)
    model.load(str(tmp_path / "a.pth"))
    with torch.no_grad():
        cells = to_cells(gray.movedim(1, -1), (4, 4))
        actual = model.patch_embed1(cells.expand(-1, -1, -1, -1, 3))
        torch.testing.assert_close(actual, source.patch_embed1(cells))


def test_a_checkpoint_of_another_size_is_refused_with_the_reason(tmp_path):
    autoencoder(tmp_path / "a.pth", embed_dim=(16, 24, 64))
    with pytest.raises(UsageError, match="another size of model"):
        small().load(str(tmp_path / "a.pth"))


def test_a_segmentors_encoder_for_another_crop_has_its_tables_resized(tmp_path):
    source = randomize(small())
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    state["decode_head.conv_seg.weight"] = torch.zeros(150, 4, 1, 1)
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b")}}, tmp_path / "s.pth")
    model = small(img_size=(96, 64))
    report = model.load(str(tmp_path / "s.pth"))
    assert report.missing == []
    name = "blocks3.1.attn.relative_position_bias_table"
    expected = resize_relative_table(source.state_dict()[name], (4, 4), (6, 4))
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert f"{name} (4x4 to 6x4)" in report.resized


def test_the_backbone_takes_any_number_of_channels_and_a_colour_checkpoint(tmp_path):
    colour = MaskedAutoencoderConvViT(**SIZES, img_size=64, decoder_embed_dim=16, decoder_depth=1)
    torch.save({"model": colour.state_dict()}, tmp_path / "x.pth")
    model = small(in_chans=7, pretrained=str(tmp_path / "x.pth"))
    model.init_weights()
    kernel = colour.state_dict()["patch_embed1.proj.weight"]
    torch.testing.assert_close(model.patch_embed1.proj.weight[:, :3], kernel * (3 / 7))
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 7, 64, 64))[0].shape == (1, 16, 16, 16)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["trained size", "another size"])
def test_all_that_the_backbone_makes_is_on_the_gpu(size):
    assert devices_of_maps(small(), size, trained=(64, 64)) == {GPU}
