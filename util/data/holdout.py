"""A share of labelled files held out to validate on, of each class alike."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from util.errors import UsageError


def held_out(
    paths: Sequence[str], labels: Sequence[object], share: float, seed: int, root: str | os.PathLike
) -> np.ndarray:
    """The files to validate on: `share` of each class, rounded, and never all of it.

    A file is chosen by its path below `root` and the seed, so that the choice is the same on every
    machine and for the other files hardly changes when some are added.

    Args:
        paths: of the files.
        labels: their classes.
        share: above 0 and below 1.
        seed: of the choice.
        root: of the data.

    Returns:
        `[n]`, bool.

    Raises:
        UsageError: no class is large enough to give a file.
    """
    keys = [_key(os.path.relpath(path, root), seed) for path in paths]
    members: dict[object, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = np.zeros(len(paths), bool)
    for indices in members.values():
        count = min(int(share * len(indices) + 0.5), len(indices) - 1)
        chosen[sorted(indices, key=keys.__getitem__)[:count]] = True
    if not chosen.any():
        largest = max(map(len, members.values()), default=0)
        raise UsageError(
            f"--val_share {share:g} of the largest class of {root}, {largest} files, is none: "
            f"give a larger share"
        )
    return chosen


def _key(path: str, seed: int) -> bytes:
    text = f"{seed} {path}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=8).digest()
