"""The image classes on videos: masks, exactness, inflation; the factories."""

import math
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.reference import DenseMaskedAutoencoder
from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from tests.test_models_convmae import assert_gradients_close, gradients, pixel_mask
from util.errors import UsageError
from util.layers.geometry import Geometry
from util.layers.pos_embed import get_sincos_pos_embed, resize_pos_embed
from util.weights.inflate import inflate_weights
from util.weights.load import load_weights
from util.weights.read import Weights
from VideoConvMAE.models import CLASSIFIERS, MODELS, mask_unit

PATCH = ((2, 4, 4), (1, 2, 2), (1, 2, 2))
SIZES = dict(embed_dim=(6, 6, 12), depth=(2, 1, 2), num_heads=2, mlp_ratio=(2, 3, 4))
TINY = dict(
    img_size=(8, 48, 64), patch_size=PATCH, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, **SIZES,
)  # fmt: skip
SIZE_NAMES = ("tiny", "small", "base", "large", "huge")
# Width and heads: VideoMAE's of small, base and large.
DECODERS = dict(tiny=(64, 2), small=(192, 3), base=(384, 6), large=(512, 8), huge=(640, 8))
MILLIONS = dict(tiny=1, small=23, base=86, large=324, huge=682)  # parameters, 400 classes
MASKINGS = {"tube": (4, 1, 1), "random": (1, 1, 1), "larger units": (2, 1, 2)}
every_masking = pytest.mark.parametrize("unit", MASKINGS.values(), ids=MASKINGS)


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


def inputs(model, number=2):
    """Clips and the noise that decides their mask."""
    clips = torch.randn(number, model.in_chans, *model.geometry.img_size)
    return clips, torch.rand(number, model.geometry.num_mask_units)


# ---- Visible-only equals dense -------------------------------------------------------------------


@every_masking
@pytest.mark.parametrize("multi_scale", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.9])
def test_visible_only_equals_dense(unit, multi_scale, mask_ratio):
    kwargs = dict(mask_unit=unit, multi_scale=multi_scale)
    model, dense = build(**kwargs), DenseMaskedAutoencoder(**TINY | kwargs)
    dense.load_state_dict(model.state_dict())
    clips, noise = inputs(model)
    loss, pred, mask = model(clips, mask_ratio, noise)
    dense_loss, dense_pred, dense_mask = dense(clips, mask_ratio, noise)
    assert torch.equal(mask, dense_mask)
    torch.testing.assert_close(pred, dense_pred, rtol=0, atol=1e-5)
    assert_gradients_close(gradients(model, loss), gradients(dense, dense_loss), 1e-4)


@pytest.mark.parametrize(("temporal_kernel", "kernel_size"), [(1, 5), (3, 5), (5, 5), (3, 3)])
def test_visible_only_equals_dense_with_every_extent(temporal_kernel, kernel_size):
    kernel = dict(temporal_kernel=temporal_kernel, kernel_size=kernel_size)
    kwargs = dict(mask_unit=(4, 1, 1), **kernel)
    model = build(**kwargs).double()
    dense = DenseMaskedAutoencoder(**TINY | kwargs).double()
    dense.load_state_dict(model.state_dict())
    clips, noise = inputs(model)
    pred, dense_pred = (m(clips.double(), 0.5, noise)[1] for m in (model, dense))
    torch.testing.assert_close(pred, dense_pred, rtol=0, atol=1e-10)
    weight = torch.randn_like(pred)
    grads = [gradients(m, (p * weight).mean()) for m, p in ((model, pred), (dense, dense_pred))]
    assert_gradients_close(*grads, 1e-9)
    assert model.blocks1[0].attn.weight.shape[2:] == (temporal_kernel, kernel_size, kernel_size)


# ---- Nothing leaks -------------------------------------------------------------------------------


@every_masking
@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_masked_cubes_do_not_leak_through_time_or_space(unit, value):
    model = build(mask_unit=unit)
    clips, noise = inputs(model)
    _, pred, mask = model(clips, 0.5, noise)
    changed = clips.masked_fill(pixel_mask(model, mask), value)
    assert torch.equal(model(changed, 0.5, noise)[1], pred)


@every_masking
def test_prediction_has_no_gradient_by_masked_cubes(unit):
    model = build(mask_unit=unit)
    clips, noise = inputs(model)
    _, pred, mask = model(clips.requires_grad_(), 0.5, noise)
    (gradient,) = torch.autograd.grad(pred.square().sum(), clips)
    removed = pixel_mask(model, mask).expand_as(clips)
    assert gradient[removed].eq(0).all()
    assert gradient[~removed].ne(0).all()


