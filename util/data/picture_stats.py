"""Mean and standard deviation of each channel of many 8-bit pictures, by counting their values."""

from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from util.data.folders import ImageFolder
from util.data.images import MAX_PIXELS, load_image
from util.data.shards import Shards
from util.data.transforms import Stats
from util.errors import UsageError


def measure_pictures(
    files: ImageFolder | Shards,
    in_chans: int,
    max_pixels: int = MAX_PIXELS,
    indices: Iterable[int] | None = None,
) -> tuple[Stats, list[str]]:
    """Statistics over all pixels of the pictures that a run reads, exact; large ones count more.

    Args:
        files: to measure.
        in_chans: as which they are read: 1 (gray), 3 (RGB) or 4 (RGB and alpha).
        max_pixels: a larger picture is left out.
        indices: the files to take; all by default.

    Returns:
        Mean and deviation of each channel, for values in [0, 1]; and the files that cannot be
        decoded, with the reason.

    Raises:
        UsageError: none can be decoded.
        TrainingError: the storage fails.
    """
    counts, bad = np.zeros((in_chans, 256), np.int64), []
    chosen = range(len(files)) if indices is None else indices
    for index in tqdm(chosen, "measure", disable=None, leave=False):
        try:
            with files.open(index) as file:
                counts += _histogram(np.asarray(load_image(file, in_chans, max_pixels)))
        except OSError as error:
            bad.append(str(error))
    total = counts[0].sum()
    if not total:
        raise UsageError(f"no file of {files.root} can be decoded; first: {bad[0]}")
    values = np.arange(256) / 255
    mean = counts @ values / total
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(axis=1) / total)
    return (tuple(mean.tolist()), tuple(std.tolist())), bad


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Counts of each value in each channel of `[H, W(, C)]`, uint8: `[C, 256]`."""
    channels = pixels.reshape(-1, pixels.shape[2] if pixels.ndim == 3 else 1).T
    return np.stack([np.bincount(channel, minlength=256) for channel in channels])
