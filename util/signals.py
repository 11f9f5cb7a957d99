"""Ctrl-C and SIGTERM from a program's first line on, while the libraries are still imported.

Those take seconds. This module is imported before them, so it imports none.
"""

import os
import signal
from types import FrameType

# Environment variable by which a launcher can tell a run that stopped from one that is done.
STOPPED_EXIT_CODE = "STOPPED_EXIT_CODE"
NOTHING_TO_SAVE = "stopped by a signal: there was nothing to save yet"
INTERRUPTED = 130  # what shells make of Ctrl-C


def leave_on_signals(*, is_run: bool = False) -> None:
    """Have Ctrl-C end this process at once, with one line; until `run_main` handles it.

    Args:
        is_run: SIGTERM and SIGUSR1 end it too, as they end a run in training.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, by nohup say
        signal.signal(signal.SIGINT, _leave)
    if is_run:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _leave)


def hand_over_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped_exit_code() -> int:
    """The exit code of a run that a signal stopped."""
    return int(os.environ.get(STOPPED_EXIT_CODE, 0))


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process: an exception could be lost in what a library does as it is imported."""
    stream, line, code = 1, NOTHING_TO_SAVE, stopped_exit_code
    if number == signal.SIGINT:
        stream, line, code = 2, "interrupted", lambda: INTERRUPTED
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(stream, f"{line}\n".encode())
    os._exit(code())
