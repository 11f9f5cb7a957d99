import itertools
import multiprocessing
import os
import signal
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from util.errors import UsageError
from util.run import distributed
from util.run.distributed import (
    StopSignal,
    SyncedBatchNorm1d,
    all_reduce_max,
    all_reduce_sum,
    cores_per_process,
    gather_objects,
    init_processes,
    is_main_process,
    rank,
    shield_workers,
    world_size,
    wrap_model,
)

CPU = torch.device("cpu")
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
# Of `sbatch` and `salloc`, in which a script runs once.
BATCH = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "node[3-4]",
}
SRUN = BATCH | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[3-4]",
}
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[3-4]" ] && printf 'node3\\nnode4\\n'
"""


@pytest.fixture(autouse=True)
def no_launcher():
    """An environment without launcher, whatever the tests themselves were started by."""
    with mock.patch.dict(os.environ):
        for name in [*GROUP, *(name for name in os.environ if name.startswith("SLURM_"))]:
            os.environ.pop(name, None)
        yield


@pytest.fixture
def scontrol(tmp_path):
    """SLURM's program that spells out lists of nodes."""
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o755)
    os.environ["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def joined(monkeypatch):
    """Stands in for the process group: the list of the backends that were asked for."""
    backends = []
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **options: backends.append(backend)
    )
    return backends


def group():
    """What torch reads when it joins the group."""
    return {name: os.environ[name] for name in GROUP}


# ---- Launchers -----------------------------------------------------------------------------------


def test_without_a_launcher_there_is_one_process(joined):
    assert init_processes("cpu") == CPU
    assert joined == []
    assert (rank(), world_size(), is_main_process()) == (0, 1, True)


def test_torchrun_is_joined(joined):
    os.environ |= TORCHRUN
    assert init_processes("cpu") == CPU
    assert joined == ["gloo"]
    assert group() == TORCHRUN


def test_torchrun_with_one_process_needs_no_group(joined):
    os.environ |= TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    init_processes("cpu")
    assert joined == []


def test_srun_is_joined_at_the_first_host_of_the_step(scontrol, joined):
    os.environ |= SRUN
    init_processes("cpu")
    assert joined == ["gloo"]
    assert group() == TORCHRUN | {"MASTER_ADDR": "node3", "MASTER_PORT": "24567"}


def test_two_jobs_on_a_node_meet_at_ports_of_their_own(scontrol, joined):
    ports = set()
    for job in range(1234567, 1234570):
        with mock.patch.dict(os.environ, SRUN | {"SLURM_JOB_ID": str(job)}):
            init_processes("cpu")
            ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 3 and all(1024 < port < 65536 for port in ports)


def test_a_master_that_the_user_chose_is_kept(joined):
    os.environ |= SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    init_processes("cpu")  # without scontrol
    assert group() == TORCHRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}


