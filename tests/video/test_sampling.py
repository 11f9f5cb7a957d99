"""Which frames make a clip: short, exact and long videos."""

import random

import pytest

from VideoConvMAE.sampling import dense, eval_clips, training_clip, uniform


def test_a_dense_clip_of_a_long_video_lies_anywhere_in_it():
    assert dense(300, 4, 10, 0.0) == [0, 10, 20, 30]
    assert dense(300, 4, 10, 1.0) == [269, 279, 289, 299]
    starts = {dense(40, 4, 10, i / 100)[0] for i in range(101)}
    assert starts == set(range(10))


def test_a_dense_clip_of_an_exact_video_is_all_of_it():
    for place in (0.0, 0.5, 1.0):
        assert dense(31, 4, 10, place) == [0, 10, 20, 30]
        assert dense(4, 4, 1, place) == [0, 1, 2, 3]


def test_a_dense_clip_of_a_short_video_loops():
    assert dense(25, 4, 10, 0.7) == [0, 10, 20, 5]
    assert dense(3, 7, 1, 0.0) == [0, 1, 2, 0, 1, 2, 0]
    assert dense(1, 3, 4, 1.0) == [0, 0, 0]


def test_a_uniform_clip_has_a_frame_of_each_segment():
    assert uniform(40, 4, [0.0] * 4) == [0, 10, 20, 30]
    assert uniform(40, 4, [0.5] * 4) == [5, 15, 25, 35]
    assert uniform(40, 4, [0.99] * 4) == [9, 19, 29, 39]
    assert uniform(4, 4, [0.3] * 4) == [0, 1, 2, 3]


def test_a_uniform_clip_of_a_short_video_repeats_frames_in_order():
    assert uniform(2, 4, [0.5] * 4) == [0, 0, 1, 1]
    assert uniform(1, 3, [0.9] * 3) == [0, 0, 0]


@pytest.mark.parametrize("sampling", ["dense", "uniform", "still"])
@pytest.mark.parametrize("num_frames", [1, 5, 16, 17, 61, 64, 300])
def test_every_frame_exists(sampling, num_frames):
    random.seed(0)
    clips = [training_clip(sampling, num_frames, 16, 4) for _ in range(50)]
    for clip in clips + eval_clips(sampling, num_frames, 16, 4, 5):
        assert len(clip) == 16
        assert set(clip) <= set(range(num_frames))


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_random_clips_reach_the_first_and_the_last_frame(sampling):
    random.seed(0)
    clips = [training_clip(sampling, 20, 4, 4) for _ in range(500)]
    assert {i for clip in clips for i in clip} == set(range(20))
    assert all(clip == sorted(clip) for clip in clips)


def test_dense_test_clips_are_spread_from_beginning_to_end():
    clips = eval_clips("dense", 300, 16, 4, 5)
    assert [clip[0] for clip in clips] == [0, 60, 120, 180, 239]
    assert clips[-1][-1] == 299
    assert eval_clips("dense", 300, 16, 4, 1)[0][0] == 120  # the middle


def test_uniform_test_clips_share_no_frame_of_a_long_video():
    clips = eval_clips("uniform", 64, 16, 4, 4)
    assert sorted(i for clip in clips for i in clip) == list(range(64))


@pytest.mark.parametrize("num_frames", [5, 16, 17, 61, 300])
def test_two_uniform_test_clips_are_the_segments_starts_and_middles_as_videomaes(num_frames):
    tick = num_frames / 16
    starts, middles = ([int(tick * i + offset) for i in range(16)] for offset in (0, tick / 2))
    assert eval_clips("uniform", num_frames, 16, 4, 2) == [starts, middles]
    assert eval_clips("uniform", num_frames, 16, 4, 1) == [middles]


def test_a_still_clip_is_the_middle_frame():
    assert training_clip("still", 9, 4, 2) == [4] * 4
    assert eval_clips("still", 9, 4, 2, 3) == [[4] * 4] * 3
