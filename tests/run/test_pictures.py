import json

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from sklearn.metrics import mean_squared_error

from models_convmae import MaskedAutoencoderConvViT
from util.data.transforms import channel_stats, denormalize
from util.errors import UsageError
from util.run.pictures import (
    GRAY,
    captioned,
    draw_images,
    load_images,
    load_samples,
    reconstruct,
    save_loss_curve,
    stretched,
    triples_grid,
)
from util.run.resume import random_state

SIZE = (16, 24)  # 4 x 6 patches of 4 x 4 pixels


def model_of(kind=MaskedAutoencoderConvViT, **kwargs):
    torch.manual_seed(0)
    sizes = dict(embed_dim=(4, 4, 8), depth=(1, 1, 1), num_heads=2)
    decoder = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    return kind(**{"img_size": SIZE, "patch_size": (2, 2, 1), **sizes, **decoder, **kwargs})


class Oracle(MaskedAutoencoderConvViT):
    """Predicts its target without an error where patches are removed, and nonsense elsewhere."""

    no_data = None  # `[N, C, *img_size]`, True there

    def forward(self, imgs, mask_ratio, noise):
        assert imgs.isfinite().all()
        _, mask, _ = self.random_masking(imgs, mask_ratio, noise)
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            data = torch.ones_like(imgs) if self.no_data is None else ~self.no_data
            pairs = zip(target.flatten(0, 1), self.patchify(data).flatten(0, 1).bool(), strict=True)
            moments = [(p, p[kept].mean(), p[kept].var()) for p, kept in pairs]
            target = torch.stack(
                [(p - mean) / (var + 1e-6).sqrt() for p, mean, var in moments]
            ).view_as(target)
        pred = torch.where(mask.unsqueeze(-1) > 0, target, 1e3)
        return self.forward_loss(imgs, pred, mask), pred, mask


def test_of_complementary_masks_the_first_is_drawn():
    model, imgs = model_of(), pictures()
    expected = reconstruct(model, imgs, 0.75)
    model.complementary = True
    again = reconstruct(model, imgs, 0.75)
    torch.testing.assert_close(again.filled, expected.filled)


def pictures(number=2, in_chans=3, size=SIZE):
    """Normalised images whose pixels fill [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in channel_stats(in_chans))
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(number, in_chans, *size, generator=generator) - mean) / std


def removed_pixels(model, imgs, seed=0):
    """`[N, 1, H, W]`, of the mask that `reconstruct` draws."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(imgs), model.geometry.num_patches, generator=generator)
    _, mask, _ = model.random_masking(imgs, 0.75, noise)
    mask = mask.view(-1, 1, *model.geometry.grid(3)).bool()
    return mask.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


# ---- Reconstruction ------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_visible_pixels_stay_and_removed_ones_turn_gray(in_chans):
    model, imgs = model_of(in_chans=in_chans), pictures(in_chans=in_chans)
    found = reconstruct(model, imgs, 0.75)
    masked, filled = found.masked, found.filled
    removed = removed_pixels(model, imgs).expand_as(imgs)
    original = denormalize(imgs)

    assert torch.equal(found.original, original)
    assert removed.float().mean() == 0.75
    assert torch.equal(masked[~removed], original[~removed])
    assert torch.equal(filled[~removed], original[~removed])
    assert masked[removed].eq(GRAY).all()
    assert not torch.isclose(filled[removed], original[removed]).all()
    assert filled.min() >= 0 and filled.max() <= 1


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_fills_in_the_original(norm_pix_loss):
    model, imgs = model_of(Oracle, norm_pix_loss=norm_pix_loss), pictures()
    assert model(imgs, 0.75, torch.rand(2, 24))[0] < 1e-9
    found = reconstruct(model, imgs, 0.75)
    torch.testing.assert_close(found.filled, denormalize(imgs), rtol=0, atol=1e-5)
    assert found.error < 1e-5 < found.trivial


