import json
import os
import shutil
import sysconfig
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.reference import DenseMaskedAutoencoder
from models_convmae import MODELS, MaskedAutoencoderConvViT, convmae_from_checkpoint
from models_convvit import ConvViT
from util.errors import UsageError
from util.layers.pos_embed import get_sincos_pos_embed

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(
    img_size=64,
    embed_dim=(8, 8, 16),
    depth=(1, 1, 1),
    num_heads=2,
    mlp_ratio=(2, 3, 4),
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
GEOMETRIES = {
    "224 pixels": dict(img_size=224),
    "32-pixel patches": dict(img_size=128, patch_size=(4, 4, 2)),
    "8-pixel patches": dict(img_size=32, patch_size=(2, 2, 2)),
    "4-pixel patches": dict(img_size=16, patch_size=(2, 2, 1)),
    "odd strides": dict(img_size=(24, 36), patch_size=(3, 2, 1)),
    "not square": dict(img_size=(96, 160)),
    "rectangular patches": dict(img_size=(32, 48), patch_size=((4, 2), (2, 2), (1, 2))),
    "one channel": dict(in_chans=1),
    "four channels": dict(in_chans=4),
    "no conv blocks": dict(depth=(0, 0, 1)),
    "conv blocks in stage 2 only": dict(depth=(0, 1, 1)),
    "three conv blocks": dict(depth=(3, 3, 1)),
    "7x7 depthwise convolutions": dict(kernel_size=7),
    "video": dict(
        img_size=(4, 32, 48),
        patch_size=((2, 4, 4), (1, 2, 2), (1, 2, 2)),
        embed_dim=(8, 8, 12),
        decoder_embed_dim=12,
    ),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(model_class=MaskedAutoencoderConvViT, **kwargs):
    """A tiny model, every parameter moved from its initial value (zero biases hide mistakes)."""
    model = model_class(**TINY | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def build_with_dense_form(**kwargs):
    model, dense = build(**kwargs), DenseMaskedAutoencoder(**TINY | kwargs)
    dense.load_state_dict(model.state_dict())
    return model, dense


def inputs(model, number=2):
    """Images and the noise that decides their mask."""
    imgs = torch.randn(number, model.in_chans, *model.geometry.img_size)
    return imgs, torch.rand(number, model.geometry.num_patches)


def pixel_mask(model, mask):
    """`[N, L]`, 1 where removed, as booleans `[N, 1, *img_size]`."""
    pixels = mask.bool().view(len(mask), 1, *model.geometry.grid(3))
    for d, stride in enumerate(model.geometry.stride(3)):
        pixels = pixels.repeat_interleave(stride, dim=2 + d)
    return pixels


def gradients(model, value):
    """Of `value` by each trainable parameter."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(value, named.values()), strict=True))


def assert_gradients_close(actual, expected, tolerance):
    """Compare the norm of each parameter's difference with that of its gradient."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name


# ---- Parity with the original --------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "convmae_tiny.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    tensors["imgs"] = tensors["imgs_uint8"].float() / 127.5 - 1
    config["img_size"] = config["img_size"][0]  # the original lists the input of each stage
    return tensors, config


def golden_model(golden, **kwargs):
    tensors, config = golden
    model = MaskedAutoencoderConvViT(**config, **kwargs)
    prefix = "state."
    model.load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )
    return model


@pytest.mark.parametrize("target", ["plain", "norm_pix"])
def test_mask_loss_prediction_and_gradients_equal_the_originals(golden, target):
    tensors, _ = golden
    model = golden_model(golden, norm_pix_loss=target == "norm_pix")
    torch.manual_seed(123)
    loss, pred, mask = model(tensors["imgs"], mask_ratio=0.75)

    assert torch.equal(mask, tensors["mask"])
    assert loss.item() == pytest.approx(tensors[f"{target}.loss"].item(), rel=0, abs=1e-5)
    torch.testing.assert_close(pred[:, ::5], tensors["pred_every_5th_token"], rtol=0, atol=1e-5)
    prefix = f"{target}.gradnorm."
    norms = {name: gradient.norm().item() for name, gradient in gradients(model, loss).items()}
    expected = {
        n.removeprefix(prefix): t.item() for n, t in tensors.items() if n.startswith(prefix)
    }
    assert norms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("target", ["plain", "norm_pix"])
def test_complementary_masks_loss_prediction_and_gradients_equal_the_originals(golden, target):
    with safe_open(GOLDEN / "fastconvmae_tiny.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = golden_model(golden, norm_pix_loss=target == "norm_pix", complementary=True)
    torch.manual_seed(123)
    loss, pred, mask = model(golden[0]["imgs"], mask_ratio=0.75)

    assert torch.equal(mask, expected["masks"])
    assert loss.item() == pytest.approx(expected[f"{target}.loss"].item(), rel=0, abs=1e-5)
    torch.testing.assert_close(pred[:, ::5], expected["pred_every_5th_token"], rtol=0, atol=1e-5)
    norms = {name: gradient.norm().item() for name, gradient in gradients(model, loss).items()}
    prefix = f"{target}.gradnorm."
    assert norms == pytest.approx(
        {n.removeprefix(prefix): t.item() for n, t in expected.items() if n.startswith(prefix)},
        rel=1e-4,
    )


def test_mask_is_drawn_first_so_that_a_seed_decides_it(golden):
    tensors, _ = golden
    model, imgs = golden_model(golden), tensors["imgs"]
    torch.manual_seed(123)
    drawn = model(imgs)
    torch.manual_seed(123)
    noise = torch.rand(2, 196)
    assert torch.equal(noise, tensors["noise"])
    for a, b in zip(drawn, model(imgs, noise=noise), strict=True):
        assert torch.equal(a, b)


def test_names_and_shapes_of_base_are_the_originals():
    with torch.device("meta"):
        model = MODELS["convmae_convvit_base_patch16"]()
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == expected["convmae_convvit_base_patch16"]


@pytest.mark.parametrize("family", ["convmae", "fastconvmae"])
def test_the_originals_model_name_is_the_base_model(family):
    name = f"{family}_convvit_base_patch16"
    assert MODELS[f"{name}_dec512d8b"] is MODELS[name]


def test_fastconvmae_is_convmae_with_complementary_masks():
    with torch.device("meta"):
        fast, plain = (MODELS[f"{f}convmae_convvit_base_patch16"]() for f in ("fast", ""))
    assert (fast.complementary, plain.complementary) == (True, False)
    assert {n: t.shape for n, t in fast.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }


@pytest.mark.parametrize(
    ("size", "widths", "depths", "heads", "ratios"),
    [
        ("small", [128, 256, 384], [2, 2, 11], 6, [4, 4, 4]),
        ("base", [256, 384, 768], [2, 2, 11], 12, [4, 4, 4]),
        ("large", [384, 768, 1024], [2, 2, 23], 16, [8, 8, 4]),
        ("huge", [768, 1024, 1280], [2, 2, 31], 16, [8, 8, 4]),
    ],
)
def test_sizes_are_the_papers(size, widths, depths, heads, ratios):
    with torch.device("meta"):
        model = MODELS[f"convmae_convvit_{size}_patch16"]()
    stages = [model.blocks1, model.blocks2, model.blocks3]
    assert [len(blocks) for blocks in stages] == depths
    for blocks, width, ratio in zip(stages, widths, ratios, strict=True):
        assert {tuple(b.mlp.fc1.weight.shape[:2]) for b in blocks} == {(width * ratio, width)}
    assert {block.attn.num_heads for block in model.blocks3} == {heads}
    assert model.geometry.grid(3) == (14, 14)
    assert model.decoder_embed.out_features == 512
    assert [block.attn.num_heads for block in model.decoder_blocks] == [16] * 8


def test_a_checkpoint_gives_the_model_that_was_saved_whatever_its_size(tmp_path):
    name = "convmae_convvit_tiny_patch16"
    sizes = dict(embed_dim=(8, 16, 64), depth=(1, 0, 2), num_heads=1, kernel_size=3)
    source = MODELS[name](img_size=(32, 96), in_chans=1, patch_size=(2, 2, 2), **sizes)
    args = {"model": name, "input_size": [32, 96], "num_heads": 1, "norm_pix_loss": True}
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "x.pth")
    model, imgs = convmae_from_checkpoint(tmp_path / "x.pth"), torch.randn(1, 1, 32, 96)
    assert model.norm_pix_loss
    noise = torch.rand(1, source.geometry.num_patches)
    assert torch.equal(model(imgs, noise=noise)[1], source(imgs, noise=noise)[1])


def test_bare_weights_give_the_model_whatever_its_decoder(tmp_path):
    decoder = dict(decoder_embed_dim=96, decoder_depth=3, decoder_num_heads=3, multi_scale=False)
    source = MODELS["convmae_convvit_tiny_patch16"](img_size=32, mlp_ratio=(1.3, 2, 3), **decoder)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model, imgs = convmae_from_checkpoint(tmp_path / "x.pth"), torch.randn(1, 3, 32, 32)
    noise = torch.rand(1, source.geometry.num_patches)
    assert torch.equal(model(imgs, noise=noise)[1], source(imgs, noise=noise)[1])


def test_a_checkpoint_of_videos_is_no_model_of_pictures(tmp_path):
    source = MODELS["convmae_convvit_tiny_patch16"]
    cubes = [(2, 4, 4), (1, 2, 2), (1, 2, 2)]
    torch.save(source(img_size=(4, 32, 32), patch_size=cubes).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth is a model of videos, not of pictures"):
        convmae_from_checkpoint(tmp_path / "x.pth")


def test_a_checkpoint_with_more_than_its_model_has_is_refused(tmp_path):
    name = "convmae_convvit_tiny_patch16"
    state = MODELS[name](img_size=32).state_dict() | {"decoder_more.bias": torch.zeros(3)}
    torch.save({"model": state, "args": {"model": name}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=rf"1 weights that a {name} does not have: decoder_more"):
        convmae_from_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(("size", "hidden"), [("small", 2048), ("base", 2048), ("large", 4096)])
def test_the_decoders_mlp_ratio_is_the_first_stages(size, hidden):
    with torch.device("meta"):
        model = MODELS[f"convmae_convvit_{size}_patch16"]()
    assert {block.mlp.fc1.out_features for block in model.decoder_blocks} == {hidden}


def test_a_factory_takes_any_argument_of_the_model():
    model = MODELS["convmae_convvit_tiny_patch16"](
        img_size=(32, 64), in_chans=1, depth=(1, 0, 2), decoder_depth=1, norm_pix_loss=True
    )
    assert model.geometry.img_size == (32, 64)
    assert (len(model.blocks2), len(model.blocks3), len(model.decoder_blocks)) == (0, 2, 1)
    assert (model.in_chans, model.norm_pix_loss) == (1, True)


# ---- A class token -------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [dict(img_size=(96, 160)), dict(multi_scale=False)])
def test_a_class_token_is_computed_as_in_the_dense_form(geometry):
    model, dense = (m.double() for m in build_with_dense_form(class_token=True, **geometry))
    imgs, noise = inputs(model)
    loss, pred, _ = model(imgs.double(), noise=noise)
    dense_loss, dense_pred, _ = dense(imgs.double(), noise=noise)
    torch.testing.assert_close(pred, dense_pred)
    assert_gradients_close(gradients(model, loss), gradients(dense, dense_loss), 1e-6)


def test_the_encoder_of_a_class_token_is_the_classifiers():
    model = build(class_token=True)
    encoder = {k: TINY[k] for k in ("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    classifier = ConvViT(**encoder, class_token=True, num_classes=0)
    classifier.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n in classifier.state_dict()}, strict=False
    )
    imgs = torch.randn(2, 3, 64, 64)
    tokens = model.forward_visible(imgs, torch.arange(16).expand(2, -1))[-1]
    torch.testing.assert_close(classifier.forward_stages(imgs)[-1], tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("predict_share", [1.0, 0.5])
def test_a_class_token_is_seen_by_every_prediction_and_predicts_nothing(predict_share):
    model = build(class_token=True, mimic_dim=6, complementary=True)
    imgs, noise = inputs(model)
    _, pred, *_ = model(imgs, 0.75, noise, predict_share, torch.zeros(2, 16, 6))
    assert pred.shape[:2] == (8, 16 if predict_share == 1 else 6)
    (by_token,) = torch.autograd.grad(pred.square().sum(), model.cls_token)
    assert by_token.ne(0).all()
    model.cls_token.data += 1
    assert not torch.isclose(model(imgs, 0.75, noise, predict_share)[1], pred).all(-1).any()


def test_rows_of_a_class_token_in_the_tables_are_zero():
    model = MaskedAutoencoderConvViT(**TINY, class_token=True)
    plain = MaskedAutoencoderConvViT(**TINY)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = getattr(model, name)
        assert table[:, 0].eq(0).all() and not table.requires_grad
        assert torch.equal(table[:, 1:], getattr(plain, name))


# ---- Visible-only equals dense -------------------------------------------------------------------


@every_geometry
def test_visible_only_equals_dense(geometry):
    model, dense = (m.double() for m in build_with_dense_form(**geometry))
    imgs, noise = inputs(model)
    _, pred, mask = model(imgs.double(), 0.75, noise)
    _, dense_pred, dense_mask = dense(imgs.double(), 0.75, noise)
    assert torch.equal(mask, dense_mask)
    torch.testing.assert_close(pred, dense_pred, rtol=0, atol=1e-10)
    # Not of the loss, which is in float32 always.
    weight = torch.randn_like(pred)
    grads = gradients(model, (pred * weight).mean())
    dense_grads = gradients(dense, (dense_pred * weight).mean())
    assert_gradients_close(grads, dense_grads, 1e-9)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", ["three conv blocks", "video"])
def test_visible_only_equals_dense_in_float32_at_any_ratio(name, mask_ratio):
    model, dense = build_with_dense_form(**GEOMETRIES[name])
    imgs, noise = inputs(model)
    loss, pred, _ = model(imgs, mask_ratio, noise)
    dense_loss, dense_pred, _ = dense(imgs, mask_ratio, noise)
    torch.testing.assert_close(pred, dense_pred, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, loss), gradients(dense, dense_loss), 1e-4)


def test_autocast_loses_no_more_precision_than_in_the_dense_form():
    model, dense = build_with_dense_form(img_size=128, depth=(2, 2, 2))
    imgs, noise = inputs(model)
    loss, exact, _ = model(imgs, noise=noise)
    exact_grads = gradients(model, loss)

    def errors(network):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, pred, _ = network(imgs, noise=noise)
        assert pred.dtype == torch.bfloat16
        grads = gradients(network, loss)
        difference = sum((grads[n] - g).norm() ** 2 for n, g in exact_grads.items()) ** 0.5
        total = sum(g.norm() ** 2 for g in exact_grads.values()) ** 0.5
        return (pred - exact).norm() / exact.norm(), difference / total

    for ours, reference in zip(errors(model), errors(dense), strict=True):
        assert ours < 1.2 * reference < 0.05


# ---- Nothing leaks -------------------------------------------------------------------------------

FILLS = {
    "noise": lambda imgs: torch.randn_like(imgs),
    "huge": lambda imgs: torch.full_like(imgs, 1e30),
    "inf": lambda imgs: torch.full_like(imgs, torch.inf),
    "nan": lambda imgs: torch.full_like(imgs, torch.nan),
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("name", ["224 pixels", "rectangular patches", "video"])
def test_masked_pixels_do_not_leak(name, fill):
    model = build(**GEOMETRIES[name])
    imgs, noise = inputs(model)
    _, pred, mask = model(imgs, noise=noise)
    changed = torch.where(pixel_mask(model, mask), fill(imgs), imgs)
    assert not torch.equal(changed, imgs)
    assert torch.equal(model(changed, noise=noise)[1], pred)


@pytest.mark.parametrize("name", ["224 pixels", "rectangular patches", "video"])
def test_prediction_has_no_gradient_by_masked_pixels(name):
    model = build(**GEOMETRIES[name])
    imgs, noise = inputs(model)
    _, pred, mask = model(imgs.requires_grad_(), noise=noise)
    (gradient,) = torch.autograd.grad(pred.square().sum(), imgs)
    removed = pixel_mask(model, mask).expand_as(imgs)
    assert gradient[removed].eq(0).all()
    assert gradient[~removed].ne(0).all()


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model = build(depth=(2, 2, 1))
    imgs, noise = inputs(model)
    _, pred, _ = model(imgs, noise=noise)
    other_imgs, other_noise = inputs(model)
    other_imgs[0], other_noise[0] = imgs[0], noise[0]
    _, other_pred, _ = model(other_imgs, noise=other_noise)
    assert torch.equal(other_pred[0], pred[0])
    assert not torch.allclose(other_pred[1], pred[1])


def test_a_batch_equals_its_images_one_by_one():
    model = build(depth=(2, 2, 1))
    imgs, noise = inputs(model)
    _, pred, _ = model(imgs, noise=noise)
    for i in range(2):
        _, alone, _ = model(imgs[i : i + 1], noise=noise[i : i + 1])
        torch.testing.assert_close(alone[0], pred[i], rtol=0, atol=1e-6)


# ---- Patches -------------------------------------------------------------------------------------


def test_patches_are_in_the_order_row_column_channel():
    model = build(img_size=(16, 32), patch_size=(2, 2, 2), in_chans=4)
    imgs = torch.arange(2 * 4 * 16 * 32).view(2, 4, 16, 32)
    patches = model.patchify(imgs)
    assert patches.shape == (2, 2 * 4, 8 * 8 * 4)
    for image, patch_row, patch_column in product(range(2), range(2), range(4)):
        expected = [
            imgs[image, channel, patch_row * 8 + row, patch_column * 8 + column].item()
            for row, column, channel in product(range(8), range(8), range(4))
        ]
        assert patches[image, patch_row * 4 + patch_column].tolist() == expected


@every_geometry
def test_unpatchify_undoes_patchify(geometry):
    model = build(**geometry)
    imgs, _ = inputs(model)
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)


# ---- Masking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.1, 0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("img_size", [64, (96, 160)])
def test_mask_keeps_the_share_that_was_asked_for(img_size, mask_ratio):
    model = build(img_size=img_size)
    length = model.geometry.num_patches
    ids_keep, mask, _ = model.random_masking(torch.zeros(5, 1), mask_ratio)
    kept = int(length * (1 - mask_ratio))
    assert ids_keep.shape == (5, kept)
    assert mask.shape == (5, length)
    assert mask.sum(dim=1).tolist() == [length - kept] * 5


def test_kept_are_the_patches_whose_mask_is_zero():
    model = build()
    ids_keep, mask, _ = model.random_masking(torch.zeros(5, 1), 0.75)
    for image in range(5):
        assert (
            ids_keep[image].sort().values.tolist() == mask[image].eq(0).nonzero().flatten().tolist()
        )
    assert mask.unique(dim=0).shape[0] > 1  # each image has a mask of its own


def test_smallest_noise_stays():
    model = build()
    noise = torch.linspace(1, 0, 16).repeat(2, 1)
    noise[1] = noise[1].flip(0)
    ids_keep, _, _ = model.random_masking(torch.zeros(2, 1), 0.75, noise)
    assert ids_keep.tolist() == [[15, 14, 13, 12], [0, 1, 2, 3]]


def test_restoring_puts_each_kept_patch_back():
    model = build()
    ids_keep, mask, ids_restore = model.random_masking(torch.zeros(5, 1), 0.75)
    shuffled = torch.cat([ids_keep, torch.full((5, 12), -1)], dim=1)
    restored = shuffled.gather(1, ids_restore)
    assert torch.equal(restored, torch.where(mask.bool(), -1, torch.arange(16).expand(5, -1)))


def test_masking_is_uniform():
    draws = 4000
    _, mask, _ = build().random_masking(torch.zeros(draws, 1), 0.75)
    deviation = (0.75 * 0.25 / draws) ** 0.5
    torch.testing.assert_close(
        mask.mean(dim=0), torch.full((16,), 0.75), rtol=0, atol=4 * deviation
    )


@pytest.mark.parametrize(
    ("mask_ratio", "kept"), [(0.0, 16), (1.0, 0), (0.95, 0), (-0.5, 24)], ids=str
)
def test_ratio_that_keeps_nothing_or_everything_is_refused(mask_ratio, kept):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} keeps {kept} of 16 patches"):
        build()(torch.zeros(1, 3, 64, 64), mask_ratio)


# ---- Complementary masks -------------------------------------------------------------------------

# Six tubes of two blocks, of which two are visible at 0.7 (VideoMAE's rounding).
TUBES = {**GEOMETRIES["video"], "mask_unit": (2, 1, 1)}


@pytest.mark.parametrize(
    ("geometry", "mask_ratio", "masks"),
    [
        (dict(img_size=(96, 160)), 0.75, 4),  # 4 sets of 15 of 60 blocks
        (dict(img_size=(96, 160)), 0.6, 2),  # 2 sets of 24, 12 left over
        (dict(img_size=64), 0.4, 1),
        (TUBES, 0.7, 3),
    ],
)
def test_complementary_masks_are_disjoint_sets_of_one_size(geometry, mask_ratio, masks):
    model = build(**geometry, complementary=True)
    ids_keep, mask, _ = model.random_masking(torch.zeros(3, 1), mask_ratio)
    visible = model.geometry.visible_patches(mask_ratio)
    assert ids_keep.shape == (masks * 3, visible)
    assert (1 - mask).sum(1).tolist() == [visible] * masks * 3
    seen = (1 - mask).view(masks, 3, -1).sum(0)  # of each image, in how many masks
    assert seen.max() == 1
    assert seen.sum(1).tolist() == [masks * visible] * 3


@pytest.mark.parametrize(
    ("geometry", "mask_ratio"), [(dict(img_size=(96, 160)), 0.6), (TUBES, 0.7)], ids=["", "tubes"]
)
def test_each_complementary_mask_is_computed_as_convmae_alone(geometry, mask_ratio):
    model = build(**geometry).double()
    imgs, units = torch.randn(2, 3, *model.geometry.img_size).double(), model.geometry
    ranks = torch.rand(2, units.num_mask_units).argsort(1).argsort(1)
    per_unit = units.num_patches // units.num_mask_units
    keep, masks = units.visible_patches(mask_ratio) // per_unit, units.num_masks(mask_ratio)
    alone = [
        model(imgs, mask_ratio, (ranks - k * keep) % units.num_mask_units) for k in range(masks)
    ]
    expected = gradients(model, sum(loss for loss, _, _ in alone) / masks)
    model.complementary = True
    loss, pred, mask = model(imgs, mask_ratio, ranks)
    assert torch.equal(mask, torch.cat([mask for _, _, mask in alone]))
    torch.testing.assert_close(pred, torch.cat([pred for _, pred, _ in alone]))
    assert_gradients_close(gradients(model, loss), expected, 1e-9)


def test_complementary_dense_form_is_the_same():
    model, dense = (m.double() for m in build_with_dense_form(complementary=True))
    imgs, noise = inputs(model)
    results = [m(imgs.double(), noise=noise)[1] for m in (model, dense)]
    torch.testing.assert_close(*results)


# ---- A share of the removed patches --------------------------------------------------------------


def test_predicting_all_is_the_plain_computation_with_the_same_draws():
    model, imgs = build(), torch.randn(2, 3, 64, 64)
    results = []
    for share in ((), (1.0,)):
        torch.manual_seed(5)
        loss, pred, mask = model(imgs, 0.75, None, *share)
        results.append([loss, pred, mask, *gradients(model, loss).values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_predicting_a_share_draws_nothing_more_and_masks_alike():
    model, imgs = build(), torch.randn(2, 3, 64, 64)
    results = []
    for share in (1.0, 0.5):
        torch.manual_seed(5)
        results.append([model(imgs, 0.75, None, share)[2], torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("geometry", "share"),
    [(dict(img_size=(96, 160)), 0.5), (TUBES, 0.3), (dict(complementary=True), 0.7)],
    ids=["image", "clip", "complementary"],
)
def test_the_decoder_sees_visible_and_predicted_patches_alone(geometry, share):
    model = build(**geometry, norm_pix_loss=True).double()
    imgs = torch.randn(2, 3, *model.geometry.img_size).double()
    noise = torch.rand(2, model.geometry.num_mask_units)
    loss, pred, mask = model(imgs, 0.7, noise, share)

    latent, _, ids_restore = model.forward_encoder(imgs, 0.7, noise)
    ids = model.choose_predicted(ids_restore, latent.shape[1], pred.shape[1])
    assert pred.shape[1] == int(mask[0].sum() * share)
    assert mask.gather(1, ids).all()
    # All patches go through the blocks, but none looks at those that are left out.
    tokens = torch.cat(
        [model.decoder_embed(latent), model.mask_token.expand(len(mask), int(mask[0].sum()), -1)],
        dim=1,
    )
    x = tokens.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    x = x + model.decoder_pos_embed
    seen = (mask == 0).scatter(1, ids, True)
    bias = torch.zeros(len(mask), 1, 1, mask.shape[1]).double()
    bias = bias.masked_fill(~seen.view(bias.shape), -torch.inf)
    for block in model.decoder_blocks:
        x = block(x, bias)
    expected = model.decoder_pred(model.decoder_norm(x))
    expected = expected.gather(1, ids.unsqueeze(-1).expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(pred, expected)

    target = torch.cat([model.target(imgs)] * (len(mask) // 2))
    target = target.gather(1, ids.unsqueeze(-1).expand_as(pred))
    torch.testing.assert_close(loss, (expected - target).square().mean().float().to(loss))


def test_predicted_patches_of_a_picture_are_any_of_the_removed():
    model, draws = build(), 4000
    ids_keep, _, ids_restore = model.random_masking(torch.zeros(draws, 1), 0.75)
    ids = model.choose_predicted(ids_restore, ids_keep.shape[1], 6)
    shares = torch.bincount(ids.flatten(), minlength=16) / draws
    deviation = (0.375 * 0.625 / draws) ** 0.5
    torch.testing.assert_close(shares, torch.full((16,), 0.375), rtol=0, atol=4 * deviation)


def test_predicted_patches_of_a_clip_run_through_cells_of_space_and_time():
    clips = dict(img_size=(8, 64, 64), patch_size=GEOMETRIES["video"]["patch_size"])
    model = build(**clips, embed_dim=(8, 8, 12), decoder_embed_dim=12, mask_unit=(4, 1, 1))
    noise = torch.rand(3, 16) + 1
    noise[:, [0, 1, 4, 5]] -= 1  # the cell of the upper left corner is visible
    ids_keep, _, ids_restore = model.random_masking(torch.zeros(3, 1), 0.75, noise)
    ids = model.choose_predicted(ids_restore, ids_keep.shape[1], 24)
    chosen = torch.zeros(3, 64).scatter(1, ids, 1).view(3, 4, 2, 2, 2, 2)  # [N, T, H, 2, W, 2]
    in_cells = chosen.sum((3, 5))  # [N, T, 2, 2]
    assert in_cells[:, :, 0, 0].eq(0).all()
    assert in_cells.flatten(2)[:, :, 1:].eq(2).all()
    steps = chosen[:, :, 1, :, 1].flatten(2)  # the places of one cell, [N, T, 4]
    assert torch.equal(steps[:, 1:], steps[:, :-1].roll(-1, dims=2))


@pytest.mark.parametrize("predict_share", [0, 0.05, 1.1, -0.5])
def test_share_that_predicts_nothing_or_too_much_is_refused(predict_share):
    with pytest.raises(ValueError, match=rf"predict_share {predict_share} predicts .* of 12"):
        build()(torch.zeros(1, 3, 64, 64), 0.75, None, predict_share)


# ---- A teacher's tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("complementary", [False, True])
def test_mimicking_adds_the_error_of_visible_tokens_to_the_loss(complementary):
    model = build(complementary=complementary, mimic_dim=6, mimic_weight=0.3)
    imgs, noise = inputs(model)
    features = torch.randn(2, 16, 6)
    plain, pred, mask = model(imgs, noise=noise)
    loss, mimic_pred, _, parts = model(imgs, noise=noise, features=features)
    assert torch.equal(mimic_pred, pred)

    latent, _, ids_restore = model.forward_encoder(imgs, 0.75, noise)
    errors = []
    for row, tokens in enumerate(model.mimic(latent)):
        for block in mask[row].eq(0).nonzero().flatten():
            place = ids_restore[row, block]
            errors.append((tokens[place] - features[row % 2, block]).square().mean())
    assert len(errors) == 4 * len(mask)
    mimic = sum(errors) / len(errors)
    torch.testing.assert_close(loss, plain + 0.3 * mimic)
    told = {"loss_reconstruction": plain.detach(), "loss_mimic": mimic.detach()}
    torch.testing.assert_close(parts, told)
    assert not any(part.requires_grad for part in parts.values())


def test_only_visible_tokens_are_pulled_and_see_visible_pixels_alone():
    model = build(mimic_dim=6)
    imgs, noise = inputs(model)
    features = torch.randn(2, 16, 6, requires_grad=True)
    latent, mask, ids_restore = model.forward_encoder(imgs.requires_grad_(), 0.75, noise)
    loss = model.mimic_loss(latent, ids_restore, features)
    by_features, by_pixels = torch.autograd.grad(loss, [features, imgs])
    assert torch.equal(by_features.abs().sum(-1) > 0, mask == 0)
    removed = pixel_mask(model, mask).expand_as(imgs)
    assert by_pixels[removed].eq(0).all() and by_pixels[~removed].ne(0).all()


# ---- Loss ----------------------------------------------------------------------------------------


def plain_loss(model, imgs, pred, mask):
    """Patch by patch, over the removed ones only."""
    losses = []
    for image, row, column in product(range(len(imgs)), *map(range, model.geometry.grid(3))):
        patch = row * model.geometry.grid(3)[1] + column
        if mask[image, patch] == 0:
            continue
        rows, columns = (slice(i * 16, i * 16 + 16) for i in (row, column))
        pixels = imgs[image, :, rows, columns].permute(1, 2, 0).flatten().double()
        if model.norm_pix_loss:
            mean = pixels.sum() / pixels.numel()
            variance = (pixels - mean).square().sum() / (pixels.numel() - 1)
            pixels = (pixels - mean) / (variance + 1e-6).sqrt()
        losses.append((pred[image, patch].double() - pixels).square().mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_over_removed_patches(norm_pix_loss):
    model = build(img_size=(48, 64), norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    imgs = 3 * imgs + 1
    loss, pred, mask = model(imgs, noise=noise)
    assert loss.item() == pytest.approx(plain_loss(model, imgs, pred, mask).item(), rel=1e-6)


def test_norm_pix_loss_of_constant_patches_is_finite():
    model = build(norm_pix_loss=True)
    loss, _, _ = model(torch.full((1, 3, 64, 64), 0.5))
    assert loss.isfinite()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_of_half_precision_is_in_float32(norm_pix_loss, autocast):
    model = build(norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    imgs = imgs.bfloat16()
    pred = torch.randn(2, 16, 16 * 16 * 3).bfloat16()
    _, mask, _ = model.random_masking(imgs, 0.75, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model.forward_loss(imgs, pred, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(model, imgs, pred, mask).item(), rel=1e-6)


# ---- Initial values ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return MODELS["convmae_convvit_tiny_patch16"](img_size=64)


def assert_uniform(weight, bound):
    """The values fill the interval from `-bound` to `bound` evenly."""
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_linear_maps_start_xavier_uniform_without_bias(fresh):
    linears = {n: m for n, m in fresh.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {"patch_embed4", "blocks3.0.attn.qkv", "decoder_embed", "decoder_pred"} <= linears.keys()
    for linear in linears.values():
        assert_uniform(linear.weight, (6 / sum(linear.weight.shape)) ** 0.5)
        assert linear.bias.eq(0).all()


def test_last_patch_embedding_starts_xavier_uniform_on_the_flat_kernel(fresh):
    weight = fresh.patch_embed3.proj.weight.flatten(1)
    assert_uniform(weight, (6 / sum(weight.shape)) ** 0.5)


@pytest.mark.parametrize(
    "name", ["patch_embed1.proj", "patch_embed2.proj", "blocks1.0.conv1", "stage1_output_decode"]
)
def test_other_convolutions_start_as_the_framework_does(fresh, name):
    weight = fresh.get_submodule(name).weight.flatten(1)
    assert_uniform(weight, weight.shape[1] ** -0.5)


def test_norms_start_as_the_identity(fresh):
    norms = [m for m in fresh.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in norms)
    assert len(norms) == 3 + 2 * (1 + 1 + 4) + 1 + 2 * 2 + 1


def test_mask_token_starts_normal_with_deviation_0_02():
    model = MaskedAutoencoderConvViT(**TINY | {"decoder_embed_dim": 4096, "decoder_depth": 0})
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(model.mask_token.mean().item()) < 0.001
    assert model.mask_token.abs().max() > 0.05  # not uniform


@pytest.mark.parametrize("img_size", [64, (32, 96)])
def test_position_tables_are_sine_cosine_and_fixed(img_size):
    model = MaskedAutoencoderConvViT(**TINY | {"img_size": img_size, "decoder_embed_dim": 32})
    for table, width in ((model.pos_embed, 16), (model.decoder_pos_embed, 32)):
        expected = torch.from_numpy(get_sincos_pos_embed(width, model.geometry.grid(3)))
        assert torch.equal(table[0], expected.float())
        assert not table.requires_grad


# ---- Bad use -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(img_size=100), "100x100 is not divisible by the patch of 16x16 pixels"),
        (dict(patch_size=(4, 4)), r"patch_size \(4, 4\) .* three entries"),
        (dict(embed_dim=(8, 16)), r"embed_dim \(8, 16\) must have three entries"),
        (dict(num_heads=3), "width 16 is not divisible by 3 heads"),
        (dict(decoder_num_heads=5), "embed_dim 16 is not divisible by decoder_num_heads 5"),
        (dict(embed_dim=(8, 8, 18)), "multiple of 4, not 18"),
        (dict(decoder_embed_dim=22), "multiple of 4, not 22"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoderConvViT(**TINY | kwargs)


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (2, 1, 64, 64), (3, 64, 64), (2, 3, 64, 64, 1)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as error:
        build()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "[N, 3, 64, 64]" in str(error.value)


# ---- Training ------------------------------------------------------------------------------------


@every_geometry
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_every_trainable_parameter_gets_a_gradient(geometry, norm_pix_loss):
    model = build(**geometry, norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    model(imgs, noise=noise)[0].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    zero = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert (without, zero) == ([], [])


@pytest.mark.parametrize("name", ["three conv blocks", "video"])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(name):
    model = build(**GEOMETRIES[name] | {"depth": (2, 2, 6), "decoder_depth": 6})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    imgs, noise = inputs(model)
    results, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.nbytes * (tensor.untyped_storage().data_ptr() not in own)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(imgs, noise=noise)[0]
        results.append(gradients(model, loss))
    assert all(map(torch.equal, *(result.values() for result in results)))
    assert kept[1] < 0.7 * kept[0]


def has_compiler():
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()


@pytest.fixture
def compiled():
    """Compile a model, all of it in one graph."""
    torch.compiler.reset()
    yield partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


def assert_compiled_equals_eager(compiled_model, model):
    imgs, noise = inputs(model)
    loss, pred, mask = model(imgs, noise=noise)
    compiled_loss, compiled_pred, compiled_mask = compiled_model(imgs, noise=noise)
    assert torch.equal(compiled_mask, mask)
    torch.testing.assert_close(compiled_pred, pred, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, compiled_loss), gradients(model, loss), 1e-4)


@pytest.mark.parametrize("name", ["rectangular patches", "video"])
def test_the_whole_model_is_one_graph(compiled, name):
    model = build(**GEOMETRIES[name])
    assert_compiled_equals_eager(compiled(model, backend="aot_eager"), model)


def test_complementary_masks_and_a_share_to_predict_are_one_graph(compiled):
    model = build(**TUBES, complementary=True)
    imgs, args = torch.randn(2, 3, *model.geometry.img_size), (0.7, torch.rand(2, 6), 0.5)
    loss, pred, _ = model(imgs, *args)
    other_loss, other_pred, _ = compiled(model, backend="aot_eager")(imgs, *args)
    torch.testing.assert_close(other_pred, pred, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, other_loss), gradients(model, loss), 1e-4)


def test_a_model_that_recomputes_activations_is_one_graph(compiled):
    model = build()
    model.set_grad_checkpointing()
    assert_compiled_equals_eager(compiled(model, backend="aot_eager"), model)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler and Python's headers")
def test_compiled_masked_convolutions_equal_eager_ones(compiled):
    # Generating and compiling C++ is slow: what is this project's own, not the whole model.
    model = build(depth=(1, 1, 1))
    imgs, noise = inputs(model)
    ids_keep, _, _ = model.random_masking(imgs, 0.75, noise)

    def stage1(imgs):
        x = model.patch_embed1(model.under_patches(model.visible_blocks(imgs, ids_keep), 1))
        return model.blocks1[0](x, model.visible_grid(ids_keep, 1))

    parameters = [*model.patch_embed1.parameters(), *model.blocks1.parameters()]
    actual, expected = compiled(stage1)(imgs), stage1(imgs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_under_autocast_on_cuda_is_near_float32(compiled, dtype):
    model = build(img_size=128, depth=(2, 2, 2)).cuda()
    imgs, noise = (x.cuda() for x in inputs(model))
    loss, pred, mask = model(imgs, noise=noise)
    with torch.autocast("cuda", dtype=dtype):
        half_loss, half_pred, half_mask = compiled(model)(imgs, noise=noise)
    assert half_pred.dtype == dtype
    assert half_loss.dtype == torch.float32
    assert torch.equal(half_mask, mask)
    assert (half_pred - pred).norm() < 0.05 * pred.norm()
    expected, grads = gradients(model, loss), gradients(model, half_loss * 1024)
    difference = sum((grads[n] / 1024 - g).norm() ** 2 for n, g in expected.items()) ** 0.5
    assert difference < 0.05 * sum(g.norm() ** 2 for g in expected.values()) ** 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_equals_cpu():
    model = build(img_size=128, depth=(2, 2, 2)).double()
    imgs, noise = inputs(model)
    _, pred, mask = model(imgs.double(), noise=noise)
    weight = torch.randn_like(pred)
    expected = gradients(model, (pred * weight).mean())
    model.cuda()
    _, cuda_pred, cuda_mask = model(imgs.double().cuda(), noise=noise.cuda())
    grads = gradients(model, (cuda_pred * weight.cuda()).mean())
    assert torch.equal(cuda_mask.cpu(), mask)
    torch.testing.assert_close(cuda_pred.cpu(), pred, rtol=0, atol=1e-10)
    assert_gradients_close({n: g.cpu() for n, g in grads.items()}, expected, 1e-9)


# ---- Values without data -------------------------------------------------------------------------


def loss_and_gradients(model, imgs, noise, **options):
    model.zero_grad()
    loss = model(imgs, noise=noise, **options)[0]
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_with_all_values_valid_the_loss_is_bit_for_bit_that_without(norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    plain = loss_and_gradients(model, imgs, noise)
    valid = loss_and_gradients(model, imgs, noise, valid=torch.ones_like(imgs, dtype=torch.bool))
    assert torch.equal(plain[0], valid[0])
    assert all(torch.equal(valid[1][name], gradient) for name, gradient in plain[1].items())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_invalid_values_take_no_part_in_the_loss(norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    imgs, noise = inputs(model)
    pred = torch.randn(2, 16, 16 * 16 * 3)
    _, mask, _ = model.random_masking(imgs, 0.75, noise)
    valid = torch.rand(imgs.shape) < 0.7
    valid[:, :, :20, :20] = False  # one patch and parts of others
    losses = [
        model.forward_loss(torch.where(valid, imgs, other), pred, mask, valid=valid)
        for other in (0.0, 1e3)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)

    errors, count = 0.0, 0
    patches, kept = model.patchify(imgs), model.patchify(valid.float()).bool()
    for n, p in mask.nonzero().tolist():
        target = patches[n, p][kept[n, p]].double()
        if norm_pix_loss and len(target):
            target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
        errors += ((pred[n, p][kept[n, p]] - target) ** 2).sum().item()
        count += len(target)
    assert losses[0].item() == pytest.approx(errors / count, rel=1e-5)


@pytest.mark.parametrize("predict_share", [1.0, 0.5])
def test_valid_values_are_those_of_the_patches_that_are_predicted(predict_share):
    model = build(complementary=True)
    imgs, noise = inputs(model)
    valid = torch.ones_like(imgs).bool()
    plain = model(imgs, 0.7, noise, predict_share)[0]
    assert torch.equal(model(imgs, 0.7, noise, predict_share, valid=valid)[0], plain)
    # Without the first image only the second's errors count, in all masks.
    valid[0] = False
    alone = model(imgs[1:], 0.7, noise[1:], predict_share)[0]
    loss = model(imgs, 0.7, noise, predict_share, valid=valid)[0]
    torch.testing.assert_close(loss, alone)


def test_a_batch_without_any_data_has_no_loss_and_a_finite_gradient():
    model = build(norm_pix_loss=True)
    imgs = torch.zeros(2, 3, 64, 64)
    noise = torch.rand(2, 16)
    loss, gradients = loss_and_gradients(model, imgs, noise, valid=torch.zeros_like(imgs).bool())
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients.values())
