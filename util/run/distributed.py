"""Processes and devices of a run: torchrun's or SLURM's environment, NCCL or gloo, signals."""

import hashlib
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util.errors import TrainingError, UsageError, printable


def rank() -> int:
    """This process's number, 0 … world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the run, over all nodes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True in the one process that prints and writes files."""
    return rank() == 0


def cores_per_process() -> int:
    """CPU cores for each process of this node, as its launcher says."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return _whole_number("SLURM_CPUS_PER_TASK")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores // max(1, _whole_number("LOCAL_WORLD_SIZE"))


def _whole_number(variable: str) -> int:
    """The number that a launcher's environment variable holds, 1 if it is not set."""
    text = os.environ.get(variable, "1")
    if not text.isdecimal():
        raise UsageError(f"the environment variable {variable} is {text!r}, not a whole number")
    return int(text)


def _environment() -> dict[str, str]:
    """The launcher's RANK, LOCAL_RANK, WORLD_SIZE and master; empty for a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
        return {
            key: env[key]
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if key in env
        }
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun
        return {
            "RANK": env["SLURM_PROCID"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            # The same on every node of a job, different for two jobs on one node.
            "MASTER_PORT": env.get("MASTER_PORT") or str(10000 + int(env["SLURM_JOB_ID"]) % 20000),
        }
    return {}


def _first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        hosts = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"cannot ask SLURM for the hosts of {nodelist} ({error}): set MASTER_ADDR to the first"
        ) from error
    return hosts.stdout.split()[0]


def init_processes(device: str = "auto") -> torch.device:
    """Choose this process's device and join the process group, if a launcher started several.

    Args:
        device: auto (CUDA where there is one, then MPS, then CPU), cuda, cuda:N, mps or cpu.

    Raises:
        UsageError: the device does not exist here, there are more processes than GPUs, or the
            launcher's environment is not whole.
        TrainingError: the processes do not reach each other.
    """
    try:
        env = _environment()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            int(env.get(name, 0))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the environment is not whole that torchrun or srun sets for its processes ({error}): "
            f"start them by one of these, or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS"
        ) from error
    local_rank = int(env.get("LOCAL_RANK", 0))
    asked, (device, _, gpu) = device, device.partition(":")
    if gpu and int(env.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            f"--device {asked} is one GPU and there are {env['WORLD_SIZE']} processes: give "
            f"--device cuda, and each process takes its own"
        )
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available() and not env
            else "cpu"
        )
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {asked}: no CUDA GPU is visible; use --device cpu or auto")
        if gpu and int(gpu) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {asked}: there is no such GPU, {torch.cuda.device_count()} visible, "
                f"counted from 0"
            )
        if gpu:
            local_rank = int(gpu)
        elif torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows each process its own GPU alone
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} "
                f"visible; start as many processes as GPUs (--nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        use_fast_kernels()
    elif device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available here; use --device cpu or auto")
    if int(env.get("WORLD_SIZE", 1)) > 1:
        os.environ.update(env)
        try:
            if device == "cuda":
                dist.init_process_group("nccl", device_id=torch.device(device, local_rank))
            else:
                dist.init_process_group("gloo")
        except ValueError as error:  # a part of the environment is missing or wrong
            raise UsageError(f"the processes cannot meet: {printable(error, 300)}") from error
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise TrainingError(
                f"the processes cannot meet at {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}: "
                f"{printable(error, 200)}"
            ) from error
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def use_fast_kernels() -> None:
    """Have CUDA multiply in tf32, and cuDNN try its convolutions and take the fastest.

    The sizes of a run stay the same, so it tries once.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def wrap_model(model: nn.Module, device: torch.device, compile_model: bool) -> nn.Module:
    """The model as it is trained: in DDP if there are several processes, compiled if wanted."""
    if world_size() > 1:
        kind = nn.parallel.DistributedDataParallel
        # torch 2.14 has renamed what keeps buffers as they are in each process.
        names = inspect.signature(kind).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        model = kind(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{name: False},
        )
    if not compile_model:
        return model
    # Around DDP, so that the compiler splits the backward pass where communication can overlap;
    # alone it must be one graph.
    return torch.compile(model, fullgraph=world_size() == 1, dynamic=False)


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """Batch norm with the statistics of all processes' batches, for inputs without a gradient.

    A linear probe normalises the features of a frozen encoder; so any split of the batch over
    processes takes the same step. (torch's SyncBatchNorm has a backward pass, and no CPU.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features `[N, C]` to the same shape."""
        if world_size() == 1 or not self.training:
            return super().forward(x)
        if x.requires_grad or self.affine:
            raise ValueError("this batch norm is for frozen features: they have a gradient")
        values = x.float()
        n = len(x) * world_size()
        mean = all_reduce_sum(values.sum(0)) / n
        var = all_reduce_sum(((values - mean) ** 2).sum(0)) / n
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return ((values - mean) * (var + self.eps).rsqrt()).to(x.dtype)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """The maximum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather_objects(value: object) -> list:
    """The value of each process, in order of rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Go on when all processes are here: what one of them wrote, the others can then read."""
    if world_size() > 1:
        dist.barrier()


def print_once(*values: object, error: bool = False) -> None:
    """Print in the main process alone, before the processes have joined too."""
    if (rank() if dist.is_initialized() else _launched_rank()) == 0:
        print(*values, file=sys.stderr if error else sys.stdout, flush=True)


def _launched_rank() -> int:
    """This process's number as its launcher says, whether or not it has joined the others."""
    number = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(number) if number.isdecimal() else 0


def complain(line: str) -> None:
    """Print an error to stderr, once for all of torchrun's processes that fail alike."""
    if _is_first_to_say(line):
        print(line, file=sys.stderr, flush=True)


def _is_first_to_say(line: str) -> bool:
    """True if no other process of this start has asked for the line; torchrun's agent knows.

    It is asked directly, as most errors come before the processes have joined, or from one alone.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    digest = hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()
    try:
        store = dist.TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"said/{env.get('TORCHELASTIC_RESTART_COUNT')}/{digest}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no agent to ask any more
        return True


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 came, for the training loop to save and leave."""

    def __init__(self) -> None:
        self.received: int = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> bool:
        """True in all processes if any of them was signalled (a collective)."""
        if world_size() == 1:
            return self.received > 0
        flag = torch.tensor(float(self.received > 0), device=device)
        return bool(all_reduce_max(flag).item())


def shield_workers(loader: DataLoader) -> None:
    """Have a loader's workers live on when a signal asks the run to stop: it will end them.

    Launchers may send the signal to all processes of a job, and torch ends a run that loses a
    worker. A second one ends a worker, as torch does with one that is stuck. Those that are left
    when this process exits are killed: multiprocessing would send them a first one, and wait.

    Args:
        loader: not yet iterated over; changed in place.
    """
    Finalize(None, _kill_workers, exitpriority=0)  # runs before multiprocessing's own end
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    for child in multiprocessing.active_children():
        if child.daemon:  # as all workers of loaders are
            child.kill()


def _begin_worker(begin: Callable[[int], object] | None, number: int) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if begin is not None:
        begin(number)
