import argparse
import errno
import io
import os
import pickle
import random
import resource
import sys
import tarfile
import warnings
import zipfile

import pytest
import torch
from torch import nn

from tests.checks import same
from util import atomic
from util.data import files
from util.data.datasets import seeded
from util.errors import TrainingError, UsageError
from util.run.resume import LAST
from util.weights.checkpoint import load_file, save_atomically

CONTENT = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "epoch": 3}


@pytest.fixture(autouse=True)
def own_random_state():
    """What a test does to the random numbers ends with it."""
    with seeded(0):
        yield


def legacy_save(content, path):
    """Write the format that PyTorch had before its zip archives."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


FORMATS = pytest.mark.parametrize("save", [torch.save, legacy_save], ids=["zip", "legacy"])

# ---- Writing -------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_only_file_written(tmp_path):
    path = tmp_path / LAST
    for epoch in (1, 2):
        save_atomically(CONTENT | {"epoch": epoch}, path)
        assert os.listdir(tmp_path) == [LAST]
        assert load_file(path)["epoch"] == epoch


def test_what_was_written_is_read(tmp_path):
    save_atomically(CONTENT, tmp_path / LAST)
    torch.testing.assert_close(load_file(tmp_path / LAST), CONTENT, rtol=0, atol=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without space")
@pytest.mark.parametrize("size", [1, 300_000], ids=["small", "large"])
def test_a_full_disk_is_an_error_that_keeps_the_older_file(tmp_path, size, monkeypatch):
    path, temporary = tmp_path / LAST, tmp_path / "temporary"
    save_atomically(CONTENT, path)
    temporary.symlink_to("/dev/full")
    monkeypatch.setattr(atomic, "temporary_name", lambda path: temporary)
    with pytest.raises(TrainingError, match=r"cannot write .*; the previous one is intact"):
        save_atomically({"model": torch.zeros(size)}, path)
    assert os.listdir(tmp_path) == [LAST]
    assert load_file(path)["epoch"] == 3


@pytest.fixture
def small_files():
    """No file can grow beyond 100 kB: the disk fills up in the middle of one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_is_an_error_that_keeps_the_older_file(small_files, tmp_path):
    save_atomically(CONTENT, tmp_path / LAST)
    with pytest.raises(TrainingError, match="the previous one is intact"):
        save_atomically({"model": torch.zeros(300_000)}, tmp_path / LAST)
    assert os.listdir(tmp_path) == [LAST]
    assert load_file(tmp_path / LAST)["epoch"] == 3


def test_the_error_gives_the_reason_of_the_system(small_files, tmp_path):
    with pytest.raises(TrainingError, match="File too large"):
        save_atomically({"model": torch.zeros(300_000)}, tmp_path / LAST)


def test_data_are_on_the_disk_before_the_file_has_its_name_and_then_the_name_is(
    tmp_path, monkeypatch
):
    calls = []

    def recorded(name, call):
        def record(*args):
            calls.append(name)
            return call(*args)

        return record

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    save_atomically(CONTENT, tmp_path / LAST)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_an_error_that_promises_no_older_file(tmp_path):
    with pytest.raises(TrainingError, match="No such file or directory") as error:
        save_atomically(CONTENT, tmp_path / "gone" / LAST)
    assert "intact" not in str(error.value)


# ---- Reading -------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.pth does not exist"):
        load_file(tmp_path / "gone.pth")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a file"):
        load_file(tmp_path)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_error_of_the_storage_is_not_taken_for_damage(tmp_path, monkeypatch, at_the_end):
    class Failing(io.FileIO):
        def read(self, size=-1):
            if not at_the_end or self.tell() > 4:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    slept = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    torch.save(CONTENT, tmp_path / LAST)
    monkeypatch.setattr("builtins.open", lambda path, mode: Failing(path))
    with pytest.raises(TrainingError, match=rf"{LAST} cannot be read, tried 7 times.*\(EIO\)"):
        load_file(tmp_path / LAST)
    assert slept == list(files.RETRY_DELAYS)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def may_not(*args, **kwargs):  # Permissions themselves do not stop a superuser.
        raise PermissionError(13, "Permission denied")

    torch.save(CONTENT, tmp_path / LAST)
    monkeypatch.setattr("builtins.open", may_not)
    with pytest.raises(UsageError, match=f"{LAST}.*Permission denied"):
        load_file(tmp_path / LAST)


