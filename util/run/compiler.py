"""The settings of compiled steps."""

import argparse

import torch
from torch._functorch import config as functorch

from util.errors import UsageError
from util.layers.codegen import missing_for_compile
from util.run.distributed import print_once


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
    if args.compile and (lack := missing_for_compile(device)):
        if asked:
            raise UsageError(f"--compile: torch.compile needs {lack}; or run with --no_compile")
        print_once(
            f"note: not compiled, as torch.compile needs {lack}: steps take longer", error=True
        )
        args.compile = False
    budget = getattr(args, "memory_budget", 1.0)  # a probe has none
    functorch.activation_memory_budget = budget
    if budget < 1 and not args.compile:
        raise UsageError("--memory_budget is for compiled steps, and these are not compiled")
