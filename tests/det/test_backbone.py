import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.vision_transformer_sam import window_partition, window_unpartition

from DET.backbone import (
    ConvViTDet,
    DecomposedAttention,
    GridAttention,
    SingleScaleConvViTDet,
)
from tests.fake_gpu import GPU, devices_of_maps
from util.layers.architecture import SIZES
from util.layers.pos_embed import get_sincos_pos_embed

GOLDEN = Path(__file__).parent.parent / "golden"
KEYS = json.loads((GOLDEN / "state_dict_keys.json").read_text())
PUBLISHED = [
    (ConvViTDet, "DET ConvViTDet base, 1024x1024, window 16", 87.80),
    (SingleScaleConvViTDet, "DET ViTDet-style ConvViT base, 1024x1024, window 14", 84.69),
]
BACKBONES = [ConvViTDet, SingleScaleConvViTDet]
SMALL = dict(embed_dim=(8, 12, 16), depth=(1, 1, 3), num_heads=2, global_blocks=(1,))


def small(backbone, **options):
    """A small model whose position tables are not zero."""
    torch.manual_seed(0)
    options = {**SMALL, "img_size": 64, "window_size": 3, **options}
    if backbone is SingleScaleConvViTDet:
        options.setdefault("pretrain_img_size", 32)
    model = backbone(**options).eval()
    for name, parameter in model.named_parameters():
        if "rel" in name:
            torch.nn.init.normal_(parameter)
    return model


# --- names and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "name", "millions"), PUBLISHED)
def test_names_shapes_and_parameter_counts_are_the_published_ones(backbone, name, millions):
    with torch.device("meta"):
        model = backbone(img_size=1024, **SIZES["base"])
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == KEYS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_published_blocks_attend_to_everything():
    with torch.device("meta"):
        models = [backbone(img_size=1024, **SIZES["base"]) for backbone in BACKBONES]
    windows = [[block.attn.window_size for block in model.blocks3] for model in models]
    assert windows[0] == [0, 16, 16, 0, 16, 16, 0, 16, 16, 16, 0]
    assert windows[1] == [14, 0, 14, 14, 0, 14, 14, 0, 14, 14, 0]


def test_the_first_backbones_position_embedding_is_sine_cosine_and_frozen():
    model = small(ConvViTDet)
    expected = torch.from_numpy(get_sincos_pos_embed(16, (4, 4))).float()
    torch.testing.assert_close(model.pos_embed[0], expected)
    assert not model.pos_embed.requires_grad
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


# --- the originals' outputs ----------------------------------------------------------------------


