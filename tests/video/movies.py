"""Real video files for the tests, each frame of which tells its number."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def numbered_frames(count: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """`[count, H, W, 3]`: 8-pixel squares that code the frame's number in black and white."""
    noise = np.random.default_rng(seed).integers(60, 190, (count, height // 8, width // 8))
    for i in range(count):
        noise[i].flat[:8] = [255 * (i >> bit & 1) for bit in range(8)]
    squares = np.kron(noise, np.ones((1, 8, 8))).astype(np.uint8)
    return np.repeat(squares[..., None], 3, axis=-1)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that decoded frames `[n, H, W, C]` of `numbered_frames` tell."""
    squares = frames[..., 0].reshape(len(frames), -1, 8, frames.shape[2] // 8, 8).mean((2, 4))
    bits = squares.reshape(len(frames), -1)[:, :8] > 128
    return [int(sum(1 << b for b in range(8) if row[b])) for row in bits]


def write_movie(
    path: Path, count: int = 40, codec: str = "libx264", rotation: int = 0, **options: str
) -> Path:
    """A file in which each frame tells its number; the container is that of the path's ending."""
    # libx265 writes beyond its buffers for frames smaller than its blocks of 64 pixels.
    size = (64, 96) if codec == "libx265" else (32, 48)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        frames = numbered_frames(count, *size, seed=len(path.name))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_classes(root: Path, counts: dict[str, dict[str, int]], frames: int = 12) -> Path:
    """`root/split/class/*.mp4`, so many of each."""
    for split, classes in counts.items():
        for name, count in classes.items():
            for i in range(count):
                write_movie(root / split / name / f"{i:02d}.mp4", frames, preset="ultrafast")
    return root
