from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import auto_augment, create_transform
from torchvision.transforms import v2

from tests.pictures import photo, picture
from util.data import transforms
from util.data.crop import clamped_box, random_box, resize_crop
from util.data.datasets import seeded
from util.data.images import load_image
from util.data.transforms import (
    center_crop_transform,
    channel_stats,
    cut_ends,
    denormalize,
    eval_transform,
    finetune_transform,
    normalize,
    pretrain_transform,
    probe_transform,
)
from util.errors import UsageError


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


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_fine_tuning_view_is_augmented_and_erased_as_timm_does_it(in_chans):
    mean, std = channel_stats(in_chans)
    _, augment, finish = create_transform(
        *((in_chans, 48, 64),),
        is_training=True,
        separate=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        **dict(re_prob=0.5, re_mode="pixel", mean=mean, std=std),
    )
    view = pretrain_transform((48, 64), in_chans, scale=(0.08, 1))
    transform, image = finetune_transform((48, 64), in_chans, reprob=0.5), png(picture(0, 64, 80))
    for seed in range(40):
        with seeded(seed):
            got = transform(BytesIO(image.getvalue()))
        with seeded(seed):
            expected = finish(augment(v2.ToPILImage()(view(BytesIO(image.getvalue())))))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_posterizing_to_no_bits_is_black():
    for name in ("Posterize", "PosterizeIncreasing"):
        operation = auto_augment.NAME_TO_OP[name]
        assert not np.asarray(operation(picture(), 0)).any()
        np.testing.assert_array_equal(operation(picture(), 3), ImageOps.posterize(picture(), 3))


def test_the_recipes_augmentation_runs_for_long():
    """Every operation of RandAugment at every strength it is drawn with."""
    transform, image = finetune_transform((32, 32)), png(picture(0, 64, 80)).getvalue()
    with seeded(0):
        assert all(transform(BytesIO(image)).isfinite().all() for _ in range(2000))


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


def test_without_a_policy_and_jitter_a_view_is_a_crop_of_pretraining_normalised():
    image = png(picture(0, 64, 80))
    plain = finetune_transform((32, 32), scale=(0.2, 1.0), auto_augment=None, reprob=0.0)
    views = []
    for transform in (plain, pretrain_transform((32, 32))):
        with seeded(0):
            views.append(transform(image))
    torch.testing.assert_close(views[0], normalize(views[1]), rtol=0, atol=0)


def test_colour_jitter_changes_colours_where_there_is_no_policy():
    image = png(picture(0, 32, 32))
    options = dict(hflip=False, scale=(1.0, 1.0), auto_augment=None, reprob=0.0)
    with seeded(0):
        jittered = finetune_transform((32, 32), color_jitter=0.4, **options)(image)
    assert (jittered - finetune_transform((32, 32), **options)(image)).abs().max() > 0.1


# --- pretraining against the reference -----------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "rotated.jpg", "cmyk.jpg", "gray.jpg"])
def test_views_are_those_of_the_reference_up_to_rounding(tmp_path, monkeypatch, ending):
    path, boxes = tmp_path / f"a.{ending}", []
    photo(375, 500).convert({"cmyk.jpg": "CMYK", "gray.jpg": "L"}.get(ending, "RGB")).save(
        path, exif=orientation(6) if ending == "rotated.jpg" else b""
    )

    def recorded(image, scale):
        boxes.append(random_box(image, scale))
        return boxes[-1]

    monkeypatch.setattr(transforms, "random_box", recorded)
    ours, bicubic = pretrain_transform((224, 224), hflip=False), v2.InterpolationMode.BICUBIC
    for seed in range(6):
        with seeded(seed), open(path, "rb") as file:
            got = ours(file).int()
        # The rows, then the columns, as Pillow did it up to release 12: the later ones begin with
        # what is cheaper, and round and clip between the two.
        box, view = boxes[-1], load_image(path)
        for corner, part, size in (
            ((box.top, box.left), (box.height, box.width), (box.height, 224)),
            ((0, 0), (box.height, 224), (224, 224)),
        ):
            view = v2.functional.resized_crop(view, *corner, *part, size, bicubic, antialias=True)
        difference = (got - v2.functional.pil_to_tensor(view).int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.1


def test_half_of_the_views_are_mirrored(tmp_path):
    picture(0, 64, 64).save(tmp_path / "a.png")
    mirrored, plain = pretrain_transform((32, 32)), pretrain_transform((32, 32), hflip=False)
    flips = 0
    for seed in range(200):
        with seeded(seed), open(tmp_path / "a.png", "rb") as file:
            got = mirrored(file)
        with seeded(seed), open(tmp_path / "a.png", "rb") as file:
            expected = plain(file)
        flips += torch.equal(got, expected.flip(-1))
        assert torch.equal(got, expected) or torch.equal(got, expected.flip(-1))
    assert 70 < flips < 130


def test_the_probe_s_views_are_those_of_its_crops(tmp_path, monkeypatch):
    photo(375, 500).save(tmp_path / "a.png")
    boxes = []

    def recorded(image, scale):
        boxes.append(clamped_box(image, scale))
        return boxes[-1]

    monkeypatch.setattr(transforms, "clamped_box", recorded)
    with seeded(0), open(tmp_path / "a.png", "rb") as file:
        got = probe_transform((64, 64), hflip=False)(file)
    expected = resize_crop(np.array(load_image(tmp_path / "a.png")), boxes[0], (64, 64))
    assert torch.equal(got, expected)


# --- thin strips ---------------------------------------------------------------------------------


def reference_view(image: Image.Image, size: int) -> torch.Tensor:
    """Timm's evaluation of a whole image."""
    transform = create_transform(
        *((3, size, size),), interpolation="bicubic", crop_pct=224 / 256 if size <= 224 else 1.0
    )
    return transform(image)


@pytest.mark.parametrize("size", [(500, 375), (31, 40), (640, 20), (20, 640), (3001, 100), (1, 32)])
def test_a_classifier_s_view_is_the_reference_s_bit_by_bit(size):
    image = photo(*size[::-1])
    assert torch.equal(center_crop_transform((56, 56))(png(image)), reference_view(image, 56))


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (4001, 20), (3003, 21), (21, 1500)])
@pytest.mark.parametrize("side", [56, 256])
def test_a_strip_s_view_is_that_of_the_whole_up_to_a_pixel(size, side):
    """A picture that is smooth along the strip: one pixel of the view changes it by little."""
    wave = 128 + 100 * np.sin(np.arange(max(size)) / 40)
    pixels = np.broadcast_to(wave.astype(np.uint8)[:, None], (max(size), min(size)))
    image = Image.fromarray(pixels if size[1] > size[0] else pixels.T).convert("RGB")
    got, want = (
        denormalize(view)
        for view in (center_crop_transform((side, side))(png(image)), reference_view(image, side))
    )
    assert (got - want).abs().max() < 0.02


def test_a_thin_strip_costs_no_more_than_it_must(tmp_path):
    Image.new("RGB", (20000, 10)).save(tmp_path / "strip.png")
    assert cut_ends(Image.open(tmp_path / "strip.png")).size == (320, 10)
