"""Train or evaluate Mask R-CNN: `python -m DET.train_net --config-file DET/configs/FILE.py`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import torch

from util.errors import UsageError
from util.run.parser import Parser, complete_resume, non_negative_int, positive_int
from util.run.program import run_main

INSTALL = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m DET.train_net",
        description="Train Mask R-CNN with a ConvViT backbone, or evaluate it.",
    )
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a recipe, such as those in DET/configs",
    )
    add("--eval-only", action="store_true", help="evaluate the detector train.init_checkpoint")
    add(
        "--resume",
        default="none",
        metavar="FILE",
        help="checkpoint to go on from; auto, or no value: the last in train.output_dir, if any; "
        "none: begin anew",
    )
    add(
        "--output_dir",
        metavar="DIR",
        help="checkpoints and logs, the same as train.output_dir=DIR",
    )
    add(
        "--num-gpus",
        type=non_negative_int,
        metavar="N",
        help="of this machine; 0: the CPU (default: 1 if there is one)",
    )
    add("--num-machines", type=positive_int, default=1, metavar="N", help="of the run")
    add(
        "--machine-rank",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="number of this machine, from 0",
    )
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet, with several machines tcp://HOST:PORT of the first",
    )
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the recipe, such as train.output_dir=output/det train.epochs=50",
    )
    args = parser.parse_intermixed_args(complete_resume(argv))
    if args.output_dir is not None:
        if any(text.startswith("train.output_dir=") for text in args.overrides):
            parser.error("--output_dir and train.output_dir say the same: give one of them")
        quoted = args.output_dir.replace("'", "\\'")
        args.overrides.append(f"train.output_dir='{quoted}'")
    return args


def check_installed() -> None:
    """Refuse to go on without Detectron2.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        importlib.import_module("detectron2.engine")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "detectron2":
            raise UsageError(f"Detectron2 is not installed: {INSTALL}") from error
        raise UsageError(
            f"Detectron2 needs {error.name}: pip install -r requirements-det.txt"
        ) from error


def choose_gpus(args: argparse.Namespace) -> None:
    """Complete `num_gpus`.

    Raises:
        UsageError: more GPUs than there are, or machines that cannot meet.
    """
    there = torch.cuda.device_count()
    if args.num_gpus is None:
        args.num_gpus = min(1, there)
    if args.num_gpus > there:
        raise UsageError(f"--num-gpus {args.num_gpus}: {there} are visible; 0 is the CPU")
    if args.num_machines > 1 and (args.dist_url == "auto" or not args.num_gpus):
        raise UsageError("--num-machines needs GPUs, and --dist-url tcp://HOST:PORT of the first")


def pass_on_signals() -> None:
    """Let SIGTERM and SIGUSR1 reach the processes of the GPUs, which save and leave."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)


def work(args: argparse.Namespace) -> None:
    """Entry point of each process of a run; exits with its code."""
    from DET.engine import run

    code = run_main(run, args, is_run=True)
    if code:
        raise SystemExit(code)


def main(args: argparse.Namespace) -> None:
    """Check the command line, then start one process a GPU."""
    choose_gpus(args)
    check_installed()
    from detectron2.engine import launch

    from DET.config import load_config

    load_config(args.config_file, args.overrides)  # a bad one is told once, before all else
    if args.num_gpus * args.num_machines > 1:
        pass_on_signals()
    try:
        launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
    except torch.multiprocessing.ProcessExitedException as error:
        raise SystemExit(error.exit_code or 1) from None


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