def test_the_error_is_that_of_the_removed_pixels_alone():
    model, imgs = model_of(), pictures()
    found = reconstruct(model, imgs, 0.75)
    removed = removed_pixels(model, imgs).expand_as(imgs)
    pair = found.filled[removed].numpy(), found.original[removed].numpy()
    assert found.error == pytest.approx(mean_squared_error(*pair) ** 0.5)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_trivial_fill_is_right_where_a_picture_or_each_patch_has_one_colour(norm_pix_loss):
    model = model_of(norm_pix_loss=norm_pix_loss)
    colours = torch.rand(2, 1, 4, 6) if norm_pix_loss else torch.rand(2, 3, 1, 1)
    imgs = colours.expand(2, 3, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert reconstruct(model, imgs, 0.75).trivial == pytest.approx(0, abs=1e-6)


def test_the_trivial_fill_is_the_mean_of_what_is_visible():
    model = model_of()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in channel_stats(3))
    white = removed_pixels(model, pictures()).float().expand(-1, 3, -1, -1)
    assert reconstruct(model, (white - mean) / std, 0.75).trivial == pytest.approx(1)


def test_patches_with_holes_are_filled_in_by_the_moments_of_their_data():
    model, imgs = model_of(Oracle, norm_pix_loss=True), pictures() * 3 + 5
    model.no_data = torch.rand(imgs.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    imgs[model.no_data] = torch.nan
    found = reconstruct(model, imgs, 0.75, show=stretched(imgs))
    filled = found.filled
    torch.testing.assert_close(filled, stretched(imgs)(imgs, 1), rtol=0, atol=1e-5)
    assert filled[model.no_data].eq(0).all() and filled[~model.no_data].mean() > 0.4
    assert found.masked.isfinite().all() and found.error < 1e-5 < found.trivial


def test_the_seed_decides_the_mask():
    model, imgs = model_of(), pictures()
    first, again, other = (reconstruct(model, imgs, 0.75, seed).masked for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training):
    model = model_of().train(training)
    reconstruct(model, pictures(), 0.75)
    assert {module.training for module in model.modules()} == {training}


def test_the_model_predicts_in_evaluation_mode():
    modes = []
    model = model_of().train()
    model.decoder_pred.register_forward_hook(lambda module, *_: modes.append(module.training))
    reconstruct(model, pictures(), 0.75)
    assert modes == [False]


def test_the_global_random_state_stays():
    model, imgs = model_of(), pictures()
    before = random_state()
    draw_images(model, imgs, 0.75)
    after = random_state()
    assert torch.equal(after["torch"], before["torch"])
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    assert after["numpy"][2:] == before["numpy"][2:] and after["python"] == before["python"]


# ---- The grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_the_grid_shows_original_masked_and_filled_next_to_each_other(in_chans):
    model, imgs = model_of(in_chans=in_chans), pictures(3, in_chans)
    found = reconstruct(model, imgs, 0.75)
    grid = triples_grid(found, columns=2)
    # Four times as large, with frames of 4 pixels around pictures and of 8 around triples.
    height, width = 4 * 16 + 4, 4 * 24 + 4
    tall, wide = height + 4 + 8, 3 * width + 4 + 8
    assert grid.shape == (3, 2 * tall + 8, 2 * wide + 8)
    assert grid.dtype == torch.float32 and grid.min() >= 0 and grid.max() <= 1

    for number, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        for place, image in enumerate((found.original, found.masked, found.filled)):
            top, left = row * tall + 12, column * wide + 12 + place * width
            picture = grid[:, top : top + 64 : 4, left : left + 96 : 4]
            assert torch.equal(picture, image[number, :3].expand(3, -1, -1))


def test_one_image_makes_one_triple():
    grid = triples_grid(reconstruct(model_of(), pictures(1), 0.75))
    assert grid.shape[0] == 3 and grid.shape[1] < 100 and grid.shape[2] < 350


def test_the_errors_are_written_below_the_grid():
    model, imgs = model_of(), pictures()
    found, drawing = reconstruct(model, imgs, 0.75), draw_images(model, imgs, 0.75)
    assert f"{found.error:.3f}" in drawing.errors and f"{found.trivial:.3f}" in drawing.errors
    grid = triples_grid(found)
    assert torch.equal(drawing.picture[:, : grid.shape[1]], grid)
    strip = drawing.picture[:, grid.shape[1] :]
    assert strip.shape[1] > 15 and strip[:, :, :4].eq(1).all() and strip.min() == 0


@pytest.mark.parametrize("width", [100, 300, 2000])
def test_no_line_of_a_caption_is_cut_off(width):
    strip = captioned(torch.zeros(3, 1, width), "many short words " * 12)[:, 1:]
    assert strip[:, :, -1].eq(1).all() and strip[:, -1].eq(1).all()


# ---- Files ---------------------------------------------------------------------------------------


def write_images(folder, *grays):
    folder.mkdir(parents=True)
    for number, gray in enumerate(grays):
        Image.new("L", (24, 16), gray).save(folder / f"{number:02d}.png")
    return folder


def grays(imgs):
    """The one value of each image, from 0 to 255."""
    values = denormalize(imgs).flatten(1) * 255
    assert torch.allclose(values, values[:, :1], atol=1e-3)
    return values[:, 0].round().int().tolist()


def test_images_are_resized_and_normalised(tmp_path):
    files = sorted(write_images(tmp_path / "data", 0, 100, 255).iterdir())
    imgs = load_images(files, (8, 12), 3)
    assert imgs.shape == (3, 3, 8, 12)
    assert grays(imgs) == [0, 100, 255]


def test_a_damaged_image_is_refused_by_name(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"bad\.png"):
        load_images([tmp_path / "bad.png"], SIZE, 3)


def test_samples_are_held_out_images_where_there_are_some(tmp_path):
    write_images(tmp_path / "train", 1, 2)
    assert grays(load_samples(tmp_path, SIZE, 1)) == [1, 2]
    write_images(tmp_path / "val", 3)
    assert grays(load_samples(tmp_path, SIZE, 1)) == [3]


def test_samples_of_a_flat_folder_are_spread_over_it(tmp_path):
    write_images(tmp_path / "data", *range(10))
    assert grays(load_samples(tmp_path / "data", SIZE, 1, count=5)) == [0, 2, 4, 6, 8]
    assert grays(load_samples(tmp_path / "data", SIZE, 1, count=99)) == list(range(10))


def test_damaged_samples_are_left_out(tmp_path):
    write_images(tmp_path / "data", 1, 2, 3)
    (tmp_path / "data" / "01.png").write_bytes(b"nothing")
    assert grays(load_samples(tmp_path / "data", SIZE, 1)) == [1, 3]


@pytest.mark.parametrize("losses", [[1.0], [1.0, 0.5, float("nan"), 0.25]])
def test_the_loss_curve_is_a_picture(losses, tmp_path):
    log, output = tmp_path / "log.txt", tmp_path / "loss.png"
    rows = [{"epoch": i, "train_loss": loss, "train_lr": 0.1} for i, loss in enumerate(losses)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_loss_curve(log, output)
    picture = np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3)
    assert len(picture) > 100_000 and len(np.unique(picture, axis=0)) > 10


# --- channels of any range -----------------------------------------------------------------------


def test_three_channels_are_stretched_by_percentiles():
    imgs = torch.rand(4, 7, 16, 16, generator=torch.Generator().manual_seed(0)) * 1000 - 300
    shown = stretched(imgs, (6, 2, 1))(imgs, 1)
    for place, channel in enumerate((5, 1, 0)):
        low, high = np.percentile(imgs[:, channel], (2, 98))
        expected = ((imgs[:, channel] - low) / (high - low)).clamp(0, 1)
        torch.testing.assert_close(shown[:, place], expected)


def test_one_channel_gets_matplotlibs_colours():
    imgs = torch.linspace(-3, 5, 64).view(1, 1, 8, 8)
    shown = stretched(imgs)(imgs, 1)
    low, high = np.percentile(imgs, (2, 98))
    values = ((imgs[0, 0].numpy() - low) / (high - low)).clip(0, 1)
    expected = colormaps["viridis"](values)[..., :3]
    np.testing.assert_allclose(shown[0].movedim(0, -1), expected, atol=0.02)


def test_a_channel_that_never_changes_is_shown():
    shown = stretched(torch.full((1, 3, 8, 8), 2.0))(torch.full((1, 3, 8, 8), 2.0), 1)
    assert shown.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_no_data_are_black_and_do_not_stretch_the_others(channels):
    imgs = torch.linspace(1, 2, 64).view(1, 1, 8, 8).repeat(2, channels, 1, 1)
    holes = imgs.clone()
    holes[1] = torch.nan
    shown = stretched(holes)(holes, 1)
    torch.testing.assert_close(shown[0], stretched(imgs[:1])(imgs[:1], 1)[0])
    assert shown[1].eq(0).all() and stretched(holes[1:])(holes[1:], 1).eq(0).all()


def test_a_reconstruction_of_seven_channels_has_three_colours():
    model, imgs = model_of(in_chans=7), torch.randn(2, 7, *SIZE)
    grid = draw_images(model, imgs, 0.75, show=stretched(imgs)).picture
    assert grid.shape[0] == 3 and grid.min() >= 0 and grid.max() <= 1
