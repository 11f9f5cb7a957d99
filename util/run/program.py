"""A program from its command line to its exit code."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from util.errors import TrainingError, UsageError
from util.run.distributed import print_once

# Environment variable by which a launcher can tell a run that stopped from one that is done.
STOPPED_EXIT_CODE = "STOPPED_EXIT_CODE"


class Stopped(Exception):
    """The run was asked to stop and has saved its state: exit 0."""


def run_main(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Run a main to its exit code: 0 done or saved on a signal, 2 bad use, 1 failed.

    The environment variable `STOPPED_EXIT_CODE` is that of a run saved on a signal.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be any bytes
        stream.reconfigure(errors="surrogateescape")
    code = together = 0
    try:
        main(args)
    except Stopped as stop:
        print_once(stop)
        code = together = int(os.environ.get(STOPPED_EXIT_CODE, 0))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except TrainingError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"failed: the disk or the quota is full: {error}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint counts", file=sys.stderr, flush=True)
        code = 130
    # Only where all processes get here: after a failure the others may wait in a collective.
    if dist.is_initialized() and code == together:
        dist.destroy_process_group()
    return code
