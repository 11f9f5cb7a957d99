import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import decode, write_pictures
from util.data import files
from util.data.datasets import ImageFiles
from util.data.files import read_file, retried
from util.data.images import load_image
from util.errors import TrainingError


@pytest.fixture(autouse=True)
def slept(monkeypatch) -> list[float]:
    """The seconds that were to be slept."""
    seconds = []
    monkeypatch.setattr(files.time, "sleep", seconds.append)
    return seconds


def failing(times: int, number: int):
    """A reader that fails so many times."""
    failures = iter([number] * times)

    def read() -> str:
        if number := next(failures, None):
            raise OSError(number, os.strerror(number), "a.png")
        return "read"

    return read


# --- what is read --------------------------------------------------------------------------------


def test_a_file_comes_whole_and_with_its_name(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    file = read_file(tmp_path / "a")
    assert file.read() == b"content" and file.name == str(tmp_path / "a")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make_fifo, "a FIFO"), (make_socket, "a socket"), (make_device, "a device")],
)
def test_what_is_no_regular_file_is_refused_and_nothing_hangs(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    make(Path("a.png"))
    with pytest.raises(OSError, match=f"a.png cannot be decoded: it is {kind}$"):
        load_image("a.png")


def test_a_folder_that_is_called_like_an_image_is_refused(tmp_path):
    with pytest.raises(OSError, match="it is a folder"):
        read_file(tmp_path)


def test_a_file_of_more_bytes_than_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(OSError, match="1073741825 bytes are more than"):
        read_file(tmp_path / "a.png")


def test_a_file_that_vanished_is_a_bad_one(tmp_path, slept):
    data = ImageFiles(write_pictures(tmp_path, 3), decode)
    (tmp_path / "001.png").unlink()
    *_, bad = data[1, 0]
    assert bad[0] == (1, "No such file or directory") and not slept


# --- errors of the storage -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_storage_that_fails_for_a_while_costs_nothing_but_time(number, slept):
    assert retried(failing(3, number), "a.png") == "read"
    assert slept == [0.5, 1, 2]


def test_a_storage_that_goes_on_failing_ends_the_run_with_its_error(slept):
    with pytest.raises(TrainingError) as error:
        retried(failing(99, errno.ESTALE), "a.png")
    assert str(error.value) == (
        "a.png cannot be read, tried 7 times in 31.5 s: Stale file handle (ESTALE); the file may "
        "be sound, its storage is not: start again when it answers"
    )
    assert sum(slept) == 31.5


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_what_is_the_file_s_own_fault_is_not_tried_again(number, slept):
    with pytest.raises(OSError, match=os.strerror(number)):
        retried(failing(99, number), "a.png")
    assert not slept


@pytest.fixture
def unreadable(tmp_path) -> Path:
    """A folder of two sound pictures and a file that the system answers with EIO."""
    (write_pictures(tmp_path, 2) / "bad.png").symlink_to("/proc/self/mem")
    try:
        with open(tmp_path / "bad.png", "rb") as file:
            file.read(1)
    except OSError as error:
        if error.errno == errno.EIO:
            return tmp_path
    pytest.skip("needs Linux's /proc/self/mem, whose first byte cannot be read")


def test_an_input_output_error_is_not_taken_for_a_damaged_image(unreadable, slept):
    data = ImageFiles(unreadable, decode)
    with pytest.raises(TrainingError, match=r"bad\.png cannot be read.*Input/output error \(EIO\)"):
        data[2, 0]
    assert len(slept) == len(files.RETRY_DELAYS)


class Flaky(ImageFiles):
    """Its own reading meets an error of the storage, once."""

    failed = False

    def load(self, index: int):
        if not self.failed:
            self.failed = True
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return super().load(index)


def test_a_data_set_that_reads_by_itself_is_tried_again_too(tmp_path, slept):
    _, bad = Flaky(write_pictures(tmp_path, 2), decode)[0, 0]
    assert bad == () and slept == [0.5]


LIMITED = """
import resource, sys
from tests.pictures import decode
from util.data import files
from util.data.datasets import ImageFiles
from util.errors import TrainingError

files.RETRY_DELAYS = (0.01, 0.01)
data = ImageFiles(sys.argv[1], decode)
data[0, 0]
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
taken = []
try:
    while True:
        taken.append(open("/dev/null"))
except OSError:
    pass
try:
    data[0, 0]
except TrainingError as error:
    print(error)
taken.pop()
print(data[0, 0][1])
"""


def test_too_many_open_files_are_told_with_the_remedy(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(write_pictures(tmp_path, 2))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    complaint, bad = result.stdout.splitlines()
    assert "000.png cannot be read, tried 3 times" in complaint
    assert "Too many open files (EMFILE); raise the limit of open files (`ulimit -n` is 32)" in (
        complaint
    )
    assert bad == "()"
