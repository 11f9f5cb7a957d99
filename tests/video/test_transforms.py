"""One crop, one flip and one augmentation for all frames of a clip."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from util.data.datasets import seeded
from util.data.transforms import channel_stats, normalize
from util.errors import UsageError
from VideoConvMAE import transforms
from VideoConvMAE.transforms import (
    CROP_SCALES,
    alike,
    cover,
    finetune_transform,
    multi_scale_crop,
    pretrain_transform,
    rand_augment,
    views_transform,
)


def still(height=60, width=80, frames=4, channels=3):
    """A clip of equal frames: what differs afterwards was treated differently."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 4, width // 4, channels), np.uint8)
    frame = np.kron(small, np.ones((4, 4, 1), np.uint8))
    return np.repeat(frame[None], frames, axis=0)


def run(transform, frames, seed):
    with seeded(seed):
        return transform(frames)


@pytest.mark.parametrize("channels", [1, 3])
def test_pretraining_treats_all_frames_alike(channels):
    transform = pretrain_transform((32, 32), hflip=True)
    clips = [run(transform, still(channels=channels), seed) for seed in range(8)]
    for clip in clips:
        assert clip.shape == (channels, 4, 32, 32)
        assert clip.dtype == torch.uint8
        assert clip.is_contiguous()
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    assert len({clip.numpy().tobytes() for clip in clips}) == 8


@pytest.mark.parametrize("channels", [1, 3])
def test_fine_tuning_treats_all_frames_alike_but_for_erasing_noise(channels):
    transform = finetune_transform((32, 32), channels, reprob=0)
    for seed in range(12):
        clip = run(transform, still(channels=channels), seed)
        assert (clip.shape, clip.dtype) == ((channels, 4, 32, 32), torch.float32)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_randaugment_sees_whole_frames_and_fills_with_gray(monkeypatch):
    seen = []

    def rand_augment(policy, size, in_chans):
        def augment(picture):
            seen.append(picture.size)
            return picture

        return augment

    monkeypatch.setattr(transforms, "rand_augment", rand_augment)
    clip = run(transforms.finetune_transform((32, 32), reprob=0), still(60, 80), 0)
    assert clip.shape == (3, 4, 32, 32)
    assert seen == [(80, 60)] * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_what_randaugment_moves_in_is_timms_gray(channels):
    white = np.full((32, 32) if channels == 1 else (32, 32, 3), 255, np.uint8)
    augment = rand_augment("rand-m9-n1", (32, 32), channels)
    augment.ops = [op for op in augment.ops if "Translate" in op.name]
    values = set()
    for seed in range(20):
        with seeded(seed):
            values |= set(np.unique(np.asarray(augment(Image.fromarray(white)))))
    assert {128, 255} <= values  # and what interpolation makes between them
    assert min(values) == 128


def test_crops_are_bilinear():
    transform = finetune_transform((16, 16), hflip=False, scale=(1, 1), auto_augment=None, reprob=0)
    frames = still(32, 32)
    clip = transform(frames)
    whole = torch.from_numpy(frames).movedim(-1, 1)
    expected = F.resize(whole, [16, 16], InterpolationMode.BILINEAR, antialias=True)
    torch.testing.assert_close(clip, normalize(expected.transpose(0, 1).contiguous(), 0))


def test_what_is_erased_is_one_rectangle_in_all_frames():
    kwargs = dict(hflip=False, scale=(1.0, 1.0), auto_augment=None)
    plain = finetune_transform((32, 32), reprob=0, **kwargs)
    erasing = finetune_transform((32, 32), reprob=1, **kwargs)
    # Before erasing nothing but the crop is random, and that draws from torch.
    changed = (run(plain, still(32, 32), 3) != run(erasing, still(32, 32), 3)).any(0)
    rows, columns = changed[0].any(1), changed[0].any(0)
    assert torch.equal(changed, changed[:1].expand_as(changed))
    assert torch.equal(changed[0], rows[:, None] & columns[None])
    assert 0 < changed[0].sum() < 32 * 32


def test_erasing_noise_differs_between_frames():
    erasing = finetune_transform((32, 32), reprob=1, hflip=False, auto_augment=None)
    clip = run(erasing, still(32, 32), 3)
    assert not torch.equal(clip, clip[:, :1].expand_as(clip))


