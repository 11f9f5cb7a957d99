"""Frames of videos: files by PyAV, folders of pictures by Pillow; only the frames asked for."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import av
import numpy as np

from util.datasets import IMAGE_EXTENSIONS, load_image

VIDEO_EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg"),
    *(".ts", ".wmv", ".flv", ".3gp", ".ogv"),
)
_FORMATS = {1: "gray", 3: "rgb24"}


class Video(Protocol):
    """An open video: a context, closed at its end."""

    def __len__(self) -> int:
        """Number of frames."""

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at these places, in this order: `[n, H, W, C]`, uint8.

        Raises:
            OSError: they cannot be decoded.
        """

    def __enter__(self) -> "Video":
        """Itself."""

    def __exit__(self, *_: object) -> None:
        """Close it."""


def open_video(path: str | os.PathLike, in_chans: int = 3) -> Video:
    """Open a video file, or a folder of pictures.

    Args:
        path: a file of any format that FFmpeg knows, or a folder.
        in_chans: 1 for grayscale, 3 for RGB.

    Raises:
        OSError: nothing there, or nothing that can be decoded.
    """
    return FrameFolder(path, in_chans) if os.path.isdir(path) else VideoFile(path, in_chans)


class VideoFile:
    """A video file, with the times of its frames read from its packets.

    That needs no decoding, and frames are then found by their times, exactly, whatever the
    container's header says and however the codec reorders them. A decoder runs in one thread:
    the workers of a loader decode side by side.

    Args:
        path: the file.
        in_chans: 1 or 3.

    Raises:
        OSError: it cannot be read, or holds no video.
    """

    def __init__(self, path: str | os.PathLike, in_chans: int = 3) -> None:
        self.path, self.format = path, _FORMATS[in_chans]
        try:
            self.container = av.open(os.fspath(path))
        except Exception as error:
            raise self._failed(error) from error
        try:
            if not self.container.streams.video:
                raise OSError("it has no video stream")
            self.stream = self.container.streams.video[0]
            self.stream.thread_type, self.stream.codec_context.thread_count = "SLICE", 1
            self._read_times()
        except Exception as error:
            self.container.close()
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        return OSError(f"{self.path} cannot be decoded: {error}")

    def _read_times(self) -> None:
        """The frames' times in order of display, and where decoding can begin."""
        packets = [p for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        if not packets:
            raise OSError("it has no frames")
        if any(p.pts is None for p in packets):
            self._number_frames()
            return
        self.times = sorted({p.pts for p in packets})
        # A container's index may be by either time; the decoding one is never the later.
        keys = sorted(
            (p.pts, p.pts if p.dts is None else min(p.dts, p.pts)) for p in packets if p.is_keyframe
        )
        self.key_times, self.seek_times = [pts for pts, _ in keys], [dts for _, dts in keys]

    def _number_frames(self) -> None:
        """Where a format has no times: count what comes out, and always begin at the start."""
        self.container.seek(0)
        self.times = list(range(sum(1 for _ in self.container.decode(self.stream))))
        self.key_times, self.seek_times = [], []

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """See `Video`."""
        places = sorted(set(indices))
        shown: dict[int, np.ndarray] = {}
        try:
            for run in self._runs([self.times[i] for i in places]):
                shown |= self._decode(run)
            return np.stack([shown[self.times[i]] for i in indices])
        except Exception as error:  # A damaged file can make a decoder raise nearly anything.
            raise self._failed(error) from error

    def _runs(self, times: Sequence[int]) -> Iterator[list[int]]:
        """Times that one pass decodes: a keyframe on the way to the next is better jumped to."""
        run = [times[0]]
        for last, time in pairwise(times):
            if bisect_right(self.key_times, time) > bisect_right(self.key_times, last):
                yield run
                run = []
            run.append(time)
        yield run

    def _decode(self, times: Sequence[int]) -> dict[int, np.ndarray]:
        """The pictures shown at ascending times."""
        shown, waiting, previous = {}, list(times), None
        for time, frame in self._from(times[0]):
            while waiting and time > waiting[0]:
                # No frame has this very time: the one before is still on the screen.
                shown[waiting.pop(0)] = self._to_array(previous or frame)
            if waiting and time == waiting[0]:
                shown[waiting.pop(0)] = self._to_array(frame)
            if not waiting:
                return shown
            previous = frame
        if previous is None:
            raise OSError("it ends too early")
        return shown | {time: self._to_array(previous) for time in waiting}

    def _from(self, time: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode from a frame on that is shown at a time or before, each with its time."""
        if not self.key_times:
            self.container.seek(0)
            yield from enumerate(self.container.decode(self.stream))
            return
        last = bisect_right(self.key_times, time) - 1
        for key in range(max(last, 0), -1, -1):
            self.container.seek(self.seek_times[key], stream=self.stream)
            decoded = self.container.decode(self.stream)
            first = next(decoded, None)
            if first is not None and (first.pts <= time or key == 0):
                yield first.pts, first
                yield from ((frame.pts, frame) for frame in decoded)
                return

    def _to_array(self, frame: av.VideoFrame) -> np.ndarray:
        """`[H, W, C]`, upright as a player shows it."""
        picture = frame.to_ndarray(format=self.format)
        picture = picture[..., None] if picture.ndim == 2 else picture
        return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


class FrameFolder:
    """A folder of pictures, one a frame, in the order of the numbers in their names.

    Args:
        path: the folder.
        in_chans: 1 or 3.

    Raises:
        OSError: no picture in it.
    """

    def __init__(self, path: str | os.PathLike, in_chans: int = 3) -> None:
        self.path, self.in_chans = Path(path), in_chans
        self.names = frame_names(os.listdir(path))
        if not self.names:
            raise OSError(f"{path} cannot be decoded: it is a folder without pictures")

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> "FrameFolder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """See `Video`."""
        pictures = {
            i: np.asarray(load_image(self.path / self.names[i], self.in_chans))
            for i in set(indices)
        }
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise OSError(f"{self.path} cannot be decoded: its frames have different sizes")
        return np.stack([pictures[i].reshape(*pictures[i].shape[:2], -1) for i in indices])


def frame_names(names: Iterable[str]) -> list[str]:
    """The pictures among a folder's names, "2.jpg" before "10.jpg"."""
    pictures = (n for n in names if n.lower().endswith(IMAGE_EXTENSIONS) and n[0] != ".")
    return sorted(pictures, key=lambda n: [int(p) if p.isdigit() else p for p in _NUMBER.split(n)])


_NUMBER = re.compile(r"(\d+)")


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: int, **options: str) -> None:
    """Write an H.264 file that any player shows.

    Args:
        path: the file.
        frames: `[T, H, W, 3]`, uint8, height and width even.
        fps: frames a second.
        **options: of the encoder, such as `crf="18"` and `g="12"`.
    """
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
