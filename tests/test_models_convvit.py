import copy
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models_convvit import (
    CONV,
    Attention,
    Block,
    ConvBlock,
    ConvMlp,
    ConvViTEncoder,
    DenseGrid,
    Geometry,
    PatchEmbed,
    VisibleGrid,
    channel_norm,
    conv_as_linear,
    gelu_linear,
    norm_linear,
    to_nested_blocks,
)

CONV_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TINY = dict(img_size=64, embed_dim=(4, 6, 8), depth=(1, 2, 2), num_heads=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    """Give every parameter a value of its own: unit scales and zero biases hide mistakes."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def visible_positions(number, kept, grid):
    """For each of `number` images the sorted grid positions of `kept` visible tokens."""
    length = math.prod(grid)
    return torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(number)])


def visible_grid(positions, grid):
    first = torch.arange(len(positions)).unsqueeze(1) * math.prod(grid)
    return VisibleGrid((positions + first).flatten(), (len(positions), *grid))


# ---- Nested blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "units"),
    [
        ((6,), [(3,)]),
        ((12,), [(3,), (2,)]),
        ((4, 6), []),
        ((4, 6), [(2, 3)]),
        ((8, 12), [(2, 3), (2, 1)]),
        ((8, 6), [(2, 1), (1, 3), (2, 2)]),
        ((4, 4, 6), [(2, 1, 3)]),
        ((4, 4, 6), [(1, 2, 3), (2, 1, 1)]),
    ],
)
def test_nested_blocks_equal_a_plain_loop(size, units):
    ndim = len(size)
    x = torch.arange(2 * 3 * math.prod(size)).view(2, 3, *size)
    blocks = to_nested_blocks(x, units)

    counts = [s // math.prod(unit[d] for unit in units) for d, s in enumerate(size)]
    assert blocks.shape == (2, *counts, *(u for unit in units for u in unit), 3)
    for image, channel in product(range(2), range(3)):
        for inner in np.ndindex(*blocks.shape[1:-1]):
            place = list(inner[:ndim])
            for level, unit in enumerate(units, start=1):
                for d in range(ndim):
                    place[d] = place[d] * unit[d] + inner[level * ndim + d]
            assert blocks[(image, *inner, channel)] == x[(image, channel, *place)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nested_blocks_are_a_view(memory_format):
    x = torch.zeros(2, 3, 8, 12).contiguous(memory_format=memory_format)
    blocks = to_nested_blocks(x, [(2, 3), (2, 1)])
    x.fill_(1)
    assert blocks.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert blocks.eq(1).all()


# ---- Convolutions on tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "units"),
    [
        ((3,), []),
        ((2,), [(3,)]),
        ((4, 4), []),
        ((2, 3), []),
        ((2, 2), [(2, 2)]),
        ((2, 1), [(2, 3)]),
        ((1, 2), [(2, 2), (2, 1)]),
        ((2, 1, 2), [(1, 2, 2)]),
    ],
)
def test_conv_as_linear_equals_the_convolution(cells, units):
    kernel = tuple(math.prod(sizes) for sizes in zip(cells, *units, strict=True))
    conv = randomize(CONV[len(kernel)](3, 5, kernel, kernel))
    grid = torch.randn(2, 3, *(2 * k for k in kernel), dtype=torch.float64)
    # [N, *blocks, *cells, *units, C] -> [N, B, K, C]
    tokens = to_nested_blocks(grid, [cells, *units]).reshape(2, -1, math.prod(kernel), 3)
    expected = conv(grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv_as_linear(tokens, conv, units).flatten(1, 2), expected)


def test_patch_embedding_of_tokens_equals_that_of_the_grid():
    embed = randomize(PatchEmbed(3, 6, (2, 4)))
    grid = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = to_nested_blocks(grid, [(2, 4)]).reshape(2, 8, 8, 3)
    expected = embed(grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed.forward_tokens(tokens).flatten(1, 2), expected)


def test_patch_embedding_with_channels_last_equals_that_of_the_grid():
    embed = randomize(PatchEmbed(3, 6, (2, 4)))
    grid = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    actual = embed.forward_channels_last(grid.movedim(1, -1))
    torch.testing.assert_close(actual, embed(grid).movedim(1, -1))


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


class Adapted(torch.nn.Module):
    """A layer with something added to it, such as LoRA's product of two small matrices."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + 1


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc1", "mlp.fc2"])
def test_an_adapter_in_a_blocks_place_for_a_linear_map_is_called(name):
    block = randomize(Block(8, num_heads=2, mlp_ratio=3))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    shifted = copy.deepcopy(block)
    with torch.no_grad():
        shifted.get_submodule(name).bias += 1
    block.set_submodule(name, Adapted(block.get_submodule(name)))
    torch.testing.assert_close(block(x), shifted(x))


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc1", "mlp.fc2"])
def test_a_linear_map_without_bias_may_take_the_place_of_one_with(name):
    block = randomize(Block(8, num_heads=2, mlp_ratio=3))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer = block.get_submodule(name)
    torch.nn.init.zeros_(layer.bias)
    expected = block(x)
    layer.bias = None
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "norm2", "mlp.fc1", "mlp.fc2"])
def test_hooks_in_a_block_are_called(name):
    block, seen = randomize(Block(8, num_heads=2, mlp_ratio=3)), []
    hook = block.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    hooked = block(x)
    hook.remove()
    torch.testing.assert_close(hooked, block(x))
    assert seen == [1]


