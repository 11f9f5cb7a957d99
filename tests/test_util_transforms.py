import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.pictures import picture
from util.datasets import load_image, seeded
from util.errors import UsageError
from util.transforms import channel_stats, denormalize, eval_transform, pretrain_transform

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
