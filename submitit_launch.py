"""Run a main on the nodes of a SLURM cluster, requeued and resumed until it is done.

`python submitit_launch.py --nodes 4 main_pretrain.py --data_path DIR --output_dir DIR`
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import which

from util.args import check_writable
from util.errors import UsageError
from util.parser import ChoiceOf, Parser, non_negative_int, positive_int
from util.run import run_main

ROOT = Path(__file__).resolve().parent
PROGRAMS = (
    "main_pretrain.py",
    "main_finetune.py",
    "main_linprobe.py",
    "VideoConvMAE.main_pretrain",
    "VideoConvMAE.main_finetune",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python submitit_launch.py",
        description="Submit a main to SLURM. Before its time limit, or when it is preempted, the "
        "run saves its state; the job is queued again and goes on from there.",
    )
    add = parser.add_argument
    add("--nodes", type=positive_int, default=1, metavar="N", help="nodes of the job")
    add(
        "--ngpus",
        type=non_negative_int,
        default=8,
        metavar="N",
        help="GPUs of each node, a process each; 0: CPUs only",
    )
    add(
        "--ntasks",
        type=positive_int,
        metavar="N",
        help="processes of each node (default: as many as GPUs, without any 1)",
    )
    add("--cpus", type=positive_int, default=10, metavar="N", help="CPU cores of each process")
    add("--timeout", type=positive_int, default=4320, metavar="MINUTES", help="time limit of a job")
    add(
        "--max_timeouts",
        type=non_negative_int,
        default=100,
        metavar="N",
        help="how often a job that reached its time limit is queued again",
    )
    add(
        "--signal_delay",
        type=positive_int,
        default=120,
        metavar="SECONDS",
        help="time to save before the limit",
    )
    add("--partition", metavar="NAME", help="of the cluster (default: the cluster's)")
    add("--comment", metavar="TEXT", help="for the scheduler")
    add(
        "--sbatch",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="a further option of sbatch, such as account=vision; may be given several times",
    )
    add("--job_dir", type=Path, default=Path("output/jobs"), help="logs, on all nodes the same")
    add(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="local: as processes of this machine, to try it out",
    )
    add(
        "program",
        type=ChoiceOf(PROGRAMS),
        metavar="MAIN",
        help=f"what to run: {', '.join(PROGRAMS)}",
    )
    add("arguments", nargs=argparse.REMAINDER, metavar="…", help="its own command line")
    return parser.parse_args(argv)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name.strip("-") or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip("-"), value


@dataclass
class Task:
    """One process of a job; submitit stores it, and calls it again after each requeue.

    Attributes:
        command: of the main, to be run in the repository's root.
    """

    command: list[str]

    def __call__(self) -> None:
        """Run the main to its end; when SLURM warns, let it save, then queue the job again.

        Raises:
            RuntimeError: the main failed.
        """
        from submitit.helpers import TorchDistributedEnvironment

        # The main chooses its GPU itself, by its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        warning, warned = signal.SIGUSR2, []
        requeue = signal.getsignal(warning)  # submitit's
        # SLURM signals the main as well, which would end it before it has saved.
        signal.signal(warning, signal.SIG_IGN)
        process = subprocess.Popen(self.command, cwd=ROOT)

        def save(*_: object) -> None:
            warned.append(True)
            process.send_signal(signal.SIGUSR1)

        signal.signal(warning, save)
        code = process.wait()
        if code:
            raise RuntimeError(f"{' '.join(self.command)} failed with exit code {code}")
        if warned:
            requeue(warning, None)

    def checkpoint(self) -> object:
        """What to call after a requeue: the same command, which goes on by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def command_of(args: argparse.Namespace) -> list[str]:
    """The main's command; its own arguments are checked before they wait in a queue.

    Exits with 2 and the main's own line if they are wrong.

    Raises:
        UsageError: a run that could not go on after a requeue.
    """
    module = args.program.removesuffix(".py")
    own = import_module(module).parse_args(args.arguments)
    if own.resume == "none":
        raise UsageError("--resume none would begin anew after each requeue: leave it away")
    script = [args.program] if args.program.endswith(".py") else ["-m", module]
    return [sys.executable, "-u", *script, *args.arguments]


def main(args: argparse.Namespace) -> None:
    """Submit the job and say where its log is."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise UsageError(
            "submitit is not installed: pip install -r requirements-slurm.txt"
        ) from None
    command = command_of(args)
    if args.cluster == "slurm" and not which("srun"):
        raise UsageError(
            "there is no srun here: submit from a node of the cluster (--cluster local tries the "
            "job on this machine)"
        )
    if args.cluster == "local" and args.nodes > 1:
        raise UsageError(f"--nodes {args.nodes}: --cluster local is this machine alone")
    check_writable(args.job_dir, "--job_dir")
    tasks = args.ntasks or max(1, args.ngpus)
    executor = submitit.AutoExecutor(
        args.job_dir.resolve() / "%j", args.cluster, slurm_max_num_timeout=args.max_timeouts
    )
    executor.update_parameters(
        name=Path(args.program).stem.rpartition(".")[2],
        nodes=args.nodes,
        tasks_per_node=tasks,
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus,
        timeout_min=args.timeout,
        stderr_to_stdout=True,
        slurm_signal_delay_s=args.signal_delay,
        slurm_partition=args.partition,
        slurm_comment=args.comment,
        slurm_additional_parameters={"requeue": True, **dict(args.sbatch or [])},
        slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus}"],
    )
    try:
        job = executor.submit(Task(command))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(f"sbatch refuses the job: {error}") from error
    print(
        f"job {job.job_id}: {args.nodes} x {tasks} processes of {args.program}; "
        f"its log: {os.path.relpath(job.paths.stdout)}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