def original(backbone):
    """One of ours with an original's weights; the original's inputs and outputs."""
    name = "fpn" if backbone is ConvViTDet else "vitdet"
    with safe_open(GOLDEN / f"det_backbone_{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        config = json.loads(file.metadata()["config"])
    # What ours has built in, and compares with the outputs.
    options = {k: v for k, v in config.items() if k != "note" and not k.endswith("_eps")}
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    model = backbone(**options).eval()
    model.load_state_dict(state, strict=True)
    assert model.state_dict().keys() == state.keys()
    return model, tensors


@pytest.mark.parametrize(
    ("backbone", "number"),
    [(ConvViTDet, 0), (SingleScaleConvViTDet, 0), (SingleScaleConvViTDet, 1)],
)
@torch.no_grad()
def test_features_are_those_of_the_original(backbone, number):
    model, golden = original(backbone)
    features = model(golden[f"input{number}"])
    expected = {name: golden[f"{name}.{number}"] for name in features}
    assert len(expected) == len([name for name in golden if name.endswith(f".{number}")
                                 and not name.startswith("state.")])  # fmt: skip
    for name, feature in features.items():
        error = (feature - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, name


# --- windows and attention -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 9), (7, 9), (6, 7), (5, 8), (1, 2)])
def test_windows_put_together_are_the_grid_again(size):
    x = torch.randn(2, *size, 5)
    windows, padded = window_partition(x, 3)
    assert windows.shape[1:] == (3, 3, 5) and len(windows) == 2 * padded[0] * padded[1] // 9
    torch.testing.assert_close(window_unpartition(windows, 3, size, padded), x, rtol=0, atol=0)


def plain_attention(attention, x, bias):
    """Attention among the tokens of each `[N, h, w, C]`, pair by pair.

    `bias(q, i, j)` is what is added to the logit of a head's query `q` at i for the key at j.
    """
    heads = attention.num_heads
    outputs = []
    for tokens in x.flatten(1, 2):
        q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
        found = []
        for head, (qh, kh, vh) in enumerate(
            zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
        ):
            logits = torch.stack(
                [
                    torch.stack(
                        [
                            qh[i] @ kh[j] / qh.shape[-1] ** 0.5 + bias(head, qh[i], i, j)
                            for j in range(len(tokens))
                        ]
                    )
                    for i in range(len(tokens))
                ]
            )
            found.append(logits.softmax(-1) @ vh)
        outputs.append(attention.proj(torch.cat(found, dim=-1)))
    return torch.stack(outputs).view_as(x)


def plain_windows(x, side):
    """A grid's windows, cut out one by one from a grid padded with zeros, and their places."""
    height, width = (-(-size // side) * side for size in x.shape[1:3])
    padded = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    for top in range(0, height, side):
        for left in range(0, width, side):
            place = (slice(None), slice(top, top + side), slice(left, left + side))
            yield place, padded[place]


def plain_windowed(attention, x, side, bias):
    """Attention window by window."""
    height, width = (-(-size // side) * side for size in x.shape[1:3])
    out = x.new_zeros(len(x), height, width, x.shape[-1])
    for place, window in plain_windows(x, side):
        out[place] = plain_attention(attention, window, bias)
    return out[:, : x.shape[1], : x.shape[2]]


def random_attention(cls, *arguments):
    torch.manual_seed(1)
    attention = cls(8, 2, *arguments)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
@torch.no_grad()
def test_global_and_windowed_attention_equal_the_plain_form(size):
    x = torch.randn(2, *size, 8)
    everywhere, windowed = random_attention(GridAttention), random_attention(GridAttention, 2)
    tables = {n: torch.randn(2, n, n) for n in (4, size[0] * size[1])}

    def bias(n):
        return lambda head, q, i, j: tables[n][head, i, j]

    n = size[0] * size[1]
    expected = plain_attention(everywhere, x, bias(n))
    torch.testing.assert_close(everywhere(x, tables[n]), expected, rtol=1e-4, atol=1e-5)
    expected = plain_windowed(windowed, x, 2, bias(4))
    torch.testing.assert_close(windowed(x, tables[4]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
@torch.no_grad()
def test_decomposed_attention_equals_the_plain_form(size):
    x = torch.randn(2, *size, 8)

    def bias(attention, width, height):
        def shift(head, q, i, j):
            rows, columns = i // width - j // width, i % width - j % width
            return (
                q @ attention.rel_pos_h[rows + height - 1]
                + q @ attention.rel_pos_w[columns + width - 1]
            )

        return shift

    everywhere = random_attention(DecomposedAttention, 0, size)
    expected = plain_attention(everywhere, x, bias(everywhere, size[1], size[0]))
    torch.testing.assert_close(everywhere(x), expected, rtol=1e-4, atol=1e-5)
    windowed = random_attention(DecomposedAttention, 2, (2, 2))
    expected = plain_windowed(windowed, x, 2, bias(windowed, 2, 2))
    torch.testing.assert_close(windowed(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_windowed_block_does_not_see_beyond_its_window():
    model = small(ConvViTDet, global_blocks=(), depth=(1, 1, 1))
    x = torch.randn(1, 64, 16)
    before = model.forward_blocks3(x, (8, 8)).view(8, 8, 16)
    x[0, 0] = torch.randn(16)
    changed = (model.forward_blocks3(x, (8, 8)).view(8, 8, 16) != before).any(-1)
    assert changed[:3, :3].all() and changed.sum() == 9


@torch.no_grad()
def test_the_windows_share_one_relative_table_and_the_global_blocks_another():
    model = small(ConvViTDet)
    x = torch.randn(1, 16, 16)
    blocks = {table: [] for table in ("windowed_rel_pos_bias", "global_rel_pos_bias")}
    for table, seen in blocks.items():
        bias = dict(zip(blocks, model.block_bias((4, 4)), strict=True))[table]
        for i, block in enumerate(model.blocks3):
            block.attn.register_forward_pre_hook(
                lambda _, args, i=i, seen=seen, bias=bias: (
                    seen.append(i)
                    if args[1].shape == bias.shape and (args[1] == bias).all()
                    else None
                )
            )
    model.forward_blocks3(x, (4, 4))
    assert blocks == {"windowed_rel_pos_bias": [0, 2], "global_rel_pos_bias": [1]}


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1024, 1024), (800, 1216), (45, 71)])
@torch.no_grad()
def test_the_first_backbones_features_cover_images_of_any_size(size):
    model = small(ConvViTDet, img_size=1024, window_size=16, num_heads=1)
    features = model(torch.randn(1, 3, *size))
    padded = [-(-side // 32) * 32 for side in size]
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        f"s{i}": (1, channels, padded[0] // stride, padded[1] // stride)
        for i, (channels, stride) in enumerate(zip((8, 12, 16, 16), (4, 8, 16, 32), strict=True))
    }
    torch.testing.assert_close(features["s3"], F.max_pool2d(features["s2"], 2))


@pytest.mark.parametrize("size", [(1024, 1024), (800, 1216), (45, 71)])
@torch.no_grad()
def test_the_second_backbones_feature_covers_images_of_any_size(size):
    model = small(SingleScaleConvViTDet, img_size=1024, window_size=14, num_heads=1)
    features = model(torch.randn(1, 3, *size))
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        "last_feat": (1, 16, *(-(-side // 16) for side in size))
    }


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_an_image_in_a_batch_has_the_features_it_has_alone(backbone):
    model, images = small(backbone), torch.randn(3, 3, 70, 50)
    together = model(images)
    for i, image in enumerate(images):
        for name, feature in model(image.unsqueeze(0)).items():
            torch.testing.assert_close(feature[0], together[name][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_padding_is_with_zeros_at_the_right_and_bottom(backbone):
    model, image = small(backbone), torch.randn(1, 3, 45, 71)
    padding = (0, 25, 0, 19) if backbone is ConvViTDet else (0, 9, 0, 3)
    for name, feature in model(F.pad(image, padding)).items():
        torch.testing.assert_close(feature, model(image)[name], rtol=0, atol=0)


@torch.no_grad()
def test_the_table_of_another_size_is_resized_to_the_grid():
    """A model made for 64 pixels and one made for 96 with the resized tables are the same."""
    model, larger = small(ConvViTDet), small(ConvViTDet, img_size=(96, 64))
    table = model.position_embedding((6, 4))
    assert table.shape == (1, 24, 16)
    state = model.state_dict() | {
        "pos_embed": table,
        "global_rel_pos_bias.relative_position_bias_table": larger.state_dict()[
            "global_rel_pos_bias.relative_position_bias_table"
        ],
        "global_rel_pos_bias.relative_position_index": larger.state_dict()[
            "global_rel_pos_bias.relative_position_index"
        ],
    }
    larger.load_state_dict(state)
    larger.global_rel_pos_bias.forward = lambda grid: model.global_rel_pos_bias(grid)
    images = torch.randn(2, 3, 96, 64)
    for name, feature in model(images).items():
        torch.testing.assert_close(feature, larger(images)[name])


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_the_absolute_table_is_resized_by_plain_bicubic_interpolation(backbone):
    model = small(backbone)
    old = model.geometry.grid(3)
    table = model.pos_embed.unflatten(1, old).permute(0, 3, 1, 2)
    for grid in ((6, 4), (1, 2)):
        expected = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(model.position_embedding(grid), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_relative_bias_keeps_its_shifts_on_a_smaller_grid():
    model = small(ConvViTDet)
    whole, part = (model.global_rel_pos_bias(grid) for grid in ((4, 4), (3, 2)))
    kept = [row * 4 + column for row in range(3) for column in range(2)]
    torch.testing.assert_close(part, whole[:, kept][:, :, kept])


@torch.no_grad()
def test_decomposed_tables_are_interpolated_to_the_grid():
    attention = random_attention(DecomposedAttention, 0, (4, 4))
    larger = random_attention(DecomposedAttention, 0, (6, 5))
    larger.load_state_dict(
        attention.state_dict()
        | {
            name: F.interpolate(getattr(attention, name).T[None], 2 * n - 1, mode="linear")[0].T
            for name, n in (("rel_pos_h", 6), ("rel_pos_w", 5))
        }
    )
    x = torch.randn(2, 6, 5, 8)
    torch.testing.assert_close(attention(x), larger(x))


# --- training ------------------------------------------------------------------------------------


def gradients(model, images):
    sum((feature**2).mean() for feature in model(images).values()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_but_the_frozen_one_has_a_gradient(backbone):
    found = gradients(small(backbone).train(), torch.randn(2, 3, 64, 64))
    assert [name for name, g in found.items() if g is None or not g.any()] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_activation_checkpointing_changes_no_gradient(backbone):
    images = torch.randn(2, 3, 64, 64)
    plain, recomputed = (
        gradients(small(backbone, use_act_checkpoint=switch).train(), images)
        for switch in (False, True)
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_bfloat16_is_close_to_float32(backbone):
    model, images = small(backbone), torch.randn(1, 3, 64, 64)
    plain = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, feature in model(images).items():
            assert (feature - plain[name]).abs().mean() < 0.03 * plain[name].abs().mean()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_takes_any_number_of_channels(backbone):
    model = small(backbone, in_chans=7)
    with torch.no_grad():
        features = model(torch.randn(1, 7, 64, 64))
    assert all(x.isfinite().all() for x in features.values())
    assert {x.shape[0] for x in features.values()} == {1}
    assert model.patch_embed1.proj.weight.shape[1] == 7


# --- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["trained size", "another size"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_that_a_backbone_makes_is_on_the_gpu(backbone, size):
    assert devices_of_maps(small(backbone), size, trained=(64, 64)) == {GPU}
