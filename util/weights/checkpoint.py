"""Checkpoint files: written whole or not at all, read so that a hostile one runs nothing."""

import mmap
import os
import struct
import sys
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch

from util.atomic import write_atomically
from util.data.files import retried
from util.errors import TrainingError, UsageError, printable
from util.weights.unpickle import Foreign, Refused, Unpickler

# The number with which files of PyTorch before 1.6 begin, and the version of their format.
_LEGACY = [0x1950A86A20F9469CFC6C, 1001]
_CHUNK = 2**24  # bytes read at a time


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint that is whole or not there, see `write_atomically`.

    `torch.save` writes a zip archive with the checksum of every tensor.
    """
    write_atomically(path, lambda file: torch.save(state, file))


def load_file(path: str | Path) -> dict:
    """Read a checkpoint's contents to the CPU. Nothing in the file can run code.

    Objects of classes that are not known to be harmless are `Foreign`; numpy's numbers are
    Python's own. The checksums of the archive are verified; files of PyTorch before 1.6, and
    those written with `compute_crc32=False`, have none.

    Raises:
        UsageError: no such file, not a checkpoint, damaged, or one that wants to run code.
        TrainingError: the storage fails, see `retried`.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist or is not a file")
    try:
        content = retried(partial(_read, path), path)
    except TrainingError:
        raise
    except Refused as error:
        raise UsageError(f"checkpoint {path} is refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise UsageError(
            f"checkpoint {path} is damaged or truncated ({printable(error)}): take another one, "
            f"or copy it anew"
        ) from error
    except Exception as error:  # Damaged bytes make the reader raise nearly anything.
        reason = printable(error) or type(error).__name__
        raise UsageError(
            f"checkpoint {path} cannot be read, it is damaged, truncated or no PyTorch file "
            f"({reason})"
        ) from error
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, Foreign) else type(content).__name__
        raise UsageError(f"checkpoint {path} holds a {printable(kind)}, not a dictionary")
    return content


def _read(path: Path) -> object:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\x03\x04":
            return _read_legacy(file, size)
        try:
            return _read_zip(file, size)
        except zipfile.BadZipFile as error:
            if isinstance(error.__context__, OSError):  # the storage's, while the end was read
                raise error.__context__ from None
            raise


def _read_zip(file: BinaryIO, size: int) -> object:
    """The archive that PyTorch writes since 1.6: ROOT/data.pkl, and ROOT/data/KEY for storages."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(members) < len(archive.infolist()):
            raise Refused("it is a zip archive of something else")
        if f"{roots[0]}/constants.pkl" in members:
            raise Refused("it is a TorchScript program, no checkpoint of weights")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise Refused("it is compressed, which PyTorch does not do")
        if sum(info.file_size for info in members.values()) > size:
            raise Refused("its parts are larger than the file")
        if not any(info.CRC for info in members.values()):
            for info in members.values():
                info.CRC = None  # written with compute_crc32=False: not verified by `open`
        order = members.get(f"{roots[0]}/byteorder")
        if order and archive.read(order) != sys.byteorder.encode():
            raise Refused(f"it was written on a machine that is not {sys.byteorder}-endian")
        storages: dict[str, torch.UntypedStorage] = {}

        def load_storage(key: str, numel: int, itemsize: int) -> torch.UntypedStorage:
            if key not in storages:
                info = members[f"{roots[0]}/data/{key}"]
                with archive.open(info) as member:
                    storages[key] = torch.UntypedStorage(info.file_size)
                    _fill(storages[key], member)
            if storages[key].nbytes() != numel * itemsize:
                raise Refused(f"its storage {printable(key)} has another size than it says")
            return storages[key]

        pickled = BytesIO(archive.read(members[f"{roots[0]}/data.pkl"]))
        return Unpickler(pickled, size, load_storage).load()


def _read_legacy(file: BinaryIO, size: int) -> object:
    """The format of PyTorch 0.1.9 to 1.5: pickles, then the storages' sizes and bytes."""
    # Reading a mapped file allocates no more than there is.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if [Unpickler(mapped, size).load() for _ in _LEGACY] != _LEGACY:
            raise Refused("it is no PyTorch file")
        if Unpickler(mapped, size).load()["little_endian"] != (sys.byteorder == "little"):
            raise Refused(f"it was written on a machine that is not {sys.byteorder}-endian")
        storages: dict[str, torch.UntypedStorage] = {}
        itemsizes: dict[str, int] = {}

        def load_storage(key: str, numel: int, itemsize: int) -> torch.UntypedStorage:
            if key not in storages:
                if numel * itemsize + sum(s.nbytes() for s in storages.values()) > size:
                    raise Refused("its storages are larger than the file")
                storages[key] = torch.UntypedStorage(numel * itemsize)
                itemsizes[key] = itemsize
            return storages[key]

        content = Unpickler(mapped, size, load_storage).load()
        keys = Unpickler(mapped, size).load()
        if sorted(keys) != sorted(storages):
            raise Refused("it lacks some of its storages")
        for key in keys:
            (numel,) = struct.unpack("<q", mapped.read(8))
            if numel * itemsizes[key] != storages[key].nbytes():
                raise Refused(f"its storage {printable(key)} has another size than it says")
            _fill(storages[key], mapped)
        return content


def _fill(storage: torch.UntypedStorage, file: BinaryIO) -> None:
    """Read a storage's bytes."""
    bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    view = memoryview(bytes_.numpy())
    while view:
        data = file.read(min(len(view), _CHUNK))
        if not data:
            raise EOFError("it ends within a tensor")
        view[: len(data)] = data
        view = view[len(data) :]
