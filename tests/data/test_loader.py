import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from tests.pictures import noisy, write_pictures
from util.data import loader as loader_module
from util.data.datasets import ImageFiles
from util.data.loader import BadImages, Loader, collate
from util.data.samplers import EvalSampler, StepSampler
from util.errors import TrainingError, UsageError


def test_collate_stacks_images_and_merges_bad_files():
    first, second = ((5, "torn"), (1, "empty")), ((1, "empty"),)
    images, bad = collate([(torch.zeros(3, 2, 2), first), (torch.ones(3, 2, 2), second)])
    assert images.shape == (2, 3, 2, 2) and images[1].eq(1).all()
    assert bad == [(1, "empty"), (5, "torn")]


def test_collate_keeps_labels():
    _, labels, bad = collate([(torch.zeros(1), 4, ()), (torch.zeros(1), 2, ())])
    assert labels.tolist() == [4, 2] and bad == []


# --- the order ---------------------------------------------------------------------------------


def steps(epoch: int = 0, start_step: int = 0, *, processes: int = 1, **kwargs) -> list[list]:
    """What all processes together see in each step, micro-batch by micro-batch, rank by rank."""
    samplers = [
        StepSampler(100, rank=rank, world_size=processes, seed=3, **kwargs)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch, start_step)
    parts = [part for micro_batch in zip(*samplers, strict=True) for part in micro_batch]
    count = processes * kwargs.get("accum_iter", 1)
    return [list(chain(*parts[i : i + count])) for i in range(0, len(parts), count)]


def test_two_processes_with_half_the_batch_see_what_one_sees():
    assert steps(batch_size=8, processes=2) == steps(batch_size=16)


def test_accumulation_sees_what_one_batch_sees():
    assert steps(batch_size=4, accum_iter=4) == steps(batch_size=16)
    assert steps(batch_size=4, accum_iter=2, processes=2) == steps(batch_size=16)


def test_a_resumed_epoch_yields_exactly_the_rest():
    kwargs = dict(batch_size=4, accum_iter=2, processes=2)
    assert steps(5, 2, **kwargs) == steps(5, **kwargs)[2:]
    assert steps(5, 6, **kwargs) == []


def test_a_part_of_a_step_can_be_left_out():
    sampler = StepSampler(100, 4, accum_iter=4)
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.set_epoch(1, 2, 3)
    assert list(sampler) == whole[11:]
    assert len(sampler) == len(whole) - 11


def test_an_image_comes_at_most_once_an_epoch():
    seen = [index for step in steps(batch_size=16) for index, _ in step]
    assert len(seen) == len(set(seen)) == 96
    assert set(seen) <= set(range(100))