# ---- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_tubes_are_the_same_over_all_frames_and_exact_in_count(mask_ratio):
    model = build(mask_unit=(4, 1, 1))
    ids_keep, mask, _ = model.random_masking(torch.zeros(5, 1), mask_ratio)
    frames = mask.view(5, 4, 3, 4)
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    kept = 12 - int(12 * mask_ratio)  # as VideoMAE rounds
    assert frames.sum(dim=(2, 3)).tolist() == [[12 - kept] * 4] * 5
    assert ids_keep.shape == (5, 4 * kept) == (5, model.geometry.visible_patches(mask_ratio))
    assert frames[:, 0].unique(dim=0).shape[0] > 1  # each clip has a mask of its own


def test_random_masks_differ_between_frames():
    model = build()
    _, mask, _ = model.random_masking(torch.zeros(5, 1), 0.9)
    frames = mask.view(5, 4, 12)
    assert mask.sum(dim=1).tolist() == [int(0.9 * 48)] * 5
    assert not torch.equal(frames, frames[:, :1].expand_as(frames))


@every_masking
def test_kept_are_the_cubes_whose_mask_is_zero_and_restoring_puts_them_back(unit):
    model = build(mask_unit=unit)
    ids_keep, mask, ids_restore = model.random_masking(torch.zeros(3, 1), 0.5)
    removed = torch.full((3, 48 - ids_keep.shape[1]), -1)
    restored = torch.cat([ids_keep, removed], dim=1).gather(1, ids_restore)
    assert torch.equal(restored, torch.where(mask.bool(), -1, torch.arange(48).expand(3, -1)))


def test_units_with_the_smallest_noise_stay():
    model = build(mask_unit=(4, 1, 1))
    noise = torch.linspace(1, 0, 12).unsqueeze(0)
    ids_keep, _, _ = model.random_masking(torch.zeros(1, 1), 0.84, noise)
    assert ids_keep.tolist() == [[11, 23, 35, 47, 10, 22, 34, 46]]


@pytest.mark.parametrize("unit", [(3, 1, 1), (4, 1), (0, 1, 1)])
def test_a_mask_unit_that_does_not_fit_is_refused(unit):
    with pytest.raises(ValueError, match=r"mask_unit .* does not divide the grid of 4x3x4 tokens"):
        Geometry.of((8, 48, 64), PATCH, unit)


def test_a_ratio_that_leaves_no_tube_is_refused_with_the_numbers():
    model = build(mask_unit=(4, 1, 1))
    with pytest.raises(ValueError, match=r"mask_ratio 1.0 keeps 0 of 12 mask units"):
        model(torch.zeros(1, 3, 8, 48, 64), 1.0)
    with pytest.raises(ValueError, match=r"mask_ratio 0.05 keeps 12 of 12 mask units"):
        model(torch.zeros(1, 3, 8, 48, 64), 0.05)


def test_an_even_temporal_extent_is_refused():
    with pytest.raises(ValueError, match="temporal_kernel 4 must be odd"):
        build(temporal_kernel=4)
    with pytest.raises(ValueError, match="kernel_size 4 must be odd"):
        build(kernel_size=4)


# ---- Targets -------------------------------------------------------------------------------------


def test_patches_are_cubes_in_the_order_frame_row_column_channel():
    model = build()
    clips = torch.arange(3 * 8 * 48 * 64).view(1, 3, 8, 48, 64)
    patches = model.patchify(clips)
    assert patches.shape == (1, 48, 2 * 16 * 16 * 3)
    cube = clips[0, :, 2:4, 16:32, 48:64]  # of the token at (1, 1, 3)
    assert torch.equal(patches[0, 12 + 4 + 3], cube.permute(1, 2, 3, 0).flatten())
    assert torch.equal(model.unpatchify(patches), clips)


def test_normalised_target_is_each_cubes():
    model = build(norm_pix_loss=True, mask_unit=(4, 1, 1))
    clips, noise = inputs(model)
    loss, pred, mask = model(clips, 0.5, noise)
    cubes = model.patchify(clips)[mask.bool()]
    normal = (cubes - cubes.mean(1, keepdim=True)) / (cubes.var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, (pred[mask.bool()] - normal).square().mean())


# ---- Position embeddings -------------------------------------------------------------------------


