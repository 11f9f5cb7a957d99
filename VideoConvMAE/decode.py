"""Frames of videos: files by PyAV, folders of pictures by Pillow; only the frames asked for."""

import contextlib
import errno
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import av
import numpy as np
from PIL import Image

from util.data.files import is_of_storage, open_regular, reason_of, retried
from util.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, load_image

VIDEO_EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg"),
    *(".ts", ".wmv", ".flv", ".3gp", ".ogv"),
)
_FORMATS = {1: "gray", 3: "rgb24"}
# FFmpeg's readers that may take a file by its content: containers and bare streams, and none that
# opens what a file names (playlists, lists of files, descriptions of sessions).
DEMUXERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "mxf", "gif"),
    *("mpegvideo", "m4v", "h264", "hevc", "ivf", "obu"),
)
# Python opens the file, so FFmpeg needs no way to open any.
_OPTIONS = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "none"}
_BUFFER = 1 << 16  # bytes that FFmpeg asks for at a time
T = TypeVar("T")


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


def open_video(
    path: str | os.PathLike,
    in_chans: int = 3,
    short_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Video:
    """Open a video file, or a folder of pictures.

    Args:
        path: a file of one of the formats in `DEMUXERS`, whatever its ending, or a folder.
        in_chans: 1 for grayscale, 3 for RGB.
        short_side: frames whose shorter side has more pixels are scaled down to it as they are
            decoded, so that a clip of 1080p costs no more than one of that size; None: never.
        max_pixels: a video of larger frames is not decoded.

    Raises:
        OSError: nothing there, or nothing that can be decoded.
        TrainingError: the storage fails, see `util.data.files.retried`; later, too.
    """
    kind = FrameFolder if os.path.isdir(path) else VideoFile
    return kind(path, in_chans, short_side, max_pixels)


def scaled_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(H, W) with the proportions kept and the shorter side at most `short_side`."""
    if short_side is None or min(height, width) <= short_side:
        return height, width
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


class _File:
    """A file that FFmpeg reads through Python, as it takes an error of the storage for its end.

    Attributes:
        name: of the file; "file:", because a name may look like an address.
        error: the first error of the storage, if there was one.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.name, self.error = f"file:{os.fspath(path)}", None
        self._file = open_regular(path)
        self.tell, self.close = self._file.tell, self._file.close

    def read(self, size: int) -> bytes:
        """The next bytes."""
        return self._noted(self._file.read, size)

    def seek(self, offset: int, whence: int) -> int:
        """Go to another place; -1 if there is no such place."""
        try:
            return self._noted(self._file.seek, offset, whence)
        except (ValueError, OverflowError):
            return -1

    def _noted(self, call: Callable[..., T], *args: int) -> T:
        try:
            return call(*args)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a place before the file's beginning
                raise ValueError(error) from error
            self.error = self.error or error
            raise


class VideoFile:
    """A video file, with the times of its frames read from its packets.

    That needs no decoding, and frames are then found by their times, exactly, whatever the
    container's header says and however the codec reorders them. A decoder runs in one thread:
    the workers of a loader decode side by side.

    Args:
        path: the file.
        in_chans: 1 or 3.
        short_side: pixels that a larger frame's shorter side is scaled down to.
        max_pixels: a video of larger frames is not decoded.

    Raises:
        OSError: it cannot be read, is of no format in `DEMUXERS`, or holds no video.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        in_chans: int = 3,
        short_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path, self.format, self.short_side = path, _FORMATS[in_chans], short_side
        self.max_pixels = max_pixels
        self.file = self.container = None
        self.key_times: list[int] = []
        self.seek_times: list[tuple[int, int]] = []
        self._read(self._read_times)

    def _read(self, read: Callable[[], T]) -> T:
        """The result of `read`, again from a file opened anew where the storage failed."""
        try:
            return retried(partial(self._read_once, read), self.path)
        except BaseException:
            self.__exit__()
            raise

    def _read_once(self, read: Callable[[], T]) -> T:
        try:
            if self.file is None:
                self._open()
            result = read()
            self._check_storage()
            return result
        except Exception as error:  # A damaged file can make a decoder raise nearly anything.
            cause = (self.file and self.file.error) or error
            self.__exit__()
            if isinstance(cause, av.FFmpegError):
                reason = cause.strerror
            elif isinstance(cause, OSError):
                if is_of_storage(cause):
                    raise cause from None
                reason = reason_of(cause, str(self.path))
            else:
                reason = cause
            raise OSError(f"{self.path} cannot be decoded: {reason}") from error

    def _check_storage(self) -> None:
        """Raise what the storage is to blame for, whatever FFmpeg made of it."""
        if self.file is not None and self.file.error is not None:
            raise self.file.error

    def _open(self) -> None:
        """Open the file, or begin at its start again."""
        self._check_storage()
        self.__exit__()
        self.file = _File(self.path)
        try:
            self.container = av.open(self.file, options=_OPTIONS, buffer_size=_BUFFER)
        except av.error.ArgumentError:
            raise OSError(f"it is of no format of {', '.join(DEMUXERS)}") from None
        if not self.container.streams.video:
            raise OSError("it has no video stream")
        self.stream = self.container.streams.video[0]
        codec = self.stream.codec_context
        if codec.width * codec.height > self.max_pixels:
            raise OSError(
                f"its {codec.width} x {codec.height} pixels are more than --max_pixels "
                f"{self.max_pixels}"
            )
        codec.options = {"max_pixels": str(self.max_pixels)}  # of frames that grow on the way
        self.stream.thread_type, codec.thread_count = "SLICE", 1

    def _read_times(self) -> None:
        """The frames' times in order of display, and where decoding can begin."""
        packets = [p for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        if not packets:
            raise OSError("it has no frames")
        times = [p.pts for p in packets]
        # Files joined end to end have the same times again.
        self.timed = None not in times and len(set(times)) == len(times)
        if not self.timed:  # count what comes out, and always begin at the start
            self._open()
            self.times = list(range(sum(1 for _ in self.container.decode(self.stream))))
            return
        self.times = sorted(times)
        keys = sorted((p.pts, p.dts or p.pts) for p in packets if p.is_keyframe)
        self.key_times, self.seek_times = [pts for pts, _ in keys], keys

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.container is not None:
            self.container.close()
        if self.file is not None:
            self.file.close()
        self.file = self.container = None

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """See `Video`."""
        return self._read(partial(self._frames, indices))

    def _frames(self, indices: Sequence[int]) -> np.ndarray:
        places = sorted(set(indices))
        shown: dict[int, np.ndarray] = {}
        for run in self._runs([self.times[i] for i in places]):
            shown |= self._decode(run)
        return np.stack([shown[self.times[i]] for i in indices])

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
        """Decode from a keyframe on that is shown at a time or before, each frame with its time.

        The first frame and the rest come from one iterator: a second one finds a decoder without
        frames if the first had to read the file to its end to give one.
        """
        last = bisect_right(self.key_times, time)
        # Containers find keyframes by the time of display or by that of decoding, or by neither.
        for target in (t for times in self.seek_times[:last][::-1][:2] for t in times):
            first, rest = self._seek(target)
            if first is not None and first.pts <= time and first.pts in self.key_times:
                yield first.pts, first
                break
        else:
            self._open()
            rest = self.container.decode(self.stream)
        for number, frame in enumerate(rest):
            yield frame.pts if self.timed else number, frame

    def _seek(self, target: int) -> tuple[av.VideoFrame | None, Iterator[av.VideoFrame]]:
        """The first frame that comes after a jump, if there is one, and those after it."""
        rest = self.container.decode(self.stream)
        with contextlib.suppress(av.FFmpegError):
            self.container.seek(target, stream=self.stream)
            return next(rest, None), rest
        return None, rest

    def _to_array(self, frame: av.VideoFrame) -> np.ndarray:
        """`[H, W, C]`, upright as a player shows it."""
        height, width = scaled_size(frame.height, frame.width, self.short_side)
        picture = frame.to_ndarray(format=self.format, width=width, height=height)
        picture = picture[..., None] if picture.ndim == 2 else picture
        return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


class FrameFolder:
    """A folder of pictures, one a frame, in the order of the numbers in their names.

    Args:
        path: the folder.
        in_chans: 1 or 3.
        short_side: pixels that a larger frame's shorter side is scaled down to.
        max_pixels: a video of larger frames is not decoded.

    Raises:
        OSError: no picture in it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        in_chans: int = 3,
        short_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path, self.in_chans, self.short_side = Path(path), in_chans, short_side
        self.max_pixels = max_pixels
        self.names = frame_names(retried(partial(os.listdir, path), path))
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
        pictures = {i: self._load(self.names[i]) for i in set(indices)}
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise OSError(f"{self.path} cannot be decoded: its frames have different sizes")
        return np.stack([pictures[i].reshape(*pictures[i].shape[:2], -1) for i in indices])

    def _load(self, name: str) -> np.ndarray:
        picture = load_image(self.path / name, self.in_chans, self.max_pixels)
        height, width = scaled_size(picture.height, picture.width, self.short_side)
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


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
