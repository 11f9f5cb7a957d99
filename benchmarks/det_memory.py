"""Memory and time of a detector's training step against the batch size.

`python -m benchmarks.det_memory --help`, from the repository root; needs Detectron2. A step is
forward, backward and AdamW's on random images with random objects, with and without activation
checkpointing. Each row is measured in a process of its own, so that one that runs out of memory
costs only itself.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.measuring import environment, print_environment
from DET.train_net import check_installed
from util.errors import UsageError
from util.run.logger import markdown_table
from util.run.optim_step import amp_dtype
from util.run.parser import Parser, positive_float, positive_int


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.det_memory",
        description="Peak memory and seconds per image of a detector's training step for several "
        "batch sizes, with and without activation checkpointing.",
    )
    add = parser.add_argument
    add(
        "--config-file",
        default="DET/configs/convmae_base_mask_rcnn_FPN_25ep.py",
        metavar="FILE",
        help="recipe of the detector",
    )
    add(
        "--batch_sizes",
        type=positive_int,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="N",
        help="images in a step",
    )
    add("--image_size", type=positive_int, metavar="PIXELS", help="(default: the recipe's)")
    add("--steps", type=positive_int, default=5, metavar="N", help="timed steps, after one more")
    add(
        "--limit_gb",
        type=positive_float,
        metavar="GB",
        help="let the GPU have no more memory than that (GiB): what fits on a smaller card",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA if present")
    add(
        "--amp",
        default="auto",
        choices=("auto", "none", "bf16", "fp16"),
        help="autocast type; auto: none on a CPU, bf16 on CUDA (fp16 where the GPU lacks it)",
    )
    add("--measure", metavar="ROW", help=argparse.SUPPRESS)
    return parser


def settle_options(args: argparse.Namespace) -> None:
    """Settle what is left to `auto`.

    Raises:
        UsageError: an option that does not fit the machine.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible; use --device cpu or auto")
    if args.limit_gb and args.device != "cuda":
        raise UsageError("--limit_gb limits the memory of a GPU: there is none")
    args.dtype = amp_dtype(args.amp, torch.device(args.device))


def measure_afresh(argv: Sequence[str], batch_size: int, checkpointing: bool) -> dict | str:
    """`benchmarks.det_step.measure` in a process of its own.

    Raises:
        UsageError: it failed for another reason than want of memory.
    """
    row = json.dumps([batch_size, checkpointing])
    command = [sys.executable, "-m", "benchmarks.det_memory", *argv, "--measure", row]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"the measurement of batch size {batch_size} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure row by row, then print the table."""
    surroundings = environment("det_memory", argv, args.device)
    surroundings["precision"] = str(args.dtype or torch.float32).removeprefix("torch.")
    print_environment(surroundings)
    rows = [["images in a step", "activation checkpointing", "peak GiB", "s/image"]]
    for checkpointing in (False, True):
        for batch_size in sorted(args.batch_sizes):
            result = measure_afresh(argv, batch_size, checkpointing)
            switch = "yes" if checkpointing else "no"
            if isinstance(result, str):  # out of memory
                rows.append([str(batch_size), switch, result, ""])
                break
            numbers = f"{result['mib'] / 1024:.1f}", f"{result['seconds']:.3g}"
            rows.append([str(batch_size), switch, *numbers])
    print(f"\n{markdown_table(rows)}")


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        settle_options(args)
        check_installed()
        from benchmarks import det_step

        if args.device == "cuda":
            torch.set_float32_matmul_precision("high")
        if args.measure:
            print(json.dumps(det_step.measure(args, *json.loads(args.measure))))
        else:
            det_step.load(args, False)  # a bad recipe is told before all else
            report(args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