def test_torchrun_within_srun_counts(joined):
    os.environ |= SRUN | TORCHRUN | {"RANK": "2", "WORLD_SIZE": "4"}
    init_processes("cpu")
    assert group() == TORCHRUN | {"RANK": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        {"SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_launcher_s_environment_that_is_not_whole_is_told_in_a_line(variables):
    os.environ |= variables
    with pytest.raises(UsageError) as refusal:
        init_processes("cpu")
    assert str(refusal.value).isprintable()


def test_a_number_of_cores_that_is_none_is_told():
    os.environ["SLURM_CPUS_PER_TASK"] = "x"
    with pytest.raises(UsageError, match="SLURM_CPUS_PER_TASK is 'x'"):
        cores_per_process()


def test_a_batch_script_without_srun_is_one_process(joined):
    os.environ |= BATCH
    init_processes("cpu")
    assert joined == []
    assert is_main_process()


def test_one_task_of_srun_needs_no_scontrol(joined):
    os.environ |= SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    os.environ["PATH"] = ""
    init_processes("cpu")
    assert joined == []


# ---- Devices -------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many GPUs, or an Apple one."""

    def build(gpus, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return build


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(2, False, "cuda:0"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_device(gpus, mps, expected, machine):
    machine(gpus, mps)
    assert init_processes("auto") == torch.device(expected)


def test_each_process_takes_the_gpu_of_its_number_on_the_node(machine, joined):
    machine(gpus=2)
    os.environ |= TORCHRUN
    assert init_processes("auto") == torch.device("cuda", 1)
    assert joined == ["nccl"]


def test_several_processes_do_not_share_an_apple_gpu(machine, joined):
    machine(gpus=0, mps=True)
    os.environ |= TORCHRUN
    assert init_processes("auto") == CPU


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_what_would_do(device, machine):
    machine(gpus=0)
    with pytest.raises(UsageError, match=f"--device {device}: .*use --device cpu or auto"):
        init_processes(device)


def test_more_processes_than_gpus_are_refused_with_the_numbers(machine, joined):
    machine(gpus=1)
    os.environ |= TORCHRUN
    with pytest.raises(UsageError, match="process 1 of this node has no GPU: 1 visible"):
        init_processes("cuda")
    assert joined == []


def test_one_gpu_of_several_is_chosen_by_its_number(machine):
    machine(gpus=2)
    assert init_processes("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there_is_refused_with_how_many_are(machine):
    machine(gpus=2)
    with pytest.raises(UsageError, match="--device cuda:2: there is no such GPU, 2 visible"):
        init_processes("cuda:2")


def test_several_processes_do_not_share_the_gpu_that_is_named(machine, joined):
    machine(gpus=2)
    os.environ |= TORCHRUN
    with pytest.raises(UsageError, match=r"--device cuda:0 is one GPU .* give --device cuda"):
        init_processes("cuda:0")
    assert joined == []


# ---- One process ---------------------------------------------------------------------------------


def test_collectives_of_one_process_change_nothing():
    values = torch.tensor([1.0, 2.0])
    assert all_reduce_sum(values) is values and all_reduce_max(values) is values
    assert values.tolist() == [1, 2]
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_the_model_of_one_process_is_not_wrapped():
    model = torch.nn.Linear(1, 1)
    assert wrap_model(model, CPU, compile_model=False) is model


# ---- Signals -------------------------------------------------------------------------------------


@pytest.fixture
def stop():
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_stops_a_run_without_a_signal(stop):
    assert not stop.received and not stop.agreed(CPU)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_ends_nothing(stop, number):
    os.kill(os.getpid(), number)
    assert stop.received == number
    assert stop.agreed(CPU) and stop.agreed(CPU)


# ---- Batch norm of a probe -----------------------------------------------------------------------


def test_the_norm_of_a_probe_is_torchs_in_one_process():
    torch.manual_seed(0)
    ours = SyncedBatchNorm1d(5, affine=False, eps=1e-6)
    theirs = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    for x in torch.randn(3, 8, 5):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.running_var, theirs.running_var)


def test_the_norm_of_a_probe_takes_the_batch_of_all_processes(monkeypatch):
    torch.manual_seed(0)
    batch, ours = torch.randn(8, 5), [SyncedBatchNorm1d(5, affine=False) for _ in range(2)]
    theirs = torch.nn.BatchNorm1d(5, affine=False)
    halves = batch.chunk(2)
    # What the sums over two processes are: of the mean first, then of the squares around it.
    sums = {0: batch.sum(0), 1: ((batch - batch.mean(0)) ** 2).sum(0)}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    out = []
    for norm, half in zip(ours, halves, strict=True):
        calls = iter(sums.values())
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda values, c=calls: next(c))
        out.append(norm(half))
    torch.testing.assert_close(torch.cat(out), theirs(batch))
    torch.testing.assert_close(ours[0].running_mean, theirs.running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs.running_var)


def test_the_norm_of_a_probe_refuses_features_with_a_gradient(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="frozen features"):
        SyncedBatchNorm1d(5, affine=False)(torch.randn(4, 5, requires_grad=True))


class Signalled(Dataset):
    """Four numbers; as the second is read the worker gets a signal, as all processes of a job."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 1:
            os.kill(os.getpid(), self.number)
        return index


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()


def test_a_program_whose_shielded_workers_are_at_work_ends_without_a_word(tmp_path):
    """Its loader lives as long as it does."""

    def work(log):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
        loader = DataLoader(Endless(), batch_size=None, num_workers=1)
        shield_workers(loader)
        globals()["kept"] = iter(loader)
        next(kept)  # noqa: F821

    process = multiprocessing.get_context("fork").Process(target=work, args=(tmp_path / "log",))
    process.start()
    process.join(30)
    process.kill()
    assert (process.exitcode, (tmp_path / "log").read_text()) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_shielded_workers_outlive_the_signal_that_asks_a_run_to_stop(number):
    """And others do not."""
    loaders = [DataLoader(Signalled(number), batch_size=None, num_workers=1) for _ in range(2)]
    shield_workers(loaders[0])
    assert list(loaders[0]) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(loaders[1])