def test_the_autoencoders_tables_are_fixed_and_tell_time_row_and_column():
    model = MaskedAutoencoderConvViT(**TINY)
    for table in (model.pos_embed, model.decoder_pos_embed):
        assert not table.requires_grad
        expected = torch.from_numpy(get_sincos_pos_embed(12, (4, 3, 4))).float()
        torch.testing.assert_close(table[0], expected)
        assert table[0].unique(dim=0).shape[0] == 48


def test_a_table_is_resized_bicubic_in_space_and_linear_in_time():
    table = torch.randn(1, 4 * 6 * 6, 5)
    in_space = resize_pos_embed(table, (4, 6, 6), (4, 3, 9))
    for frame in range(4):
        alone = resize_pos_embed(table.view(4, 36, 5)[frame, None], (6, 6), (3, 9))
        torch.testing.assert_close(in_space.view(4, 27, 5)[frame], alone[0])
    in_time = resize_pos_embed(table, (4, 6, 6), (2, 6, 6)).view(2, 36, 5)
    torch.testing.assert_close(in_time, table.view(2, 2, 36, 5).mean(dim=1))


def test_a_table_keeps_its_prefix_and_one_of_the_same_size_keeps_every_bit():
    table = torch.randn(1, 1 + 4 * 6 * 6, 5)
    assert torch.equal(resize_pos_embed(table, (4, 6, 6), (4, 6, 6), 1), table)
    resized = resize_pos_embed(table, (4, 6, 6), (8, 4, 4), 1)
    assert resized.shape == (1, 1 + 8 * 4 * 4, 5)
    assert torch.equal(resized[:, 0], table[:, 0])


def test_a_classifier_takes_longer_and_larger_clips():
    model = ConvViT(img_size=(8, 48, 64), patch_size=PATCH, num_classes=3, **SIZES).eval()
    assert model(torch.randn(1, 3, 16, 64, 32)).shape == (1, 3)


# ---- Weights from pictures -----------------------------------------------------------------------


def weights_of(model, **info):
    return Weights(Path("file.pth"), model.state_dict(), info)


def image_classifier(num_classes=3):
    model = ConvViT(img_size=(48, 64), num_classes=num_classes, **SIZES).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def inflated_classifier(image, how):
    video = ConvViT(
        img_size=(8, 48, 64), patch_size=PATCH, num_classes=image.num_classes, **SIZES
    ).eval()
    weights = weights_of(image, args={"input_size": [48, 64]})
    load_weights(video, inflate_weights(weights, video, how))
    return video


def still(pictures):
    """`[N, C, H, W]` to the video `[N, C, 8, H, W]` of 8 equal frames."""
    return pictures.unsqueeze(2).expand(-1, -1, 8, -1, -1)


def test_centre_inflation_gives_a_still_video_the_pictures_logits():
    image, pictures = image_classifier(), torch.randn(2, 3, 48, 64)
    video = inflated_classifier(image, "center")
    torch.testing.assert_close(video(still(pictures)), image(pictures), rtol=0, atol=1e-5)