def test_a_flip_mirrors_whole_clips_and_none_if_not_wanted():
    frames = still(32, 32)
    whole = torch.from_numpy(frames).permute(3, 0, 1, 2)
    flipping = pretrain_transform((32, 32), scales=[1.0], hflip=True)
    seen = [run(flipping, frames, seed) for seed in range(20)]
    kinds = [(torch.equal(c, whole), torch.equal(c, whole.flip(-1))) for c in seen]
    assert {(True, False), (False, True)} == set(kinds)
    straight = pretrain_transform((32, 32), scales=[1.0])
    assert all(torch.equal(run(straight, frames, seed), whole) for seed in range(20))


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_multi_scale_crops_have_the_sides_and_places_of_videomae(size):
    # Each pixel tells its place, so a crop of the same size tells what it is of.
    height, width = 120, 160
    ramp = torch.stack([
        torch.arange(height).view(-1, 1).expand(height, width),
        torch.arange(width).view(1, -1).expand(height, width),
    ]).float()[None]  # fmt: skip
    unit, boxes = min(height / size[0], width / size[1]), set()
    for seed in range(800):
        random.seed(seed)
        crop = multi_scale_crop(ramp, size, CROP_SCALES)[0]
        (top, bottom), (left, right) = ((c.min().item(), c.max().item()) for c in crop)
        boxes.add((round(bottom - top + 1), round(right - left + 1), round(top), round(left)))
    wanted = {
        (round(size[0] * unit * a), round(size[1] * unit * b))
        for i, a in enumerate(CROP_SCALES)
        for j, b in enumerate(CROP_SCALES)
        if abs(i - j) <= 1
    }
    # Resizing averages at the rims: up to a few pixels less.
    for h, w in wanted:
        assert any(0 <= h - box[0] <= 4 and 0 <= w - box[1] <= 4 for box in boxes), (h, w)
    assert all(any(0 <= h - b[0] <= 4 and 0 <= w - b[1] <= 4 for h, w in wanted) for b in boxes)


def test_randaugment_draws_once_a_clip():
    frames = torch.from_numpy(still(32, 32)).movedim(-1, 1)
    augment = rand_augment("rand-m9-n3-mstd0.5-inc1", (32, 32), 3)
    looks = set()
    for seed in range(10):
        random.seed(seed)
        clip = alike(frames, augment)
        assert torch.equal(clip, clip[:1].expand_as(clip))
        looks.add(clip.numpy().tobytes())
    assert len(looks) > 5


@pytest.mark.parametrize("policy", ["rand-x9", "augmix-m5", "none of these", "original"])
def test_another_policy_is_refused(policy):
    with pytest.raises(UsageError, match="is no RandAugment policy"):
        finetune_transform((32, 32), auto_augment=policy)


def test_views_are_crops_from_one_end_of_the_longer_side_to_the_other():
    frames = still(32, 64)
    views = views_transform((32, 32), 3)(frames)
    whole = normalize(torch.from_numpy(frames).permute(3, 0, 1, 2), 0)
    assert views.shape == (3, 3, 4, 32, 32)
    for view, left in zip(views, (0, 16, 32), strict=True):
        assert torch.equal(view, whole[..., left : left + 32])
    tall = views_transform((32, 32), 3)(still(64, 32))
    assert not torch.equal(tall[0], tall[2])
    (centre,) = views_transform((32, 32))(frames)
    assert torch.equal(centre, views[1])


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (24, 48), (17, 99)])
def test_frames_are_resized_until_they_just_cover_the_input(height, width):
    covered = cover(torch.zeros(1, 3, height, width), (24, 48)).shape[-2:]
    assert covered[0] >= 24
    assert covered[1] >= 48
    assert covered[0] == 24 or covered[1] == 48
    assert covered[0] / covered[1] == pytest.approx(height / width, rel=0.05)


def test_clips_are_normalised_channel_by_channel():
    white = np.full((2, 32, 32, 3), 255, np.uint8)
    (view,) = views_transform((32, 32))(white)
    mean, std = (torch.tensor(values) for values in channel_stats(3))
    torch.testing.assert_close(view.amax((1, 2, 3)), (1 - mean) / std)
    torch.testing.assert_close(normalize(torch.full((2, 3, 4, 8, 8), 255).byte(), 1)[0], view[:, :1]
                               .expand(3, 4, 32, 32)[..., :8, :8])  # fmt: skip


def test_own_statistics_take_the_place_of_imagenets():
    stats = ((0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    frames = np.full((2, 12, 12, 3), 51, np.uint8)  # 0.2
    expected = torch.tensor([0.2, -0.6, -3.2]).view(3, 1, 1, 1)
    plain = dict(auto_augment=None, reprob=0, stats=stats)
    for clip in (views_transform((8, 8), 1, stats)(frames)[0],
                 finetune_transform((8, 8), **plain)(frames)):  # fmt: skip
        torch.testing.assert_close(clip, expected.expand(3, 2, 8, 8))
