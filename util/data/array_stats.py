"""Mean, standard deviation and percentiles of each channel of many arrays, read strip by strip."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util.data.array_views import ArrayFormat
from util.data.arrays import ChannelsError, Picture
from util.data.crop import Box
from util.data.files import reason_of
from util.data.folders import ImageFolder
from util.data.shards import Shards
from util.errors import UsageError

# Numbers of a strip of a picture, over its channels.
_STRIP = 1 << 24
# Pixels of a file by which percentiles are measured, spread over it.
SAMPLES = 4096


def measure(
    files: ImageFolder | Shards,
    form: ArrayFormat,
    percentiles: tuple[float, float] | None = None,
    indices: Sequence[int] | None = None,
) -> tuple[dict[str, list[float]], list[str]]:
    """Statistics of each channel over all pixels with data, those of large pictures more.

    Args:
        files: to measure.
        form: of them; of its numbers only `nodata` counts.
        percentiles: between which mean and deviation are taken, the rest being set to them; they
            are measured on `SAMPLES` pixels of each file.
        indices: the files to take; all by default.

    Returns:
        "mean" and "std", with percentiles also "clip_min" and "clip_max", a number each channel;
        and the files that cannot be decoded, with the reason.

    Raises:
        UsageError: channels that are not those of the format, or one without any data.
        TrainingError: the storage fails.
    """
    found: dict[str, list[float]] = {}
    indices = range(len(files)) if indices is None else indices
    if percentiles:
        low, high = _percentiles(files, form, percentiles, indices)
        form = replace(form, clip_min=tuple(low), clip_max=tuple(high))
        found = {"clip_min": low, "clip_max": high}
    bad: list[str] = []
    count, mean, squares = (np.zeros(form.in_chans) for _ in range(3))
    for picture in _pictures(files, form, bad, indices):
        for strip in _strips(picture, form):
            values = strip.flatten(1).double().numpy()
            valid = ~np.isnan(values)
            new = valid.sum(axis=1)
            total = np.where(valid, values, 0).sum(axis=1)
            new_mean = total / np.maximum(new, 1)
            spread = (np.where(valid, values - new_mean[:, None], 0) ** 2).sum(axis=1)
            # Chan, Golub and LeVeque's update, which loses no digits to a large mean.
            shift, both = new_mean - mean, np.maximum(count + new, 1)
            squares += spread + shift**2 * count * new / both
            mean += shift * new / both
            count += new
    if not count.all():
        raise UsageError(
            f"channel {int(np.argmin(count)) + 1} has no data in {files.root}"
            + (f"; first: {bad[0]}" if bad else "")
        )
    std = np.sqrt(squares / count)
    return {"mean": mean.tolist(), "std": std.tolist(), **found}, bad


def _pictures(
    files: ImageFolder | Shards, form: ArrayFormat, bad: list[str], indices: Iterable[int]
) -> Iterator[Picture]:
    """Each picture that can be decoded, to be read before the next; `bad` gets the others."""
    for index in tqdm(indices, "measure", disable=None, leave=False):
        try:
            with files.open(index) as file:
                yield form.open(file)
        except ChannelsError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            path = files.path(index)
            bad.append(f"{path} cannot be decoded: {reason_of(error, path)}")


def _strips(picture: Picture, form: ArrayFormat) -> Iterator[Tensor]:
    """A picture from top to bottom: `[in_chans, rows, width]`."""
    width, height = picture.size
    rows = max(1, _STRIP // (width * picture.channels))
    for top in range(0, height, rows):
        yield form.read(picture, Box(top, 0, min(rows, height - top), width))


def _percentiles(
    files: ImageFolder | Shards,
    form: ArrayFormat,
    percentiles: Sequence[float],
    indices: Iterable[int],
) -> tuple[list[float], list[float]]:
    samples = []
    for picture in _pictures(files, form, [], indices):
        width, height = picture.size
        step = max(1, math.isqrt(width * height // SAMPLES))
        rows = [
            form.read(picture, Box(top, 0, 1, width))[:, 0, ::step]
            for top in range(0, height, step)
        ]
        samples.append(torch.cat(rows, dim=1))
    if not samples:
        raise UsageError(f"no file of {files.root} can be decoded")
    values = torch.cat(samples, dim=1).numpy()
    if np.isnan(values).all(axis=1).any():
        raise UsageError(f"a channel has no data in {files.root}")
    low, high = np.nanpercentile(values, percentiles, axis=1)
    return low.tolist(), high.tolist()
