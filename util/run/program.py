"""A program from its command line to its exit code."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from util.errors import TrainingError, UsageError, printable
from util.run.distributed import complain, print_once
from util.signals import (
    INTERRUPTED,
    NOTHING_TO_SAVE,
    hand_over_interrupts,
    stopped_exit_code,
)

# A full disk, a full quota, a file larger than may be.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the system refuses for the sake of a path or of who asks; no fault of the program's.
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)


class Stopped(BaseException):
    """The run was asked to stop and has saved its state: exit 0.

    Like KeyboardInterrupt no Exception: what is raised wherever the signal finds the program must
    not be taken for an error there.
    """


class StoppedEarly(Stopped):
    """This process was asked to stop before there was anything to save: exit 0 as well."""


def run_main(
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    *,
    is_run: bool = False,
) -> int:
    """Run a main to its exit code: 0 done or saved on a signal, 2 bad use, 1 failed, 130 Ctrl-C.

    The environment variable `STOPPED_EXIT_CODE` is that of a run saved on a signal.

    Args:
        main: the program.
        args: of its command line.
        is_run: SIGTERM and SIGUSR1 end it as they end a run in training, from the start on.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be any bytes
        stream.reconfigure(errors="surrogateescape")
    code, together = 0, 0
    try:
        hand_over_interrupts()
        if is_run:
            stop_early_on_signals()
        main(args)
    except StoppedEarly as stop:
        print_once(stop)
        code, together = stopped_exit_code(), None
    except Stopped as stop:
        print_once(stop)
        code = together = stopped_exit_code()
    except UsageError as error:
        complain(f"error: {error}")
        code = 2
    except TrainingError as error:
        complain(f"failed: {error}")
        code = 1
    except OSError as error:
        if error.errno in FULL:
            complain(f"failed: the disk or the quota is full: {error}")
        elif error.errno in _FORBIDDEN and error.filename is not None:
            complain(f"failed: {error.filename}: {error.strerror}")
        else:
            raise
        code = 1
    except torch.OutOfMemoryError as error:
        complain(
            f"failed: the GPU's memory is full ({printable(error, 120)}): lower --batch_size, in a "
            f"training with --accum_iter raised as much, or give --grad_checkpointing"
        )
        code = 1
    except KeyboardInterrupt:
        complain("interrupted: the last checkpoint counts, if one was saved (SIGTERM saves first)")
        code = INTERRUPTED
    # Only where all processes get here: after a failure the others may wait in a collective.
    if dist.is_initialized() and code == together:
        dist.destroy_process_group()
    return code


def stop_early_on_signals() -> None:
    """End this process with `StoppedEarly` on SIGTERM and SIGUSR1, until training handles them."""
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # data workers inherit this; their run ends them
            raise StoppedEarly(NOTHING_TO_SAVE)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