def test_mlp_of_tokens_equals_that_of_the_grid():
    mlp, norm = randomize(ConvMlp(4, 10, ndim=2)), randomize(torch.nn.LayerNorm(4))
    grid = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    tokens = grid.flatten(2).transpose(1, 2).unsqueeze(2)
    expected = mlp(channel_norm(grid, norm)).flatten(2).transpose(1, 2).unsqueeze(2)
    torch.testing.assert_close(mlp.forward_tokens(tokens, norm), expected)


DEPTHWISE = [((9,), (5,)), ((5, 6), (5, 5)), ((4, 7), (3, 5)), ((3, 4, 4), (3, 3, 5))]


def depthwise_case(grid, kernel, channels=2):
    positions = visible_positions(2, math.prod(grid) // 3, grid)
    x = torch.randn(2, positions.shape[1], 1, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    return positions, x, weight, bias


@pytest.mark.parametrize(("grid", "kernel"), DEPTHWISE)
def test_visible_depthwise_equals_the_convolution_of_a_zero_canvas(grid, kernel):
    positions, x, weight, bias = depthwise_case(grid, kernel)
    conv = SimpleNamespace(weight=weight, bias=bias)
    out = visible_grid(positions, grid).depthwise(x, conv)

    canvas = torch.zeros(2, 2, math.prod(grid), dtype=torch.float64)
    for image, visible in enumerate(positions):
        for token, position in enumerate(visible):
            canvas[image, :, position] = x[image, token, 0]
    padding = [k // 2 for k in kernel]
    convolve = CONV_FUNCTIONS[len(grid)]
    dense = convolve(canvas.view(2, 2, *grid), weight, bias, padding=padding, groups=2).flatten(2)
    expected = torch.stack([dense[i, :, visible].T for i, visible in enumerate(positions)])
    torch.testing.assert_close(out, expected.unsqueeze(2))

    target = torch.randn_like(out)
    grads = torch.autograd.grad((out * target).sum(), (x, weight, bias))
    dense_grads = torch.autograd.grad((expected.unsqueeze(2) * target).sum(), (x, weight, bias))
    torch.testing.assert_close(grads, dense_grads)


@pytest.mark.parametrize(("grid", "kernel"), DEPTHWISE)
def test_visible_depthwise_gradient_equals_finite_differences(grid, kernel):
    positions, *inputs = depthwise_case(grid, kernel)
    visible = visible_grid(positions, grid)

    def depthwise(x, weight, bias):
        return visible.depthwise(x, SimpleNamespace(weight=weight, bias=bias))

    assert torch.autograd.gradcheck(depthwise, inputs)


@pytest.mark.parametrize(("grid", "kernel"), [((6, 8), (5, 5)), ((3, 4, 6), (5, 5, 5))])
def test_conv_block_of_visible_tokens_equals_the_masked_block(grid, kernel):
    block = randomize(ConvBlock(4, mlp_ratio=2, kernel_size=kernel))
    x = torch.randn(3, 4, *grid, dtype=torch.float64)
    positions = visible_positions(3, math.prod(grid) // 4, grid)
    mask = torch.ones(3, math.prod(grid), dtype=torch.float64).scatter(1, positions, 0)

    def visible(grid_values):
        tokens = grid_values.flatten(2).transpose(1, 2)  # [N, L, C]
        return torch.stack([t[p] for t, p in zip(tokens, positions, strict=True)]).unsqueeze(2)

    expected = visible(block(x, mask.view(3, 1, *grid)))
    tokens = block.forward_tokens(visible(x), visible_grid(positions, grid))
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize(("grid", "kernel"), [((6, 8), (5, 5)), ((3, 4, 6), (5, 5, 5))])
def test_conv_block_of_all_tokens_equals_the_unmasked_block(grid, kernel):
    block = randomize(ConvBlock(4, mlp_ratio=2, kernel_size=kernel))
    x = torch.randn(2, 4, *grid, dtype=torch.float64)
    actual = block.forward_tokens(x.movedim(1, -1), DenseGrid())
    torch.testing.assert_close(actual, block(x).movedim(1, -1))


def test_conv_block_without_a_mask_sees_everything():
    block = randomize(ConvBlock(4, mlp_ratio=2))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    everything, half = torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 6, 6)
    half[..., 3:] = 1
    assert torch.equal(block(x), block(x, everything))
    assert not torch.allclose(block(x)[..., :3], block(x, half)[..., :3])


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


# ---- Geometry ------------------------------------------------------------------------------------


def test_integer_sizes_are_square():
    assert Geometry.of(64, (4, 2, 2)) == Geometry.of((64, 64), ((4, 4), (2, 2), [2, 2]))


def test_geometry_counts_tokens_and_pixels():
    geometry = Geometry.of((96, 160), ((4, 2), (2, 2), (1, 5)))
    assert [geometry.stride(stage) for stage in range(4)] == [(1, 1), (4, 2), (8, 4), (8, 20)]
    assert [geometry.grid(stage) for stage in range(4)] == [(96, 160), (24, 80), (12, 40), (12, 8)]
    assert (geometry.ndim, geometry.num_patches, geometry.patch_pixels) == (2, 96, 160)


def test_geometry_has_as_many_dimensions_as_the_input():
    geometry = Geometry.of((16, 64, 64), ((2, 4, 4), (1, 2, 2), (1, 2, 2)))
    assert (geometry.ndim, geometry.grid(3)) == (3, (8, 4, 4))


@pytest.mark.parametrize(
    ("img_size", "patch_size", "message"),
    [
        (100, (4, 2, 2), "100x100 is not divisible by the patch of 16x16 pixels"),
        ((96, 100), (4, 2, 2), "96x100 is not divisible by the patch of 16x16 pixels"),
        ((16, 60), ((4, 2), (2, 2), (1, 2)), "16x60 is not divisible by the patch of 8x8 pixels"),
        (64, (4, 4), r"patch_size \(4, 4\) .* three entries"),
        (64, (2, 2, 2, 2), r"patch_size \(2, 2, 2, 2\) .* three entries"),
        (64, (4, 2, (2, 2, 2)), r"does not fit img_size \(64, 64\).* an int or 2 ints"),
        (0, (4, 2, 2), r"img_size \(0, 0\) .* must be positive"),
        (64, (4, 0, 2), r"patch_size \(4, 0, 2\) must be positive"),
    ],
)
def test_geometry_that_does_not_fit_is_refused_with_the_numbers(img_size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        Geometry.of(img_size, patch_size)
