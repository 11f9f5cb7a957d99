from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import v2

from tests.pictures import photo, picture
from util import transforms
from util.datasets import load_image, seeded
from util.errors import UsageError
from util.transforms import (
    center_crop_transform,
    channel_stats,
    denormalize,
    eval_transform,
    finetune_transform,
    normalize,
    pretrain_transform,
)


def png(image: Image.Image) -> BytesIO:
    file = BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


# --- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize(
    ("make", "dtype"), [(pretrain_transform, torch.uint8), (eval_transform, torch.float32)]
)
def test_transforms_give_plain_tensors_of_the_size_asked_for(in_chans, make, dtype):
    got = make((16, 32), in_chans)(png(picture()))
    assert type(got) is torch.Tensor
    assert got.dtype == dtype and got.shape == (in_chans, 16, 32)


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
def test_normalized_pixels_are_those_of_torchvision(in_chans):
    pixels = torch.randint(0, 256, (2, in_chans, 5, 6), dtype=torch.uint8)
    expected = v2.functional.normalize(pixels / 255, *channel_stats(in_chans))
    torch.testing.assert_close(normalize(pixels), expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_picture_is_not_normalized():
    for values in (torch.rand(2, 3, 4, 4), torch.tensor([3, 1])):
        assert normalize(values) is values


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_denormalize_gives_the_picture_back(in_chans):
    image = load_image(png(picture()), in_chans)
    got = denormalize(eval_transform((24, 40), in_chans)(png(picture()))[None])[0]
    assert torch.allclose(got, v2.functional.pil_to_tensor(image) / 255, atol=1e-6)


def test_evaluation_takes_the_centre():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    got = denormalize(eval_transform((20, 20))(png(wide)))
    assert torch.allclose(got.mean(dim=(1, 2)), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


def ramp() -> BytesIO:
    """Black on the left to white on the right."""
    return png(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))))


def test_pretraining_flips_only_if_asked_to():
    def flipped(hflip: bool) -> set[bool]:
        transform = pretrain_transform((8, 8), 1, hflip=hflip)
        with seeded(0):
            views = [transform(ramp()) for _ in range(20)]
        return {bool(view[0, 0, 0] > view[0, 0, -1]) for view in views}

    assert flipped(True) == {False, True}
    assert flipped(False) == {False}


def test_a_crop_takes_the_share_of_the_area_asked_for():
    transform = pretrain_transform((24, 40), hflip=False, scale=(1.0, 1.0))
    assert transform(png(Image.new("RGB", (32, 32)))).shape == (3, 24, 40)
    small = pretrain_transform((8, 8), 1, hflip=False, scale=(0.01, 0.02))
    with seeded(0):
        view = small(ramp()).int()
    assert view.max() - view.min() < 40


@pytest.mark.parametrize("make", [finetune_transform, center_crop_transform])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_classification_transforms_give_plain_tensors_of_the_size_asked_for(make, in_chans):
    image = picture(0, 64, 80).convert({1: "L", 3: "RGB"}[in_chans])
    for size in ((32, 32), (32, 64)):
        out = make(size, in_chans)(png(image))
        assert type(out) is torch.Tensor
        assert out.shape == (in_chans, *size) and out.dtype == torch.float32


def test_the_recipes_augmentation_runs_for_long():
    """Every operation of RandAugment at every strength it is drawn with."""
    transform, image = finetune_transform((32, 32)), picture(0, 64, 80)
    with seeded(0):
        assert all(transform(png(image)).isfinite().all() for _ in range(2000))


def test_a_classifier_sees_224_of_256_pixels_around_the_centre():
    image = Image.new("RGB", (512, 256), "red")
    image.paste("white", (256 - 112 + 1, 17, 256 + 112 - 1, 256 - 17))
    out = denormalize(center_crop_transform((224, 224))(png(image)))
    assert (out[:, 3:-3, 3:-3] == 1).all()
    assert out[1, 0].max() < 0.9  # at the rim it is no longer white


def test_above_224_pixels_nothing_is_cut_but_for_the_proportions():
    image = picture(0, 384, 384)
    out = denormalize(center_crop_transform((384, 384))(png(image)))
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
            return [bool((t := transform(png(image)))[0, 16, 2] > t[0, 16, -2]) for _ in range(64)]

    assert all(left_is_white(False))
    assert 16 < sum(left_is_white(True)) < 48


# --- pretraining against the reference -----------------------------------------------------------


def reference(size: tuple[int, int], scale: tuple[float, float]) -> v2.Compose:
    """MAE's augmentation, on PIL images, without its normalisation."""
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


@pytest.mark.parametrize("ending", ["png", "jpg", "rotated.jpg", "cmyk.jpg", "gray.jpg"])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
def test_views_are_those_of_the_reference_up_to_rounding(tmp_path, ending, scale):
    path = tmp_path / f"a.{ending}"
    photo(375, 500).convert({"cmyk.jpg": "CMYK", "gray.jpg": "L"}.get(ending, "RGB")).save(
        path, exif=orientation(6) if ending == "rotated.jpg" else b""
    )
    ours, theirs = pretrain_transform((224, 224), scale=scale), reference((224, 224), scale)
    for seed in range(4):
        with seeded(seed), open(path, "rb") as file:
            got = ours(file)
        with seeded(seed):
            expected = theirs(load_image(path))
        difference = (got.int() - expected.int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.1


def test_crop_boxes_are_those_that_the_reference_draws(monkeypatch):
    boxes, image = [], Image.new("RGB", (500, 375))

    def only_choose(file, choose, size, in_chans):
        boxes.append(choose(image))
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(transforms, "load_crop", only_choose)
    transform, crop = pretrain_transform((8, 8)), v2.RandomResizedCrop((8, 8), scale=(0.2, 1.0))
    for seed in range(1000):
        with seeded(seed):
            transform(BytesIO())
        with seeded(seed):
            assert boxes[seed] == tuple(crop.make_params([image]).values())
    shares = np.prod(np.array(boxes)[:, 2:], axis=1) / (500 * 375)
    assert 0.19 < shares.min() < 0.22 and 0.45 < shares.mean() < 0.55 and shares.max() > 0.95
