"""Clips and views of videos, broken files among them."""

import numpy as np
import pytest
import torch

from tests.video.movies import numbers, write_movie
from util.data.classes import NO_LABEL
from util.data.loader import Loader
from util.data.samplers import EvalSampler, StepSampler
from util.errors import TrainingError, UsageError
from VideoConvMAE.datasets import Clips, LabeledClips, Views, evenly_chosen
from VideoConvMAE.lists import VideoList, find_videos


def as_is(frames):
    """Frames to a clip `[C, T, H, W]`."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).clone()


def two_crops(frames):
    return torch.stack([as_is(frames), as_is(frames).flip(-1)])


def shown(clip):
    """The numbers that the frames of a clip `[C, T, H, W]` tell."""
    return numbers(clip.permute(1, 2, 3, 0).numpy())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_movie(folder / "ab"[i % 2] / f"{i}.mp4", 20 + i, preset="ultrafast")
    return find_videos(folder)


@pytest.fixture(scope="module")
def damaged(videos, tmp_path_factory):
    """The same with two broken files, the second and the fifth."""
    broken = tmp_path_factory.mktemp("broken") / "a.mp4"
    broken.write_bytes(b"no video")
    paths = [str(broken) if i in (1, 4) else path for i, path in enumerate(videos.paths)]
    return VideoList(videos.source, paths, videos.labels)


def test_a_clip_is_decided_by_its_seed(videos):
    dataset = Clips(videos, as_is, length=4, stride=3)
    clip, bad = dataset[2, 7]
    assert (clip.shape, bad) == ((3, 4, 32, 48), ())
    first = shown(clip)[0]
    assert shown(clip) == [first, first + 3, first + 6, first + 9]
    assert torch.equal(dataset[2, 7][0], clip)
    assert len({shown(dataset[2, seed][0])[0] for seed in range(20)}) > 3


def test_uniform_and_still_clips(videos):
    uniform = Clips(videos, as_is, length=4, sampling="uniform")
    places = np.array([shown(uniform[0, seed][0]) for seed in range(10)])
    assert (places // 5 == [0, 1, 2, 3]).all()
    still = Clips(videos, as_is, length=4, sampling="still")
    assert shown(still[0, 1][0]) == [10] * 4


def test_repeated_augmentation_gives_several_looks_at_one_clip(videos):
    def noisy(frames):
        return as_is(frames).float() + torch.rand(1)

    dataset = LabeledClips(videos, ["a", "b"], noisy, repeats=3, length=4)
    items = dataset[4, 1]
    assert [item[1:] for item in items] == [(1, 4, ())] * 3
    clips = [clip for clip, *_ in items]
    assert len({clip[0, 0, 0, 0].item() % 1 for clip in clips}) == 3
    assert len({str(shown(clip.round())) for clip in clips}) == 1


def test_a_batch_of_repeats_has_all_of_them(videos):
    dataset = LabeledClips(videos, ["a", "b"], as_is, repeats=2, length=4)
    loader = Loader(dataset, StepSampler(6, 3, seed=1))
    (clips, labels, indices, bad), _ = loader.epoch(0)
    assert clips.shape == (6, 3, 4, 32, 48)
    assert labels.tolist() == [int(dataset.labels[i]) for i in indices.tolist()]
    assert indices.tolist()[::2] == indices.tolist()[1::2]
    assert bad == []


def test_views_are_all_clips_in_all_crops(videos):
    dataset = Views(videos, ["a", "b"], two_crops, clips=3, length=4, stride=2)
    views, label, index, bad = dataset[3, 0]
    assert (views.shape, label, index, bad) == ((6, 3, 4, 32, 48), 1, 3, ())
    length = 21
    starts = [shown(views[i])[0] for i in (0, 2, 4)]
    assert starts == [0, (length - 6) // 2, length - 7]
    assert torch.equal(views[1], views[0].flip(-1))


def test_large_frames_come_scaled_down(videos):
    clip, _ = Clips(videos, as_is, length=4, short_side=16)[0, 1]
    assert clip.shape == (3, 4, 16, 24)


def test_views_of_videos_without_labels_have_none(videos):
    unknown = VideoList(videos.source, videos.paths, [])
    dataset = Views(unknown, ["a", "b"], two_crops, length=4, unlabeled=True)
    assert dataset[3, 0][1] == NO_LABEL
    with pytest.raises(UsageError, match="has no labels"):
        Views(unknown, ["a", "b"], two_crops, length=4)


def test_a_broken_video_is_replaced_and_reported(damaged):
    dataset = LabeledClips(damaged, ["a", "b"], as_is, length=4)
    ((clip, label, index, bad),) = dataset[1, 5]
    assert (index, bad[0][0]) == (1, 1)
    assert clip.shape == (3, 4, 32, 48)
    assert label in (0, 1)
    assert "a.mp4" in dataset.path(1)


def test_a_broken_video_is_reported_by_the_loader_and_its_place_in_a_test_known(damaged):
    dataset = Views(damaged, ["a", "b"], two_crops, length=4)
    batches = list(Loader(dataset, EvalSampler(6, 4)).epoch(0))
    assert [batch[0].shape[:2] for batch in batches] == [(4, 2), (2, 2)]
    assert sorted({i for batch in batches for i, _ in batch[-1]}) == [1, 4]


def test_nothing_but_broken_videos_ends_the_run(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    dataset = Clips(find_videos(tmp_path), as_is, length=4)
    with pytest.raises(TrainingError, match=r"files in a row cannot be decoded.*a\.mp4"):
        dataset[0, 0]


def test_videos_to_look_at_are_spread_over_all():
    videos = VideoList("x", [str(i) for i in range(10)], [])
    assert evenly_chosen(videos, 4).paths == ["0", "2", "5", "7"]
    assert evenly_chosen(videos, 20).paths == videos.paths
