"""Errors that end a program with one line instead of a traceback."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from util.signals import leave_on_signals


class UsageError(ValueError):
    """Bad use: the message is one clear line saying what is wrong and what would be right.

    Mains print it and exit with 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on: one clear message; mains print it and exit with 1."""


def printable(text: object, most: int = 80) -> str:
    """The beginning of a text that a file holds, for a message of one line."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def require_for_programs(module: str, requirements: str, runs: Sequence[str] = ()) -> None:
    """End a program of a package, in whose `__init__` this stands, if it lacks an optional module.

    From here on it answers signals, as the package imports more than its program does.

    Args:
        module: what the programs need.
        requirements: the file that installs it.
        runs: programs that SIGTERM and SIGUSR1 end as they end a run in training.
    """
    looking = sys.argv[0] == "-m"  # so it is while `python -m` imports the program's package
    if looking and not find_spec(module):
        print(f"error: {module} is not installed: pip install -r {requirements}", file=sys.stderr)
        raise SystemExit(2)
    if looking:
        leave_on_signals(is_run=not {*runs}.isdisjoint(sys.orig_argv))
