"""What torch.compile needs of a machine."""

import argparse
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch._functorch import config as functorch

from util.errors import UsageError
from util.run.distributed import print_once

# Triton's code runs on GPUs from this compute capability on.
OLDEST_GPU = (7, 0)


def settle_compile(args: argparse.Namespace, asked: bool | None, device: torch.device) -> None:
    """Run without torch.compile, and say so, where it cannot work and was not asked for.

    The memory budget of compiled steps holds for this process from here on.

    Args:
        args: completed arguments; `compile` becomes False there.
        asked: `--compile` as it was given, None for not at all.
        device: where the model runs.

    Raises:
        UsageError: it was asked for; a memory budget for steps that are not compiled.
    """
    budget = getattr(args, "memory_budget", 1.0)
    functorch.activation_memory_budget = budget
    if budget != 1 and not args.compile:
        raise UsageError("--memory_budget is for compiled steps: give --compile too")
    if not args.compile or not (lack := missing_for_compile(device)):
        return
    if asked:
        raise UsageError(f"--compile: torch.compile needs {lack}; or run with --no_compile")
    print_once(f"note: not compiled, as torch.compile needs {lack}: steps take longer", error=True)
    args.compile = False


def missing_for_compile(device: torch.device) -> str:
    """What torch.compile lacks here to generate code for a device; "" where all is there."""
    name, programs = (
        ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    )
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton (pip install triton)"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return f"a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or newer"
    given = os.environ.get(name)
    if not any(map(shutil.which, [given] if given else programs)):
        return f"a compiler ({given or ' or '.join(programs)}: apt-get install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h: apt-get install python3-dev)"
    return ""
