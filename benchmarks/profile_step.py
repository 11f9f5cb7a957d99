"""Profile of a training step: `python -m benchmarks.profile_step --help`.

Profiles one form of `pretrain_step` or `finetune_step` with torch's profiler, prints the time by
kind of work and by operation, and writes a trace for chrome://tracing or ui.perfetto.dev.
"""

import argparse
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from benchmarks import finetune_step, pretrain_step
from benchmarks.measuring import environment, print_environment
from benchmarks.steps import Form, ready_step, settle_options
from util.errors import UsageError
from util.run.distributed import use_fast_kernels
from util.run.logger import markdown_table
from util.run.parser import positive_int

PROGRAMS = {"pretrain": pretrain_step, "finetune": finetune_step}
WARMUP_STEPS = 3

# Kinds of work by the names of operations (CPU) or kernels (CUDA); the first that fits counts.
KINDS = {
    "compiled and fused": r"^triton",
    "attention": r"scaled_dot_product|flash|fmha|attention",
    "convolution": r"conv|dgrad|wgrad|fprop|depthwise",
    "matrix products": r"\bmm\b|addmm|bmm|gemm|cutlass|xmma|nvjet|matmul",
    "optimizer": r"adam|multi_tensor|foreach|lamb(?!da)",
    "norms": r"norm",
    "GELU": r"gelu",
    "copies and layout": r"copy|memcpy|memset|fill|zero|cat|clone|contiguous",
    "gather and scatter": r"index|gather|scatter",
    "sums": r"sum|mean|reduce|var",
}


def kind_of(name: str) -> str:
    """The kind of work of an operation or a kernel."""
    lowered = name.lower()
    return next((kind for kind, names in KINDS.items() if re.search(names, lowered)), "other")


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, object]:
    """Read the command line: the program first, then its own options and three more.

    Returns:
        The options, and the program's module.
    """
    if not argv or argv[0] not in PROGRAMS:
        argv = ["pretrain", *argv]
    module = PROGRAMS[argv[0]]
    parser = module.get_args_parser()
    parser.prog = f"python -m benchmarks.profile_step {argv[0]}"
    parser.description = (
        f"Profile steps of a form of {argv[0]}_step (`pretrain` or `finetune` comes first on the "
        f"command line). Of --forms the first is profiled."
    )
    add = parser.add_argument
    add("--trace", type=Path, metavar="FILE", help="trace to write for a viewer (default: none)")
    add("--steps", type=positive_int, default=3, metavar="N", help="steps to profile")
    add("--rows", type=positive_int, default=15, metavar="N", help="operations to list")
    args = parser.parse_args(argv[1:])
    try:
        settle_options(args, module.BENCHMARK.bases)
    except UsageError as error:
        parser.error(str(error))
    if args.trace and not args.trace.absolute().parent.is_dir():
        parser.error(f"--trace {args.trace}: there is no folder {args.trace.parent}")
    return args, module


def profile_steps(module: object, form: Form, args: argparse.Namespace) -> profile:
    """Run the profiler over some steps, after warming up."""
    step = ready_step(module.BENCHMARK, form, args)
    for _ in range(WARMUP_STEPS):
        step()
    activities = [ProfilerActivity.CPU]
    if args.device == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(args.steps):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
    return profiler


def own_times(profiler: profile, device: str) -> dict[str, tuple[float, int]]:
    """Milliseconds that an operation took itself, and its calls, by name; CUDA's: of kernels."""

    def counts(event: FunctionEventAvg) -> bool:
        return (event.device_type == DeviceType.CUDA) == (device == "cuda")

    times = {}
    for event in filter(counts, profiler.key_averages()):
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[event.key] = (own / 1000, event.count)
    return times


def tables(times: dict[str, tuple[float, int]], steps: int, rows: int) -> tuple[str, str]:
    """The time of a step by kind of work, and by operation."""
    total, kinds = sum(own for own, _ in times.values()), defaultdict(float)
    for name, (own, _) in times.items():
        kinds[kind_of(name)] += own
    by_kind = [["kind", "ms a step", "share"]]
    for kind, own in sorted(kinds.items(), key=lambda item: -item[1]):
        by_kind.append([kind, f"{own / steps:.2f}", f"{own / total:.1%}"])
    by_name = [["operation", "kind", "calls a step", "ms a step", "share"]]
    for name, (own, count) in sorted(times.items(), key=lambda item: -item[1][0])[:rows]:
        share = f"{own / total:.1%}"
        by_name.append(
            [name[:60], kind_of(name), f"{count / steps:g}", f"{own / steps:.2f}", share]
        )
    return markdown_table(by_kind), markdown_table(by_name)


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    args, module = parse_args(argv)
    warnings.filterwarnings("ignore", message=".*Profiler.*")
    torch.manual_seed(0)
    if args.device == "cuda":
        use_fast_kernels()
    form = args.forms[0]
    print_environment(environment("profile_step", argv, args.device) | {"form": form.name})
    profiler = profile_steps(module, form, args)
    by_kind, by_name = tables(own_times(profiler, args.device), args.steps, args.rows)
    print(f"\n{by_kind}\n\n{by_name}")
    if args.trace:
        profiler.export_chrome_trace(str(args.trace))
        print(f"\ntrace: {args.trace}")


if __name__ == "__main__":
    main(sys.argv[1:])
