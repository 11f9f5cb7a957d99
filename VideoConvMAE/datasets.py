"""Clips of videos as data sets: random ones to train on, several views of each to test on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from util.data.classes import NO_LABEL
from util.data.datasets import FileDataset
from util.data.images import MAX_PIXELS
from util.data.paths import Paths
from VideoConvMAE.decode import Video, open_video
from VideoConvMAE.lists import VideoList, class_numbers
from VideoConvMAE.sampling import eval_clips, training_clip
from VideoConvMAE.transforms import Transform


class Clips(FileDataset):
    """A random clip of each video, without labels: an item is `(clip, bad)`, see `FileDataset`.

    Args:
        videos: the files.
        transform: frames `[T, H, W, C]`, uint8, to a clip `[C, T, H, W]`.
        length: frames of a clip.
        sampling: "dense", "uniform" or "still", as `sampling.training_clip` draws.
        stride: frames from one to the next in dense sampling.
        in_chans: 1 or 3.
        short_side: to which larger frames are scaled down, see `decode.open_video`.
        max_pixels: a video of larger frames counts as one that cannot be decoded.
    """

    what = "videos"

    def __init__(
        self,
        videos: VideoList,
        transform: Transform,
        *,
        length: int,
        sampling: str = "dense",
        stride: int = 4,
        in_chans: int = 3,
        short_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = videos.source
        self._paths = Paths(videos.paths)
        self.transform = transform
        self.length, self.sampling, self.stride = length, sampling, stride
        self.in_chans, self.short_side, self.max_pixels = in_chans, short_side, max_pixels

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """The file or folder of a video."""
        return self._paths[index]

    def open(self, index: int) -> Video:
        """A video, to read frames of."""
        return open_video(self.path(index), self.in_chans, self.short_side, self.max_pixels)

    def load(self, index: int) -> Tensor:
        """A random clip of a video, transformed."""
        return self.transform(self.read_clip(index))

    def read_clip(self, index: int) -> np.ndarray:
        """The frames of a random clip, `[T, H, W, C]`, uint8; draws from `random`."""
        with self.open(index) as video:
            indices = training_clip(self.sampling, len(video), self.length, self.stride)
            return video.frames(indices)


class LabeledClips(Clips):
    """Random clips with labels: an item is `(clip, label, index, bad)`, or a list of such.

    With repeated augmentation (arXiv 1901.09335) each video is decoded once and transformed
    several times; its items come as a list, which `util.data.loader.collate` knows.

    Args:
        videos: the files with the names of their classes.
        classes: the names in the order of the labels.
        transform: frames `[T, H, W, C]`, uint8, to a clip `[C, T, H, W]`.
        repeats: how often a clip is transformed.
        **sampling: length, sampling, stride, in_chans and short_side of `Clips`.

    Attributes:
        classes: as given.
        labels: `[num_videos]`, int64; `NO_LABEL` where there are none to know.

    Raises:
        UsageError: a class that is none of `classes`.
    """

    def __init__(
        self,
        videos: VideoList,
        classes: Sequence[str],
        transform: Transform,
        *,
        repeats: int = 1,
        **sampling,
    ) -> None:
        super().__init__(videos, transform, **sampling)
        self.classes, self.repeats = list(classes), repeats
        self.labels = np.array(self._numbers(videos))

    def _numbers(self, videos: VideoList) -> list[int]:
        return class_numbers(videos, self.classes)

    def load(self, index: int) -> Tensor:
        """`[repeats, C, T, H, W]`: a random clip of a video, transformed several times."""
        frames = self.read_clip(index)
        return torch.stack([self.transform(frames) for _ in range(self.repeats)])

    def __getitem__(self, key: tuple[int, int]) -> list[tuple[Tensor, int, int, tuple[int, ...]]]:
        clips, index, bad = self.read(*key)
        return [(clip, int(self.labels[index]), key[0], bad) for clip in clips]


class Views(LabeledClips):
    """All views of a video by which it is tested: an item is `(views, label, index, bad)`.

    Views are `[clips * crops, C, T, H, W]`: clips spread over the video, crops over the frame.

    Args:
        videos, classes, **sampling: as `LabeledClips` takes them.
        transform: frames `[T, H, W, C]`, uint8, to crops `[crops, C, T, H, W]`.
        clips: how many.
        unlabeled: videos without labels are taken too, to predict theirs.
    """

    def __init__(
        self,
        videos: VideoList,
        classes: Sequence[str],
        transform: Transform,
        *,
        clips: int = 1,
        unlabeled: bool = False,
        **sampling,
    ) -> None:
        self.clips, self.unlabeled = clips, unlabeled
        super().__init__(videos, classes, transform, **sampling)

    def _numbers(self, videos: VideoList) -> list[int]:
        if self.unlabeled and not videos.labels:
            return [NO_LABEL] * len(videos.paths)
        return super()._numbers(videos)

    def load(self, index: int) -> Tensor:
        """The views of a video."""
        with self.open(index) as video:
            chosen = eval_clips(self.sampling, len(video), self.length, self.stride, self.clips)
            frames = video.frames([i for clip in chosen for i in clip])
        clips = frames.reshape(self.clips, self.length, *frames.shape[1:])
        return torch.cat([self.transform(clip) for clip in clips])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, tuple[int, ...]]:
        views, index, bad = self.read(*key)
        return views, int(self.labels[index]), key[0], bad


def evenly_chosen(videos: VideoList, count: int) -> VideoList:
    """At most `count` of the videos, at equal distances, to look at."""
    total = len(videos.paths)
    places = [i * total // count for i in range(count)] if total > count else range(total)
    return VideoList(videos.source, [videos.paths[i] for i in places], [])