@FORMATS
def test_a_truncated_file_is_refused_wherever_it_ends(save, tmp_path):
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    save(CONTENT, whole)
    content = whole.read_bytes()
    for length in range(0, len(content), len(content) // 60):
        part.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"part\.pth"):
            load_file(part)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Not a checkpoint.\n",
        b"epoch,loss\n1,0.5\n",
        b"<html><body>Not found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"PK\x03\x04" + bytes(99),
    ],
    ids=["empty", "text", "csv", "html", "git_lfs", "png", "zip"],
)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"other\.pth"):
        load_file(path)


@FORMATS
def test_a_file_that_holds_no_dictionary_is_refused(save, tmp_path):
    save([1, 2], tmp_path / LAST)
    with pytest.raises(UsageError, match="holds a list, not a dictionary"):
        load_file(tmp_path / LAST)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize(
    ("save", "load"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (legacy_save, lambda path: torch.load(path, weights_only=False)),
        (plain_pickle, lambda path: pickle.loads(path.read_bytes())),
    ],
    ids=["zip", "legacy", "pickle"],
)
def test_a_hostile_file_runs_nothing(save, load, tmp_path):
    path, marker = tmp_path / LAST, tmp_path / "marker"
    save({"model": {}, "args": Hostile(marker)}, path)
    with pytest.raises(UsageError, match="refused"):
        load_file(path)
    assert not marker.exists()
    load(path)
    assert marker.exists()  # so the file is hostile indeed


def test_refusal_of_a_hostile_file_names_the_object_on_one_line(tmp_path):
    torch.save({"model": {}, "args": Hostile("marker")}, tmp_path / LAST)
    with pytest.raises(UsageError, match=r"\bopen\b") as error:
        load_file(tmp_path / LAST)
    assert str(error.value).isprintable()  # no line breaks, no terminal codes
    assert "can still be loaded" not in str(error.value)


@FORMATS
def test_arguments_of_the_published_checkpoints_are_read(save, tmp_path):
    args = argparse.Namespace(model="convmae_convvit_base_patch16", input_size=224, blr=1.5e-4)
    save(CONTENT | {"args": args}, tmp_path / LAST)
    assert load_file(tmp_path / LAST)["args"] == args


def test_any_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / LAST
    save_atomically(CONTENT, path)
    content = path.read_bytes()
    begin = content.index(CONTENT["model"]["weight"].numpy().tobytes())
    for bit in range(8 * 24):
        damaged = bytearray(content)
        damaged[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        torch.load(path, weights_only=True)  # torch itself does not look
        with pytest.raises(UsageError, match=r"is damaged or truncated .*data/0"):
            load_file(path)


def test_no_flipped_bit_anywhere_changes_what_is_read(tmp_path):
    path = tmp_path / LAST
    save_atomically(CONTENT, path)
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 1500):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:  # padding and dates do not matter
            assert same(load_file(path), CONTENT)
        except UsageError as error:
            assert str(error).isprintable()


@FORMATS
def test_a_fuzzed_file_is_read_or_refused_in_a_line(save, tmp_path):
    path, rng = tmp_path / LAST, random.Random(0)
    save(CONTENT | {"args": argparse.Namespace(a=[1, "x"]), "n": {1, 2}}, path)
    content = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 2, 8])):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.choice([0, 1, 4])] = rng.randbytes(rng.choice([0, 1, 4]))
        path.write_bytes(damaged)
        try:
            load_file(path)
        except UsageError as error:
            assert str(error).isprintable()


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / LAST)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_file(tmp_path / LAST), CONTENT)


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("r/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("r/data/0", bytes(10**7))


def a_name_twice(path):
    torch.save(CONTENT, path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"}.")


def another_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("picture.png", b"")


def torchscript(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def other_byte_order(path):
    other = {"little": "big", "big": "little"}[sys.byteorder]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("r/byteorder", other)


def tar_of_the_first_format(path):
    link = tarfile.TarInfo("storages")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link)


def whole_module(path):
    torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [(compressed, "it is compressed"), (a_name_twice, "a zip archive of something else"),
     (another_archive, "a zip archive of something else"), (torchscript, "a TorchScript program"),
     (other_byte_order, f"not {sys.byteorder}-endian"), (tar_of_the_first_format, "no PyTorch"),
     (whole_module, r"holds a torch\.nn\.modules\.linear\.Linear, not a dictionary")],
)  # fmt: skip
def test_an_archive_of_another_kind_is_refused_with_the_reason(write, reason, tmp_path):
    write(tmp_path / LAST)
    with pytest.raises(UsageError, match=reason) as error:
        load_file(tmp_path / LAST)
    assert str(error.value).isprintable()