def test_average_inflation_agrees_away_from_the_first_and_last_frames():
    image, pictures = image_classifier(), torch.randn(2, 3, 48, 64)
    video = inflated_classifier(image, "average")
    expected = image.forward_stages(pictures)
    longer = video.forward_stages(pictures.unsqueeze(2).expand(-1, -1, 16, -1, -1))
    # Two blocks of stage 1 and one of stage 2, each of 3 frames, see 3 of the 8 positions away.
    torch.testing.assert_close(longer[0][:, 3], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(longer[1][:, 4], expected[1], rtol=0, atol=1e-5)
    assert not torch.allclose(longer[0][:, 0], expected[0], atol=1e-3)


def test_a_picture_encoder_starts_a_video_autoencoder_with_its_own_fixed_positions():
    image = MaskedAutoencoderConvViT(
        img_size=48, decoder_embed_dim=12, decoder_num_heads=2, **SIZES
    )
    video = build()
    positions = video.pos_embed.clone()
    inflated = inflate_weights(weights_of(image), video, "center")
    report = load_weights(video, inflated, new=("pos_embed", "decoder_*", "mask_token", "stage*"))
    assert torch.equal(video.pos_embed, positions)
    kernel = torch.zeros_like(video.patch_embed1.proj.weight)
    kernel[:, :, 1] = image.patch_embed1.proj.weight
    assert torch.equal(video.patch_embed1.proj.weight, kernel)
    assert torch.equal(video.blocks3[1].mlp.fc1.weight, image.blocks3[1].mlp.fc1.weight)
    assert report.unexpected == []


def test_inflated_weights_have_the_architecture_of_the_pictures_with_time():
    image = image_classifier()
    video = ConvViT(img_size=(16, 48, 64), patch_size=PATCH, temporal_kernel=5, **SIZES)
    inflated = inflate_weights(weights_of(image), video, "center")
    assert inflated.architecture.geometry == video.geometry
    assert inflated.architecture.temporal_kernel == 5
    assert inflated.state["pos_embed"].shape == video.pos_embed.shape


def test_a_picture_checkpoint_of_another_size_is_inflated_and_resized():
    larger = ConvViT(img_size=(16, 64, 64), patch_size=PATCH, num_classes=3, **SIZES)
    report = load_weights(larger, inflate_weights(weights_of(image_classifier()), larger, "center"))
    assert report.resized == ["pos_embed (8x3x4 to 8x4x4)"]


def test_a_video_models_weights_need_no_inflation():
    with pytest.raises(UsageError, match="no image model's"):
        inflate_weights(weights_of(build()), build(), "center")


def test_a_video_checkpoint_of_another_length_and_size_is_resized():
    model = ConvViT(img_size=(8, 48, 64), patch_size=PATCH, num_classes=3, **SIZES)
    larger = ConvViT(img_size=(16, 64, 64), patch_size=PATCH, num_classes=3, **SIZES)
    report = load_weights(larger, weights_of(model, args={"num_frames": 8, "input_size": [48, 64]}))
    assert report.resized == ["pos_embed (4x3x4 to 8x4x4)"]
    assert torch.equal(larger.pos_embed, resize_pos_embed(model.pos_embed, (4, 3, 4), (8, 4, 4)))


# ---- Factories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZE_NAMES)
def test_factories_have_the_papers_geometry_decoder_and_masking(size):
    with torch.device("meta"):
        plain, fused = (MODELS[f"videoconvmae_{size}_patch16{msd}"]() for msd in ("", "_msd"))
    assert plain.geometry == fused.geometry
    assert plain.geometry.img_size == (16, 224, 224)
    assert plain.geometry.grid(3) == (8, 14, 14)
    assert plain.geometry.visible_patches(0.9) == 8 * 20  # VideoMAE: 20 of 196 tubes
    decoder = DECODERS[size]
    assert (plain.decoder_embed.out_features, plain.decoder_blocks[0].attn.num_heads) == decoder
    assert plain.decoder_pred.out_features == 2 * 16 * 16 * 3
    fusion = {"stage1_output_decode", "stage2_output_decode"}
    names = {name.split(".")[0] for name in fused.state_dict().keys() - plain.state_dict().keys()}
    assert names == fusion
    assert len(plain.decoder_blocks) == {"tiny": 2, "large": 12, "huge": 12}.get(size, 4)


@pytest.mark.parametrize(("size", "millions"), MILLIONS.items())
def test_timm_creates_classifiers_of_their_size_with_a_kinetics_head(size, millions):
    with torch.device("meta"):
        model = timm.create_model(f"videoconvvit_{size}_patch16", num_classes=400)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.geometry.img_size == (16, 224, 224)


def test_timm_makes_a_feature_extractor_of_clips():
    model = timm.create_model("videoconvvit_tiny_patch16", features_only=True, img_size=(4, 32, 32))
    maps = model(torch.randn(1, 3, 4, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 2, 8, 8), (64, 2, 4, 4), (128, 2, 2, 2)]
    assert model.feature_info.channels() == [32, 64, 128]


@pytest.mark.parametrize("size", SIZE_NAMES)
def test_a_classifier_has_the_encoder_of_its_autoencoder(size):
    with torch.device("meta"):
        encoder = CLASSIFIERS[f"videoconvvit_{size}_patch16"](num_classes=0).state_dict()
        whole = MODELS[f"videoconvmae_{size}_patch16"]().state_dict()
    own = {n: t.shape for n, t in encoder.items() if not n.startswith("fc_norm")}
    assert own.items() <= {n: t.shape for n, t in whole.items()}.items()


def test_masking_is_an_argument():
    size = dict(img_size=(4, 32, 32))
    assert MODELS["videoconvmae_tiny_patch16"](**size).geometry.mask_unit == (2, 1, 1)
    random = MODELS["videoconvmae_tiny_patch16"](masking="random", **size)
    assert random.geometry.mask_unit == (1, 1, 1)
    with pytest.raises(ValueError, match="masking 'tubes' must be one of tube, random"):
        mask_unit(random.geometry, "tubes")
