import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.pictures import picture
from util.datasets import load_image, seeded
from util.errors import UsageError
from util.transforms import (
    center_crop_transform,
    channel_stats,
    denormalize,
    eval_transform,
    finetune_transform,
    pretrain_transform,
)

# --- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("make", [pretrain_transform, eval_transform])
def test_transforms_give_plain_tensors_of_the_size_asked_for(tmp_path, in_chans, make):
    picture().save(tmp_path / "a.png")
    got = make((16, 32), in_chans)(load_image(tmp_path / "a.png", in_chans))
    assert type(got) is torch.Tensor
    assert got.dtype == torch.float32 and got.shape == (in_chans, 16, 32)


def test_the_statistics_are_imagenet_s():
    assert channel_stats(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert channel_stats(1) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert channel_stats(4) == (
        (0.485, 0.456, 0.406, 0.5),
        (0.229, 0.224, 0.225, 0.5),
    )
    with pytest.raises(UsageError):
        channel_stats(2)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_denormalize_gives_the_picture_back(tmp_path, in_chans):
    picture().save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", in_chans)
    got = denormalize(eval_transform((24, 40), in_chans)(image)[None])[0]
    assert torch.allclose(got, v2.functional.pil_to_tensor(image) / 255, atol=1e-6)


def test_evaluation_takes_the_centre():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    got = denormalize(eval_transform((20, 20))(wide))
    assert torch.allclose(got.mean(dim=(1, 2)), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


def test_pretraining_flips_only_if_asked_to():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))

    def flipped(hflip: bool) -> set[bool]:
        transform = pretrain_transform((8, 8), 1, hflip=hflip)
        with seeded(0):
            views = [transform(ramp) for _ in range(20)]
        return {bool(view[0, 0, 0] > view[0, 0, -1]) for view in views}

    assert flipped(True) == {False, True}
    assert flipped(False) == {False}


def test_a_crop_takes_the_share_of_the_area_asked_for():
    transform = pretrain_transform((24, 40), hflip=False, scale=(1.0, 1.0))
    square = Image.new("RGB", (32, 32))
    assert transform(square).shape == (3, 24, 40)
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    small = pretrain_transform((8, 8), 1, hflip=False, scale=(0.01, 0.02))
    with seeded(0):
        view = denormalize(small(ramp))
    assert view.max() - view.min() < 0.3


@pytest.mark.parametrize("make", [finetune_transform, center_crop_transform])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_classification_transforms_give_plain_tensors_of_the_size_asked_for(make, in_chans):
    image = picture(0, 64, 80).convert({1: "L", 3: "RGB"}[in_chans])
    for size in ((32, 32), (32, 64)):
        out = make(size, in_chans)(image)
        assert type(out) is torch.Tensor
        assert out.shape == (in_chans, *size) and out.dtype == torch.float32


def test_the_recipes_augmentation_runs_for_long():
    """Every operation of RandAugment at every strength it is drawn with."""
    transform, image = finetune_transform((32, 32)), picture(0, 64, 80)
    with seeded(0):
        assert all(transform(image).isfinite().all() for _ in range(2000))


def test_a_classifier_sees_224_of_256_pixels_around_the_centre():
    image = Image.new("RGB", (512, 256), "red")
    image.paste("white", (256 - 112 + 1, 17, 256 + 112 - 1, 256 - 17))
    out = denormalize(center_crop_transform((224, 224))(image))
    assert (out[:, 3:-3, 3:-3] == 1).all()
    assert out[1, 0].max() < 0.9  # at the rim it is no longer white


def test_above_224_pixels_nothing_is_cut_but_for_the_proportions():
    image = picture(0, 384, 384)
    out = denormalize(center_crop_transform((384, 384))(image))
    torch.testing.assert_close(
        out,
        v2.functional.to_dtype(v2.functional.pil_to_tensor(image), scale=True),
        atol=2e-3,
        rtol=0,
    )


def test_fine_tuning_flips_only_if_asked_to():
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 16, 32))  # white on the left
    plain = dict(auto_augment=None, reprob=0.0, scale=(1.0, 1.0))

    def left_is_white(hflip):
        transform = finetune_transform((32, 32), 1, hflip=hflip, **plain)
        with seeded(0):
            return [bool((t := transform(image))[0, 16, 2] > t[0, 16, -2]) for _ in range(64)]

    assert all(left_is_white(False))
    assert 16 < sum(left_is_white(True)) < 48
