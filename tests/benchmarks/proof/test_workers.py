from multiprocessing import Pipe

import pytest

from benchmarks.proof.arms import ARMS
from benchmarks.proof.jobs import Job
from benchmarks.proof.workers import Worker, _receive
from util.errors import TrainingError, UsageError


@pytest.fixture
def worker():
    """A worker that does a job, and what its process sends through."""
    ours, theirs = Pipe()
    job = Job(ARMS["convmae"], 1, "probe", 1, dict)
    return Worker(None, ours, job), theirs


def test_what_a_process_found_comes_with_its_job(worker):
    worker, process = worker
    job = worker.job
    process.send({"accuracy": 1.0})
    assert _receive(worker) == (job, {"accuracy": 1.0})
    assert worker.job is None


def test_a_lost_process_is_one_line_that_names_its_job(worker):
    worker, process = worker
    process.close()
    with pytest.raises(TrainingError, match=r"lost in ConvMAE, seed 1: probe.*lower --jobs"):
        _receive(worker)


@pytest.mark.parametrize("kind", [UsageError, TrainingError])
def test_an_error_in_a_process_is_the_programs(worker, kind):
    worker, process = worker
    process.send(kind("the disk is full"))
    with pytest.raises(kind, match="ConvMAE, seed 1: probe: the disk is full"):
        _receive(worker)
