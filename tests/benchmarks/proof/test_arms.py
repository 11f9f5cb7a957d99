import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from benchmarks.proof.arms import ARMS, CLAIMS, plain_state
from models_convvit import LAYER_NORM

SMALL = dict(
    img_size=(16, 24),
    patch_size=((2, 2), (2, 2), (1, 1)),
    embed_dim=(8, 8, 16),
    depth=(1, 1, 1),
    num_heads=2,
    mlp_ratio=(2, 2, 2),
    norm_pix_loss=True,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(name):
    """The model of an arm, every parameter moved from its initial value."""
    model = ARMS[name].factory("tiny")(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def changed_where(imgs, removed):
    """Images `[N, C, H, W]` with other pixels where `removed`, 0 or 1 of some grid, is 1."""
    pixels = F.interpolate(removed.float(), imgs.shape[2:], mode="nearest-exact").bool()
    return torch.where(pixels, torch.randn_like(imgs), imgs)


def latents(model, change):
    """The decoder's inputs of images, and of the same with all removed pixels changed."""
    imgs = torch.randn(2, 3, *SMALL["img_size"])
    noise = torch.rand(2, math.prod(model.geometry.grid(1 if change == "grid1" else 3)))
    latent, mask, _ = model.forward_encoder(imgs, 0.75, noise)
    removed = mask.view(2, 1, *model.geometry.grid(1 if change == "grid1" else 3))
    return latent, model.forward_encoder(changed_where(imgs, removed), 0.75, noise)[0]


def test_without_masked_convolution_visible_tokens_change_with_removed_pixels():
    before, after = latents(build("leaky"), "grid3")
    assert (before - after).abs().amax(-1).gt(1e-3).all()


def test_masked_convolution_is_what_the_leaky_arm_lacks():
    model = build("leaky")
    model.__class__ = model.__class__.__base__  # the dense ConvMAE
    before, after = latents(model, "grid3")
    assert torch.equal(before, after)


def test_masks_of_stage_1_keep_all_of_stage_3():
    model = build("stage1_masks")
    latent, mask, _ = model.forward_encoder(torch.randn(2, 3, *SMALL["img_size"]), 0.75)
    assert latent.shape[1] == model.geometry.num_patches
    assert mask.shape == (2, 1, *model.geometry.grid(1))
    assert mask.mean() == 0.75


def test_masks_of_stage_1_do_not_leak():
    before, after = latents(build("stage1_masks"), "grid1")
    assert torch.equal(before, after)


def test_masks_of_stage_1_that_remove_nothing_give_the_models_own_encoding():
    model, imgs = build("stage1_masks"), torch.randn(2, 3, *SMALL["img_size"])
    everything = torch.arange(model.geometry.num_patches).expand(2, -1)
    stage1, stage2, x = model.forward_visible(imgs, everything)
    x = x + model.stage1_output_decode(stage1) + model.stage2_output_decode(stage2)
    torch.testing.assert_close(model.forward_encoder(imgs, 0.0)[0], model.norm(x))


def test_the_loss_of_stage_1_masks_is_of_the_removed_pixels():
    model, imgs = build("stage1_masks"), torch.randn(1, 3, *SMALL["img_size"])
    _, pred, mask = model(imgs)
    picture = model.unpatchify(pred)
    visible = changed_where(picture, 1 - mask)
    removed = changed_where(picture, mask)
    loss = model.forward_loss(imgs, pred, mask)
    assert torch.equal(model.forward_loss(imgs, model.patchify(visible), mask), loss)
    assert model.forward_loss(imgs, model.patchify(removed), mask) != loss


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.pretrained])
def test_every_pretrained_arm_learns_from_the_engines_noise(name):
    model = build(name)
    noise = torch.rand(2, model.geometry.num_mask_units)
    model(torch.randn(2, 3, *SMALL["img_size"]), 0.75, noise)[0].backward()
    named = model.named_parameters()
    still = {n for n, p in named if p.requires_grad and (p.grad is None or not p.grad.any())}
    # Every block is visible under masks of stage 1: the decoder needs no token for removed ones.
    assert still == ({"mask_token"} if name == "stage1_masks" else set())


def test_the_plain_mae_has_the_width_depth_tokens_and_decoder_of_convmae():
    convmae, plain = build("convmae"), build("mae")
    assert plain.norm.normalized_shape == convmae.norm.normalized_shape
    assert len(plain.blocks) == len(convmae.blocks3) + 1
    assert plain.geometry.num_patches == convmae.geometry.num_patches
    assert plain.decoder_pred.weight.shape == convmae.decoder_pred.weight.shape
    assert len(plain.decoder_blocks) == len(convmae.decoder_blocks)


def test_timms_vit_with_a_plain_maes_weights_encodes_as_it_does():
    model, imgs = build("mae"), torch.randn(2, 3, *SMALL["img_size"])
    vit = VisionTransformer(
        img_size=SMALL["img_size"], patch_size=4, embed_dim=16, depth=2, num_heads=2,
        num_classes=0, global_pool="avg", norm_layer=LAYER_NORM,
    )  # fmt: skip
    state = plain_state(model.state_dict(), model.geometry.grid(3))
    vit.load_state_dict(state | vit.fc_norm.state_dict(prefix="fc_norm."))
    patches = model.patch_embed(imgs).flatten(2).transpose(1, 2) + model.pos_embed
    expected = model.blocks(torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1))
    torch.testing.assert_close(vit.forward_features(imgs), expected)


def test_every_claim_compares_arms_that_there_are():
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} <= ARMS.keys()
