"""Jobs of a proof in processes beside each other."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from benchmarks.proof.arms import ARMS
from benchmarks.proof.jobs import Job, jobs_of
from util.errors import TrainingError, UsageError
from util.run.distributed import StopSignal, cores_per_process, init_processes
from util.run.program import Stopped

# What the processes print, whose lines would be hard to tell apart.
LOG = "jobs.log"
# Seconds between looks at whether a signal came, and that a process has to save and leave.
LOOK, LEAVE = 0.5, 60.0
STOPPED = (
    "stopped by a signal: what is done is kept, the same command goes on; --publish writes the "
    "page of what there is"
)


@dataclass
class Worker:
    """A process that does jobs, one after the other.

    Attributes:
        process: it.
        connection: to it.
        job: that it does now.
    """

    process: multiprocessing.Process
    connection: Connection
    job: Job | None = None


def stop_between_trainings() -> None:
    """End with exit code 0 on SIGTERM and SIGUSR1 where no training handles them."""

    def stop(*_: object) -> None:
        raise Stopped(STOPPED)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def timed(job: Job) -> dict[str, object]:
    """Do a job; what it found, its seconds and passes.

    Raises:
        Stopped: a signal came; what can be gone on with is saved.
    """
    began = time.perf_counter()
    stop_between_trainings()
    found = job.run()
    stop_between_trainings()
    return {**found, "seconds": time.perf_counter() - began, "passes": job.passes}


def run_here(jobs: Sequence[Job], begin: Callable[[Job], None]) -> Iterator[tuple[Job, dict]]:
    """Do jobs in this process, in their order, which is that of their needs.

    Args:
        jobs: to do.
        begin: told of each before it is done.

    Yields:
        A job and what it found.

    Raises:
        Stopped: a signal came.
    """
    for job in jobs:
        begin(job)
        yield job, timed(job)


def run_beside(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    done: set[tuple[str, int, str]],
    begin: Callable[[Job], None],
) -> Iterator[tuple[Job, dict]]:
    """Do jobs in `args.jobs` processes, the first that is ready first.

    Args:
        args: of the program.
        jobs: to do, what matters most first; what each needs is among them or done.
        done: keys of the jobs that are.
        begin: told of each before it is done.

    Yields:
        A job and what it found, as they come.

    Raises:
        Stopped: a signal came; every process has saved and left.
        UsageError, TrainingError: of a job, or a process was lost; the others have saved and left.
    """
    left, done, stop = list(jobs), set(done), StopSignal()
    workers = _start(args, min(args.jobs, len(left)))
    try:
        while left or any(worker.job for worker in workers):
            for worker in workers:
                ready = (job for job in left if done.issuperset(job.needs))
                if worker.job is None and (job := next(ready, None)):
                    left.remove(job)
                    begin(job)
                    worker.job = job
                    worker.connection.send(job.key)
            for connection in wait([worker.connection for worker in workers], LOOK):
                worker = next(w for w in workers if w.connection is connection)
                try:
                    job, found = _receive(worker)
                except TrainingError:
                    if stop.received:  # as the process did
                        break
                    raise
                done.add(job.key)
                yield job, found
            if stop.received:
                _leave(workers)
                yield from _last_words(workers)
                raise Stopped(STOPPED)
    finally:
        _leave(workers)


def _start(args: argparse.Namespace, number: int) -> list[Worker]:
    """Start processes, each with its part of the cores."""
    threads = str(max(1, cores_per_process() // number))
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # read as libraries are imported
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    workers = []
    for _ in range(number):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(args, theirs))
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
    return workers


def _serve(args: argparse.Namespace, connection: Connection) -> None:
    """Do the jobs whose keys come, until there are no more or a signal comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program tells us
    stop_between_trainings()
    threading.Thread(target=_follow_parent, daemon=True).start()
    log = os.open(args.output_dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = init_processes(args.device)
    try:
        while True:
            arm, seed, name = connection.recv()
            jobs = {job.name: job for job in jobs_of(args, ARMS[arm], seed, device)}
            try:
                connection.send(timed(jobs[name]))
            except (UsageError, TrainingError) as error:
                connection.send(error)
            except Exception:
                connection.send(TrainingError(traceback.format_exc()))
    except (EOFError, BrokenPipeError, Stopped):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers and the program send it
        sys.stdout.flush()


def _follow_parent() -> None:
    """Have this process save and leave when the program was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _receive(worker: Worker) -> tuple[Job, dict]:
    """A worker's job and what it found.

    Raises:
        UsageError, TrainingError: of the job, or the process was lost.
    """
    job = worker.job
    try:
        found = worker.connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise TrainingError(
            f"a process was lost in {job.title if job else 'its start'}, probably for want of "
            f"memory: lower --jobs; the same command goes on"
        ) from error
    if isinstance(found, Exception):
        raise type(found)(f"{job.title}: {found}")
    worker.job = None
    return job, found


def _last_words(workers: Sequence[Worker]) -> Iterator[tuple[Job, dict]]:
    """The jobs of processes that have left, with what they found."""
    for worker in workers:
        if worker.job:
            with contextlib.suppress(UsageError, TrainingError):
                yield _receive(worker)


def _leave(workers: Sequence[Worker]) -> None:
    """Ask processes to save and leave, and wait for them."""
    for worker in workers:
        worker.process.terminate()
    end = time.monotonic() + LEAVE
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():  # its last checkpoint is whole
            worker.process.kill()
            worker.process.join()
