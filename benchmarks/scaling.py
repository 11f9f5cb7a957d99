"""Images a second of one and of several processes, and the efficiency of the latter.

`python -m benchmarks.scaling --help`, from the repository root. It starts the processes itself: of
each number of them, in turn, a run of pretraining steps as the programs take them (DDP, AdamW),
each process with its own batch of random images. On GPUs a process has one of its own; on CPUs as
many cores as it has in the largest run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.measuring import environment, median_and_range, print_environment, wall_clock
from benchmarks.pretrain_step import MAE_SIZES
from models_convmae import MODELS
from util.errors import UsageError
from util.run.distributed import (
    cores_per_process,
    init_processes,
    print_once,
    world_size,
    wrap_model,
)
from util.run.logger import markdown_table
from util.run.optim_step import OptimStep, amp_dtype
from util.run.parser import Parser, positive_int

WARMUP_STEPS = 3
ROOT = Path(__file__).resolve().parent.parent


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.scaling",
        description="Images/s of pretraining with one and with several processes, each with a "
        "batch of its own.",
    )
    add = parser.add_argument
    add("--processes", type=positive_int, nargs="+", metavar="N", help="default: 1 and all GPUs")
    add("--model", default="base", choices=list(MAE_SIZES), help="size of the model")
    add("--batch_size", type=positive_int, default=16, metavar="N", help="images a process")
    add("--input_size", type=positive_int, default=224, metavar="PIXELS", help="side of an image")
    add("--steps", type=positive_int, default=5, metavar="N", help="timed steps of a run")
    add("--rounds", type=positive_int, default=3, metavar="N", help="runs of each number, in turn")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA if present")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--one_run", action="store_true", help=argparse.SUPPRESS)
    return parser


def one_run(args: argparse.Namespace) -> None:
    """Take steps in the processes of a launcher; the first prints images/s of all together."""
    device = init_processes(args.device)
    torch.manual_seed(0)
    model = MODELS[f"convmae_convvit_{args.model}_patch16"](img_size=args.input_size).to(device)
    trained = wrap_model(model, device, args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = OptimStep(trained, optimizer, device, amp_dtype("auto", device))
    size = (args.batch_size, 3, args.input_size, args.input_size)
    imgs = torch.randn(size, device=device)

    def steps(count: int) -> None:
        for _ in range(count):
            step.begin([imgs], 1)
            for batch in step.micro_batches:
                with step.autocast():
                    loss, _, _ = trained(batch)
                step.backward(loss)
            step.update()

    steps(WARMUP_STEPS)
    seconds = wall_clock(device.type)(lambda: steps(args.steps))
    print_once(args.batch_size * world_size() * args.steps / seconds)


def run_processes(count: int, threads: int, argv: Sequence[str]) -> float:
    """Images/s of a run with so many processes of so many threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [sys.executable, *launcher, "-m", "benchmarks.scaling", *argv, "--one_run"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def measure(processes: Sequence[int], rounds: int, argv: Sequence[str]) -> dict[int, list[float]]:
    """Images/s of each number of processes, one entry a round."""
    threads = max(1, cores_per_process() // max(processes))
    results = {count: [] for count in processes}
    for number in range(rounds):
        for count in processes if number % 2 == 0 else reversed(processes):
            results[count].append(run_processes(count, threads, argv))
    return results


def efficiency(results: dict[int, list[float]], count: int) -> list[float]:
    """Images/s over those of as many processes of the smallest run, one entry a round."""
    first = min(results)
    return [
        many / one * first / count for many, one in zip(results[count], results[first], strict=True)
    ]


def table(results: dict[int, list[float]]) -> str:
    """Images/s and efficiency."""
    rows = [["processes", "images/s (min–max)", "efficiency (min–max)"]]
    for count, values in results.items():
        share = median_and_range(efficiency(results, count))
        rows.append([str(count), median_and_range(values), share])
    return markdown_table(rows)


def settle_options(args: argparse.Namespace) -> None:
    """Check what the parser alone cannot, and settle what is left to `auto`.

    Raises:
        UsageError: more processes than GPUs.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count() if args.device == "cuda" else None
    if gpus == 0:
        raise UsageError("--device cuda: no CUDA GPU is visible; use --device cpu or auto")
    args.processes = sorted(set(args.processes or [1, gpus or 2]))
    if args.device == "cuda" and args.processes[-1] > gpus:
        raise UsageError(f"--processes {args.processes[-1]}: there are {gpus} GPUs")


def report(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print, and write the file if one is wanted."""
    surroundings = environment("scaling", argv, args.device)
    print_environment(surroundings)
    results = measure(args.processes, args.rounds, argv)
    print(f"\n{table(results)}")
    if args.json:
        medians = {count: median(efficiency(results, count)) for count in results}
        content = {"environment": surroundings, "images_per_s": results, "efficiency": medians}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        if args.one_run:
            one_run(args)
        else:
            settle_options(args)
            report(args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
