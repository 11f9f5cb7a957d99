import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from benchmarks.reference import conv_block_on_grid, conv_on_grid, patch_embed_on_grid
from models_convvit import (
    Attention,
    Block,
    ConvBlock,
    ConvViTEncoder,
    PatchEmbed,
)
from tests.modules import randomize, visible_grid, visible_positions
from util.layers.convolution import strided_conv
from util.layers.depthwise import DenseGrid
from util.layers.geometry import to_cells, to_nested_blocks

TINY = dict(img_size=64, embed_dim=(4, 6, 8), depth=(1, 2, 2), num_heads=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Convolutions on tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "units"),
    [
        ((4, 4), []),
        ((2, 3), []),
        ((2, 2), [(2, 2)]),
        ((2, 1), [(2, 3)]),
        ((1, 2), [(2, 2), (2, 1)]),
        ((2, 1, 2), [(1, 2, 2)]),
    ],
)
def test_a_strided_convolution_of_tokens_equals_that_of_the_grid(cells, units):
    kernel = tuple(math.prod(sizes) for sizes in zip(cells, *units, strict=True))
    conv = randomize(strided_conv(3, 5, kernel, units))
    grid = torch.randn(2, 3, *(2 * k for k in kernel), dtype=torch.float64)
    # [N, *blocks, *cells, *units, C] -> [N, B, K, C]
    tokens = to_nested_blocks(grid, [cells, *units]).reshape(2, -1, math.prod(kernel), 3)
    expected = conv_on_grid(conv, grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv(tokens), expected)


def test_patch_embedding_of_cells_equals_that_of_the_grid():
    embed = randomize(PatchEmbed(3, 6, (2, 4)))
    grid = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    cells = to_cells(grid.movedim(1, -1), (2, 4))  # [N, 4, 2, K, C]
    torch.testing.assert_close(embed(cells), patch_embed_on_grid(embed, grid).movedim(1, -1))


@pytest.mark.parametrize(("grid", "kernel"), [((6, 8), (5, 5)), ((3, 4, 6), (5, 5, 5))])
def test_conv_block_of_visible_tokens_equals_the_masked_block(grid, kernel):
    block = randomize(ConvBlock(4, mlp_ratio=2, kernel_size=kernel))
    x = torch.randn(3, 4, *grid, dtype=torch.float64)
    positions = visible_positions(3, math.prod(grid) // 4, grid)
    mask = torch.ones(3, math.prod(grid), dtype=torch.float64).scatter(1, positions, 0)

    def visible(grid_values):
        tokens = grid_values.flatten(2).transpose(1, 2)  # [N, L, C]
        return torch.stack([t[p] for t, p in zip(tokens, positions, strict=True)]).unsqueeze(2)

    expected = visible(conv_block_on_grid(block, x, mask.view(3, 1, *grid)))
    tokens = block(visible(x), visible_grid(positions, grid))
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize(("grid", "kernel"), [((6, 8), (5, 5)), ((3, 4, 6), (5, 5, 5))])
def test_conv_block_of_all_tokens_equals_the_unmasked_block(grid, kernel):
    block = randomize(ConvBlock(4, mlp_ratio=2, kernel_size=kernel))
    x = torch.randn(2, 4, *grid, dtype=torch.float64)
    actual = block(x.movedim(1, -1), DenseGrid())
    torch.testing.assert_close(actual, conv_block_on_grid(block, x).movedim(1, -1))


# ---- Transformer blocks --------------------------------------------------------------------------


def plain_attention(attention, x):
    """Softmax attention, head by head."""
    width, heads = x.shape[-1], attention.num_heads
    size = width // heads
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(width, dim=-1)
    outputs = []
    for head in range(heads):
        channels = slice(head * size, (head + 1) * size)
        scores = q[..., channels] @ k[..., channels].transpose(1, 2) / size**0.5
        outputs.append(scores.softmax(dim=-1) @ v[..., channels])
    return torch.cat(outputs, dim=-1) @ attention.proj.weight.T + attention.proj.bias


def test_attention_equals_a_plain_softmax():
    attention = randomize(Attention(12, num_heads=3))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), plain_attention(attention, x))


def test_transformer_block_is_pre_norm_with_two_residuals():
    block = randomize(Block(8, num_heads=2, mlp_ratio=3))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + plain_attention(block.attn, block.norm1(x))
    expected = y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    assert block.mlp.fc1.out_features == 24
    torch.testing.assert_close(block(x), expected)


def test_width_that_heads_do_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"width 16 .* 3 heads"):
        Attention(16, num_heads=3)


# ---- The encoder ---------------------------------------------------------------------------------


def test_norm_eps_is_1e_6_in_transformer_blocks_and_1e_5_before():
    encoder = ConvViTEncoder(**TINY)
    eps = {n: m.eps for n, m in encoder.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {v for n, v in eps.items() if n.startswith("blocks3")} == {1e-6}
    assert {v for n, v in eps.items() if not n.startswith("blocks3")} == {1e-5}


def test_drop_path_grows_linearly_over_the_blocks_of_all_stages():
    encoder = ConvViTEncoder(**TINY, drop_path_rate=0.2)
    blocks = [*encoder.blocks1, *encoder.blocks2, *encoder.blocks3]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_visible_blocks_hold_the_pixels_under_their_tokens():
    encoder = ConvViTEncoder(**TINY | {"img_size": (32, 48)})
    pixels = torch.arange(32 * 48).view(1, 1, 32, 48).expand(2, -1, -1, -1)
    ids_keep = torch.tensor([[4, 0], [1, 5]])  # of 2 x 3 blocks
    blocks = encoder.visible_blocks(pixels, ids_keep)
    assert blocks.shape == (2, 2, 256, 1)
    for image, block in product(range(2), range(2)):
        row, column = divmod(ids_keep[image, block].item(), 3)
        region = pixels[0, 0, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert torch.equal(blocks[image, block, :, 0].sort().values, region.flatten())


@pytest.mark.parametrize("stage", [1, 2])
def test_visible_grid_follows_the_tokens_of_the_visible_blocks(stage):
    encoder = ConvViTEncoder(**TINY | {"img_size": (32, 48)})
    ids_keep = torch.tensor([[4, 0], [1, 5]])
    rows, columns = encoder.geometry.grid(stage)
    stride = encoder.geometry.stride(stage)[0]
    pixels = torch.arange(32 * 48).view(1, 1, 32, 48).expand(2, -1, -1, -1)
    # The first pixel under each token, in the order in which the encoder merges pixels.
    first = encoder.visible_blocks(pixels, ids_keep).unflatten(2, (-1, stride**2))[..., 0, 0]
    place = first // 48 // stride * columns + first % 48 // stride  # [N, B, U]
    image = torch.arange(2).view(2, 1, 1)
    visible = encoder.visible_grid(ids_keep, stage)
    assert visible.canvas == (2, rows, columns)
    assert torch.equal(visible.index, (place + image * rows * columns).flatten())


@pytest.mark.parametrize("name", ["embed_dim", "depth", "mlp_ratio"])
def test_list_that_is_not_one_entry_a_stage_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} \(4, 4\) must have three entries"):
        ConvViTEncoder(**TINY | {name: (4, 4)})
