"""Many paths in little memory, which processes share."""

import os
from collections.abc import Iterable, Sequence

import numpy as np


class Paths(Sequence[str]):
    """Paths by number, as they were given, in two blocks of memory.

    A list's strings take thrice the memory, and each worker process would copy it bit by bit as it
    touches them. In a numpy array of strings every path takes as much as the longest.

    Args:
        paths: as `os.fsencode` takes them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._text, ends = bytearray(), []
        for path in paths:
            self._text += os.fsencode(path)
            ends.append(len(self._text))
        self._ends = np.array([0, *ends])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]
        start, end = self._ends[place : place + 2]
        return os.fsdecode(bytes(self._text[start:end]))