def test_epochs_and_seeds_differ():
    def batch(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = StepSampler(100, 16, seed=seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    batches = [batch(0, 0), batch(0, 1), batch(1, 0), batch(1, 1)]
    assert len({tuple(index for index, _ in keys) for keys in batches}) == 4
    assert len({seed for keys in batches for _, seed in keys}) == 4 * 16


def test_lengths_are_those_of_the_epoch():
    sampler = StepSampler(100, 4, accum_iter=2, world_size=3)
    assert sampler.steps_per_epoch == 4
    assert len(sampler) == len(list(sampler)) == 8
    sampler.set_epoch(0, start_step=3)
    assert len(sampler) == len(list(sampler)) == 2


def test_fewer_images_than_a_step_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"12 images .* 16 x 2 x 1 = 32 .*lower --batch_size"):
        StepSampler(12, 16, accum_iter=2)


def test_a_step_beyond_the_epoch_is_refused():
    sampler = StepSampler(100, 16)
    with pytest.raises(UsageError, match="step 7 of an epoch of 6 steps"):
        sampler.set_epoch(0, 7)


# --- the order of an evaluation ----------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 17])
def test_an_evaluation_takes_each_sample_once_over_all_processes(processes, batch_size):
    samplers = [EvalSampler(17, batch_size, rank, processes) for rank in range(processes)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(index for batch in batches for index, _ in batch) == list(range(17))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sum(map(len, samplers)) == len(batches)


def test_an_evaluation_can_go_on_after_a_lost_worker():
    sampler = EvalSampler(10, 3)
    everything = list(sampler)
    sampler.set_epoch(0, 0, 2)
    assert list(sampler) == everything[2:]
    assert len(sampler) == 2


# --- bad files ---------------------------------------------------------------------------------


def test_a_bad_file_is_named_once(tmp_path):
    data, lines = ImageFiles(write_pictures(tmp_path, 4), noisy), []
    bad_images = BadImages(lines.append)
    for batch in ([(2, "torn")], [], [(2, "torn"), (3, "empty")], [(3, "empty")]):
        bad_images.add(batch, data)
    assert bad_images.count == 2
    assert lines == [
        f"{tmp_path / '002.png'} cannot be decoded: skipped (torn)",
        f"{tmp_path / '003.png'} cannot be decoded: skipped (empty)",
    ]


def test_too_many_bad_files_stop_the_run(tmp_path):
    data = ImageFiles(write_pictures(tmp_path, 4), noisy)
    bad_images = BadImages(lambda line: None)
    bad_images.add([(1, "torn")], data)
    bad_images.check(total=10, num_files=1000, max_share=0.01)
    with pytest.raises(TrainingError) as error:
        bad_images.check(total=11, num_files=1000, max_share=0.01)
    assert str(error.value) == (
        "11 of 1000 images cannot be decoded, more than --max_bad_images 0.01 allows; "
        f"first: {tmp_path / '001.png'} (torn)"
    )


# --- the loader --------------------------------------------------------------------------------


def tagged(file: BinaryIO) -> torch.Tensor:
    """The first pixel and some noise: enough to tell images and augmentations apart."""
    return noisy(file)[:, :1, :1]


def make_loader(folder: Path, workers: int, transform=tagged, warn=print, batch=2) -> Loader:
    data = ImageFiles(folder, transform)
    return Loader(data, StepSampler(len(data), batch, seed=1), workers, warn=warn)


def images(batches) -> list[torch.Tensor]:
    return [batch for batch, _ in batches]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_data_do_not_depend_on_the_number_of_workers(tmp_path):
    write_pictures(tmp_path, 12)
    none, two = make_loader(tmp_path, 0), make_loader(tmp_path, 2)
    for epoch in (0, 1):
        assert same(images(none.epoch(epoch)), images(two.epoch(epoch)))
    assert not same(images(none.epoch(0)), images(none.epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_do_not_depend_on_where_a_run_was_resumed(tmp_path, workers):
    write_pictures(tmp_path, 12)
    whole = images(make_loader(tmp_path, workers).epoch(4))
    assert same(images(make_loader(tmp_path, workers).epoch(4, start_step=4)), whole[4:])


def test_an_epoch_can_follow_one_that_was_left(tmp_path):
    loader = make_loader(write_pictures(tmp_path, 12), 2)
    next(loader.epoch(0))
    assert same(images(loader.epoch(1)), images(make_loader(tmp_path, 0).epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_alone(tmp_path, workers):
    loader = make_loader(write_pictures(tmp_path, 6), workers)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_bad_files_are_reported_with_the_batch(tmp_path):
    loader = make_loader(write_pictures(tmp_path, 12), 2)
    (tmp_path / "004.png").write_bytes(b"")
    batches = list(loader.epoch(0))
    assert [[index for index, _ in bad] for _, bad in batches if bad] == [[4]]
    assert [len(batch) for batch, _ in batches] == [2] * 6


def kill_once(flag: Path, file: BinaryIO) -> torch.Tensor:
    """Kill the worker that is the first to come to picture 7."""
    if file.name.endswith("007.png") and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return tagged(file)


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    write_pictures(tmp_path / "data", 24)
    warnings = []
    transform = partial(kill_once, tmp_path / "killed")
    loader = make_loader(tmp_path / "data", 2, transform, warnings.append)
    expected = images(make_loader(tmp_path / "data", 0).epoch(0))
    assert same(images(loader.epoch(0)), expected)
    assert len(warnings) == 1 and "a data worker was killed" in warnings[0]


def test_only_fetching_notices_a_killed_worker(tmp_path):
    write_pictures(tmp_path, 24)
    loader, warnings = make_loader(tmp_path, 2), []
    loader.warn = warnings.append
    expected = images(make_loader(tmp_path, 0).epoch(0))
    got = []
    for batch, _ in loader.epoch(0):
        got.append(batch)
        if len(got) == 3:
            for worker in loader._workers:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.3)  # Where an optimizer step would be; torch's handler raised here.
            assert not warnings
    assert same(got, expected)
    assert len(warnings) == 1


def test_workers_killed_between_epochs_are_replaced(tmp_path):
    loader, warnings = make_loader(write_pictures(tmp_path, 6), 2), []
    loader.warn = warnings.append
    list(loader.epoch(0))
    for worker in loader._workers:
        os.kill(worker.pid, signal.SIGKILL)
    assert same(images(loader.epoch(1)), images(make_loader(tmp_path, 0).epoch(1)))
    assert len(warnings) == 1


def kill_always(file: BinaryIO) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)


def test_losing_workers_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_LOST_WORKERS", 0)
    loader = make_loader(write_pictures(tmp_path, 4), 1, kill_always)
    with pytest.raises(
        TrainingError, match=r"1 data workers were lost in this epoch.* lower --num_workers"
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_given_up_in_a_worker_is_one_clear_line(tmp_path, workers):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(TrainingError) as error:
        list(make_loader(tmp_path, workers).epoch(0))
    assert str(error.value).startswith("10 files in a row cannot be decoded, the last: ")
    assert "\n" not in str(error.value)


def buggy(file: BinaryIO) -> torch.Tensor:
    raise ZeroDivisionError("a bug")


def test_a_worker_s_own_error_surfaces_as_itself(tmp_path):
    warnings = []
    loader = make_loader(write_pictures(tmp_path, 4), 1, buggy, warnings.append)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(loader.epoch(0))
    assert not warnings


def test_an_interrupt_surfaces_as_itself(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make_loader(write_pictures(tmp_path, 4), 0, interrupted).epoch(0))


# --- too little shared memory --------------------------------------------------------------------


def limited(file: BinaryIO) -> torch.Tensor:
    """In a worker whose files, shared memory among them, may have 4 KiB: as on a full /dev/shm."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return torch.zeros(3, 64, 64)


def test_a_batch_that_finds_no_shared_memory_is_one_line_with_the_remedy(tmp_path):
    loader = make_loader(write_pictures(tmp_path, 4), 2, limited)
    with pytest.raises(TrainingError) as error:
        list(loader.epoch(0))
    assert re.fullmatch(
        r"the shared memory is too small for the batches of the 2 data workers: /dev/shm has \d+ "
        r"MiB; start the container with --shm-size=8g or --ipc=host, or lower --num_workers or "
        r"--batch_size",
        str(error.value),
    )


SMALL_MEMORY = """
import sys
import torch
from util.data.datasets import ImageFiles
from util.data.loader import Loader
from util.data.samplers import StepSampler
from util.errors import TrainingError

data = ImageFiles(sys.argv[1], lambda file: torch.zeros(3, 256, 256))
try:
    list(Loader(data, StepSampler(len(data), 2), 2).epoch(0))
except TrainingError as error:
    print(error)
"""


def test_a_container_s_small_shared_memory_is_one_line_with_the_remedy(tmp_path):
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    mounting = ["unshare", "-m", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("needs the right to mount another /dev/shm")
    python = shlex.join([sys.executable, "-c", SMALL_MEMORY, str(write_pictures(tmp_path, 8))])
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {python}"], capture_output=True, text=True
    )
    assert result.stdout.startswith("the shared memory is too small"), result
    assert result.stdout.count("\n") == 1 and result.stderr == ""


FEW_FILES = """
import os, resource, sys
import torch
from util.data.datasets import ImageFiles
from util.data.loader import Loader
from util.data.samplers import StepSampler
from util.errors import TrainingError

data = ImageFiles(sys.argv[1], lambda file: torch.zeros(3, 8, 8))
limit = max(map(int, os.listdir("/dev/fd"))) + 4
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    list(Loader(data, StepSampler(len(data), 1), 2).epoch(0))
except TrainingError as error:
    print(error)
"""


def test_workers_that_may_open_too_few_files_are_one_line_with_the_remedy(tmp_path):
    command = [sys.executable, "-c", FEW_FILES, str(write_pictures(tmp_path, 4))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "raise the limit of open files (`ulimit -n` is" in result.stdout, result
    assert result.stdout.count("\n") == 1 and "Traceback" not in result.stderr
