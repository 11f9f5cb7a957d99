"""Names of classes: those of a folder beside those that a model knows."""

import os
from collections.abc import Sequence

import numpy as np

from util.errors import UsageError

# In the place of a label that is not known; torch's losses leave such rows out.
NO_LABEL = -100


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unseen(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Names of the classes that no label means.

    Args:
        labels: `[n]`, places in `classes`, or `NO_LABEL`.
        classes: names.
    """
    counts = np.bincount(labels[labels != NO_LABEL], minlength=len(classes))
    return [classes[label] for label in np.flatnonzero(counts == 0)]


def check_classes(
    known: Sequence[str], found: Sequence[str], known_by: str, folder: str | os.PathLike
) -> None:
    """Refuse a folder whose labels would mean something else than the model's outputs.

    Args:
        known: names of the classes in the order of the outputs.
        found: those of the folder.
        known_by: who knows them, for the message.
        folder: where `found` was found.

    Raises:
        UsageError: classes of another number, other names or another order.
    """
    if list(known) == list(found):
        return
    lacking, foreign = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    if not lacking and not foreign:
        first = next(i for i, (a, b) in enumerate(zip(known, found, strict=True)) if a != b)
        difference = (
            f"the same names in another order (output {first} is {known[first]} there, "
            f"{found[first]} here): labels would be compared with the wrong outputs"
        )
    else:
        parts = []
        if lacking:
            parts.append(f"it lacks {some(lacking)}")
        if foreign:
            parts.append(f"it has {some(foreign)}, which are not there")
        difference = "; ".join(parts)
        if lacking and not foreign:
            difference += " (an empty folder stands for a class without images)"
    raise UsageError(
        f"{folder} does not hold the classes of {known_by}: "
        f"{len(found)} here, {len(known)} there; {difference}"
    )
