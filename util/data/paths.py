"""Many paths in little memory, which processes share."""

import os
from array import array
from collections.abc import Iterable, Sequence


class Paths(Sequence[str]):
    """Paths by number, as they were given, in two blocks of memory.

    A list's strings take thrice the memory, and each worker process would copy it bit by bit as it
    touches them. In a numpy array of strings every path takes as much as the longest.

    Args:
        paths: as `os.fsencode` takes them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        text, self._ends = bytearray(), array("q", [0])
        for path in paths:
            text += os.fsencode(path)
            self._ends.append(len(text))
        self._text = bytes(text)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        place = index if index >= 0 else len(self) + index
        if place < 0:
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[place] : self._ends[place + 1]])
