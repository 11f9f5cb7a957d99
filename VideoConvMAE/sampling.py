"""Frame sampling: the frames of a video that make a clip."""

import random
from collections.abc import Sequence

SAMPLINGS = ("dense", "uniform", "still")


def dense(num_frames: int, length: int, stride: int, place: float) -> list[int]:
    """Every `stride`-th frame of a stretch; a video that is shorter is looped.

    Args:
        num_frames: of the video.
        length: of the clip.
        stride: frames from one to the next.
        place: of the stretch in the video, from 0 (its beginning) to 1 (its end).
    """
    starts = max(num_frames - (length - 1) * stride, 1)
    start = min(int(place * starts), starts - 1)
    return [(start + i * stride) % num_frames for i in range(length)]


def uniform(num_frames: int, length: int, places: Sequence[float]) -> list[int]:
    """One frame of each of `length` equal segments, as TSN takes them.

    Of a video with fewer frames than segments some come twice, in order.

    Args:
        num_frames: of the video.
        length: of the clip.
        places: of the frame in each segment, from 0 to below 1.
    """
    last = num_frames - 1  # a place next to 1 may be rounded up
    return [min(int((i + places[i]) * num_frames / length), last) for i in range(length)]


def training_clip(sampling: str, num_frames: int, length: int, stride: int) -> list[int]:
    """A random clip; draws from `random`.

    Args:
        sampling: "dense": a random stretch; "uniform": a random frame of each segment; "still":
            the middle frame alone.
        num_frames: of the video.
        length: of the clip.
        stride: frames from one to the next in dense sampling.
    """
    if sampling == "dense":
        return dense(num_frames, length, stride, random.random())
    if sampling == "uniform":
        return uniform(num_frames, length, [random.random() for _ in range(length)])
    return [num_frames // 2] * length


def eval_clips(
    sampling: str, num_frames: int, length: int, stride: int, clips: int
) -> list[list[int]]:
    """Clips spread over the whole video: of a dense one from its beginning to its end.

    Args:
        sampling: "dense": stretches at equal distances, a single one in the middle; "uniform":
            of each segment the middle frame, or for several clips those at equal distances from
            its start on, of two the start and the middle (VideoMAE's test on
            Something-Something); "still": the middle frame alone.
        num_frames: of the video.
        length: of a clip.
        stride: frames from one to the next in dense sampling.
        clips: how many.
    """
    if sampling == "dense":
        places = [i / (clips - 1) for i in range(clips)] if clips > 1 else [0.5]
        return [dense(num_frames, length, stride, place) for place in places]
    if sampling == "uniform":
        places = [i / clips for i in range(clips)] if clips > 1 else [0.5]
        return [uniform(num_frames, length, [place] * length) for place in places]
    return [[num_frames // 2] * length] * clips
