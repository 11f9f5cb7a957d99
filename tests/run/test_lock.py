import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.checks import assert_one_line, command_line
from tests.runs import Process, code_of, write_images
from util.atomic import temporary_name
from util.errors import UsageError
from util.run import lock
from util.run.lock import LOCK, FolderLock


def hold_until(folder: str, end: str, child: bool) -> None:
    """Hold a folder until a file appears; the child is as a loader's worker that lives on."""
    import os
    import sys
    import time

    from util.run.lock import hold

    try:
        hold(folder)
    except ValueError:
        print("refused", flush=True)
        sys.exit(2)
    if child and os.fork() == 0:
        time.sleep(600)
    print("held", flush=True)
    while not os.path.exists(end):
        time.sleep(0.02)
    sys.exit(0)


@pytest.fixture
def holder(launcher, tmp_path):
    """Starts processes that hold the folder until `let_go` appears or they are killed."""
    started = []

    def start(child: bool = False, wait: bool = True) -> Process:
        (tmp_path / "run").mkdir(exist_ok=True)
        values = dict(folder=str(tmp_path / "run"), end=str(tmp_path / "let_go"), child=child)
        started.append(launcher.start(before=code_of(hold_until, **values)))
        if wait:
            started[-1].wait_for("held")
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir(exist_ok=True)
    return path


def holder_says(folder: Path) -> dict:
    return json.loads((folder / LOCK).read_text())


def test_a_second_run_is_refused_in_a_line_that_names_the_first(holder, folder):
    process = holder()
    with pytest.raises(UsageError) as error:
        FolderLock(folder).acquire()
    says = holder_says(folder)
    assert says["pid"] == process.pid
    line = f"is in use by process {process.pid} on {says['host']}, since {says['since']}"
    assert line in str(error.value) and str(error.value).isprintable()


def test_the_refusal_leaves_the_first_its_lock(holder, folder):
    holder()
    for _ in range(2):
        with pytest.raises(UsageError, match="is in use"):
            FolderLock(folder).acquire()


def test_a_stopped_process_still_has_its_lock(holder, folder):
    holder().signal(signal.SIGSTOP)
    with pytest.raises(UsageError, match="is in use"):
        FolderLock(folder).acquire()


@pytest.mark.parametrize("child", [False, True], ids=["alone", "with_a_child_that_lives_on"])
def test_the_lock_of_a_killed_run_is_taken_over_at_once(child, holder, folder):
    process = holder(child)
    process.signal(signal.SIGKILL)
    process.wait()
    assert (folder / LOCK).exists()
    with FolderLock(folder):
        assert holder_says(folder)["pid"] == os.getpid()


def test_a_run_that_ends_leaves_no_file(holder, folder):
    process = holder()
    (folder.parent / "let_go").touch()
    assert process.wait().code == 0
    assert os.listdir(folder) == []


def test_of_many_that_take_over_at_once_one_gets_it(holder, folder):
    process = holder()
    process.signal(signal.SIGKILL)
    process.wait()
    many = [holder(wait=False) for _ in range(5)]
    while sum(p.out.read_text() == "refused\n" for p in many) < 4:
        time.sleep(0.02)  # one that waits for ever fails by the limit of a test
    (folder.parent / "let_go").touch()
    assert sorted(p.wait().out for p in many) == ["held\n", *["refused\n"] * 4]


def test_the_same_process_does_not_take_it_twice(folder):
    with FolderLock(folder), pytest.raises(UsageError, match=f"process {os.getpid()}"):
        FolderLock(folder).acquire()
    with FolderLock(folder):
        pass


def test_what_a_killed_run_had_half_written_is_removed(folder):
    left, kept = temporary_name(folder / "checkpoint.pth"), folder / "checkpoint.pth"
    left.write_bytes(b"half")
    kept.write_bytes(b"whole")
    with FolderLock(folder):
        assert {path.name for path in folder.iterdir()} == {LOCK, kept.name}


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[1]", b"{"])
def test_a_damaged_lock_file_is_taken_over(content, folder):
    (folder / LOCK).write_bytes(content)
    with FolderLock(folder):
        assert holder_says(folder)["pid"] == os.getpid()


def test_a_message_survives_a_lock_file_of_other_content(holder, folder):
    holder()
    says = {"pid": 3, "host": "a\nb", "boot": holder_says(folder)["boot"]}
    (folder / LOCK).write_text(json.dumps(says))
    with pytest.raises(UsageError, match=r"process 3 on a\?b, since \?"):
        FolderLock(folder).acquire()


def test_a_folder_that_cannot_be_written_is_refused(folder):
    with pytest.raises(UsageError, match=r"--work-dir .* cannot be locked"):
        FolderLock(folder / "gone", "--work-dir").acquire()


# ---- Other machines, file systems without locks --------------------------------------------------


def elsewhere(folder: Path) -> None:
    """Leave the lock file of a process of another machine."""
    says = {"host": "node7", "pid": 12, "since": "2024-01-01", "ticks": "1", "boot": "another"}
    (folder / LOCK).write_text(json.dumps(says))


def test_a_holder_on_another_machine_that_shows_life_is_refused(folder, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 30.0)
    elsewhere(folder)
    done = threading.Event()

    def beat():
        while not done.wait(0.05):
            os.utime(folder / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match="process 12 on node7, since 2024-01-01"):
            FolderLock(folder).acquire()
    finally:
        done.set()
        thread.join()


def test_a_silent_holder_on_another_machine_is_taken_over(folder, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    elsewhere(folder)
    with FolderLock(folder):
        assert holder_says(folder)["pid"] == os.getpid()


def test_a_holder_shows_life(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with FolderLock(folder):
        os.utime(folder / LOCK, (1, 1))
        end = time.monotonic() + 60
        while os.stat(folder / LOCK).st_mtime == 1:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that cannot lock, as some cluster file systems are mounted."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_without_locks_a_live_process_is_found_by_its_number(no_locks, holder, folder):
    process = holder()  # in a process of its own, which does not know of the patch
    with pytest.raises(UsageError, match=f"process {process.pid} "):
        FolderLock(folder).acquire()


def test_without_locks_a_dead_process_is_taken_over(no_locks, holder, folder):
    process = holder()
    process.signal(signal.SIGKILL)
    process.wait()
    with FolderLock(folder):
        assert holder_says(folder)["pid"] == os.getpid()


def test_without_locks_a_number_used_again_is_not_the_holder(no_locks, holder, folder):
    holder()
    text = (folder / LOCK).read_text()
    (folder / LOCK).write_text(re.sub(r'"ticks": "\d+"', '"ticks": "1"', text))
    with FolderLock(folder):
        assert holder_says(folder)["pid"] == os.getpid()


# ---- A run ---------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(launcher, tmp_path):
    command = command_line(
        {"data_path": write_images(tmp_path / "images", 8), "output_dir": tmp_path / "out"}
        | {"model": "convmae_convvit_tiny_patch16", "input_size": 32, "patch_size": (2, 2, 1)}
        | {"device": "cpu", "num_workers": 0, "batch_size": 4, "epochs": 10**5, "print_freq": 1}
    )
    first = launcher.start(*command)
    first.wait_for("Epoch 2/")
    for _ in range(2):
        second = launcher.run(*command)
        assert_one_line(second, 2, "--output_dir", f"is in use by process {first.pid} on ")
    first.signal(signal.SIGKILL)
    first.wait()
    third = launcher.start(*command)
    third.wait_for("from epoch")
    third.signal(signal.SIGTERM)
    assert third.wait().code == 0
    assert LOCK not in os.listdir(tmp_path / "out")
