"""Run a main on the nodes of a SLURM cluster, requeued and resumed until it is done.

`python submitit_launch.py --nodes 4 main_pretrain.py --data_path DIR --output_dir DIR`
"""

from util.signals import STOPPED_EXIT_CODE, leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from util.errors import UsageError
from util.run.args import check_writable
from util.run.parser import ChoiceOf, Parser, PathOrDefault, non_negative_int, positive_int
from util.run.program import run_main
from util.run.resume import LAST

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

ROOT = Path(__file__).resolve().parent
PROGRAMS = (
    "main_pretrain.py",
    "main_finetune.py",
    "main_linprobe.py",
    "VideoConvMAE.main_pretrain",
    "VideoConvMAE.main_finetune",
)
# What a main ends with that has saved because of a signal; one that is done ends with 0.
STOPPED = 85
# The last seconds before a time limit are for queueing the job again.
TO_REQUEUE = 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = job_parser("submitit_launch.py")
    parser.add_argument(
        "program",
        type=ChoiceOf(PROGRAMS),
        metavar="MAIN",
        help=f"what to run: {', '.join(PROGRAMS)}",
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="its own command line"
    )
    return parser.parse_args(argv)


def parse_args_with(program: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line in which flags of the job and of one main stand side by side.

    So the original's submitit scripts take them. As there the run's output is in `--job_dir`, if
    that is given and no `--output_dir`.

    Args:
        program: the main, one of `PROGRAMS`.
        argv: the command line.
    """
    script = program.replace("main_", "submitit_")
    parser = job_parser(script, epilog=f"All flags of {program} may follow, see its --help.")
    parser.add_argument(
        "--use_volta32", action="store_true", help="nodes of SLURM's feature volta32gb alone"
    )
    args, rest = parser.parse_known_args(argv)
    args.program, args.arguments = program, rest
    if args.job_dir != parser.get_default("job_dir") and not any(
        text.partition("=")[0] == "--output_dir" for text in rest
    ):
        args.arguments += ["--output_dir", str(args.job_dir)]
    if args.use_volta32:
        args.sbatch = [*(args.sbatch or []), ("constraint", "volta32gb")]
    return args


def job_parser(script: str, epilog: str | None = None) -> Parser:
    """A parser of the flags that describe a job."""
    parser = Parser(
        prog=f"python {script}",
        description="Submit a main to SLURM. Before its time limit the run saves its state; the "
        "job is queued again and goes on from there.",
        epilog=epilog,
    )
    add = parser.add_argument
    add("--nodes", type=positive_int, default=1, metavar="N", help="nodes of the job")
    add("--ngpus", type=non_negative_int, default=8, metavar="N", help="GPUs of each node")
    add(
        "--ntasks",
        type=positive_int,
        metavar="N",
        help="processes of each node (default: one a GPU; 1 without GPUs)",
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
        help="how long before the limit the run is told to save",
    )
    add("--partition", metavar="NAME", help="of the cluster (default: the cluster's)")
    add("--comment", metavar="TEXT", help="for the scheduler")
    add(
        "--sbatch",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="a further option of sbatch, such as account=vision or exclusive; may be given "
        "several times",
    )
    add(
        "--job_dir",
        action=PathOrDefault,
        default=Path("output/jobs"),
        metavar="DIR",
        help="folder of the logs, on a file system that all nodes see",
    )
    add(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="local: processes of this machine, to try a job out; it is begun 6 times at most",
    )
    return parser


def _option(text: str) -> tuple[str, str | bool]:
    """An option of sbatch as submitit names it; one without a value is a switch."""
    name, equals, value = text.partition("=")
    name = name.lstrip("-").replace("-", "_")
    if not name or (equals and not value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE or NAME")
    return name, value if equals else True


@dataclass
class Task:
    """One process of a job; submitit stores it, and calls it again after each requeue.

    Attributes:
        command: of the main, in the repository's root.
        patience: seconds that the main may take to save.
    """

    command: list[str]
    patience: int

    def __call__(self) -> None:
        """Run the main to its end; when SLURM warns, let it save, then queue the job again.

        Raises:
            RuntimeError: the main failed.
        """
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        # The main chooses its GPU itself, by its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, for SLURM's warning
        job = str(JobEnvironment().job_id)
        main = Main([text.replace("%j", job) for text in self.command], self.patience)
        code = main.wait()
        if code not in (0, STOPPED):
            raise RuntimeError(f"{' '.join(self.command)} failed with exit code {code}")
        # Without any signal here, a task of another node was warned.
        if code == STOPPED and (main.warned or not main.terminated):
            requeue(signal.SIGUSR2, None)  # in the first task; it does not return
        if code == STOPPED and JobEnvironment().cluster == "slurm":
            # The job is about to be requeued or cancelled; to end first would make it "completed".
            print("saved: waiting for SLURM to end this job", flush=True)
            while True:
                signal.pause()

    def checkpoint(self) -> "DelayedSubmission":
        """The job to submit after a requeue: the same command, which resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Main:
    """A main as a process of its own, which SLURM's signals reach as those it knows.

    SIGUSR2, the warning before the time limit, becomes SIGUSR1; SIGTERM is passed on.

    Attributes:
        warned: whether SIGUSR2 came.
        terminated: whether SIGTERM came: the job is preempted, when SLURM requeues it itself, or
            cancelled, when nobody must.
    """

    def __init__(self, command: Sequence[str], patience: int) -> None:
        self.warned = self.terminated = False
        self.told, self.patience = None, patience
        # SLURM may signal all processes of a task: the main inherits that SIGUSR2 is blocked, as
        # it would end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        environment = os.environ | {STOPPED_EXIT_CODE: str(STOPPED)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        signal.signal(signal.SIGUSR2, self._warn)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})

    def _warn(self, *_: object) -> None:
        self.warned = True
        self._tell(signal.SIGUSR1)

    def _terminate(self, *_: object) -> None:
        self.terminated = True
        self._tell(signal.SIGTERM)

    def _tell(self, number: int) -> None:
        self.told = self.told or time.monotonic()
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code; `STOPPED` too if it was told to save and could not in time."""
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self.process.wait(timeout=1)
                    # The signal ends a main that has not begun to train yet.
                    ended = code in (-signal.SIGUSR1, -signal.SIGTERM)
                    return STOPPED if self.told and ended else code
                if self.told and time.monotonic() - self.told > self.patience:
                    print(f"not saved within {self.patience} s: the last checkpoint counts")
                    return STOPPED
        finally:
            self.process.kill()


def command_of(args: argparse.Namespace) -> list[str]:
    """The main's command; its own arguments are checked before they wait in a queue.

    Exits with 2 and the main's own line if they are wrong.

    Raises:
        UsageError: a run that would not go on after a requeue.
    """
    module = args.program.removesuffix(".py")
    own = import_module(module).parse_args(args.arguments)
    if own.resume != "auto" and not getattr(own, "eval", False):
        inside = Path(own.resume).resolve().parent == own.output_dir.resolve()
        if own.resume == "none" or (inside and Path(own.resume).name != LAST):
            raise UsageError(
                f"--resume {own.resume} would begin there again after each requeue: leave it "
                f"away, or give another --output_dir"
            )
    script = [args.program] if args.program.endswith(".py") else ["-m", module]
    return [sys.executable, "-u", *script, *args.arguments]


def check(args: argparse.Namespace) -> None:
    """Complete `ntasks`.

    Raises:
        UsageError: values that do not go together, or no SLURM.
    """
    if Path.cwd() != ROOT:
        raise UsageError(f"start it in the root of the repository, {ROOT}")
    if args.cluster == "slurm" and not (which("srun") and which("sbatch")):
        raise UsageError(
            "there is no srun and sbatch here: submit from a node of the cluster (--cluster local "
            "tries the job on this machine)"
        )
    if args.cluster == "local" and args.nodes > 1:
        raise UsageError(f"--nodes {args.nodes}: --cluster local is this machine alone")
    if not TO_REQUEUE < args.signal_delay < 60 * args.timeout:
        raise UsageError(
            f"--signal_delay {args.signal_delay} must lie between {TO_REQUEUE} and the "
            f"{60 * args.timeout} seconds of --timeout"
        )
    args.ntasks = args.ntasks or max(1, args.ngpus)
    if 0 < args.ngpus < args.ntasks:
        raise UsageError(f"--ntasks {args.ntasks}: a process takes a GPU, and --ngpus {args.ngpus}")


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
    check(args)
    # With %j, submitit's word for the job's number, the folder is the job's own already.
    named = "%j" in str(args.job_dir)
    folder = args.job_dir.resolve() if named else args.job_dir.resolve() / "%j"
    check_writable(Path(str(folder).partition("%j")[0]), "--job_dir")
    limits = dict(slurm_max_num_timeout=args.max_timeouts, local_max_num_timeout=args.max_timeouts)
    executor = submitit.AutoExecutor(folder, args.cluster, **limits)
    executor.update_parameters(
        name=args.program.removesuffix(".py"),
        nodes=args.nodes,
        tasks_per_node=args.ntasks,
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
        with contextlib.redirect_stderr(io.StringIO()):  # the error says it again
            job = executor.submit(Task(command, args.signal_delay - TO_REQUEUE))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(f"SLURM refuses the job: {' '.join(str(error).split())}") from error
    print(
        f"job {job.job_id}: {args.nodes} x {args.ntasks} processes of {args.program}; "
        f"its log: {os.path.relpath(job.paths.stdout)}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
