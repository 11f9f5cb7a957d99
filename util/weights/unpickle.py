"""A reader of pickles that runs nothing: foreign objects become placeholders.

A pickle names classes and functions, and says with what to call them. Here no name is ever
imported: those of `_KNOWN` stand for functions below, which check what they are given and cannot
allocate more than the file is large; any other name is a placeholder, and so is what it makes.
"""

import argparse
import collections
import datetime
import math
import pathlib
import pickle
import re
import sys
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from util.errors import printable


class Refused(pickle.UnpicklingError):
    """The file wants to run code, or is not what it says."""


class Foreign:
    """An object of a class that is not known to be harmless; nothing of that class ever runs.

    Attributes:
        kind: the full name of its class, or of the function that makes it.
        args: what it would have been made with.
        state: what it would have been set to; mostly its attributes.
        items: of a mapping.
        entries: of a sequence or set.
    """

    def __init__(self, kind: str, args: tuple = ()) -> None:
        self.kind, self.args, self.state = kind, args, None
        self.items: dict = {}
        self.entries: list = []

    def __repr__(self) -> str:
        return f"<{printable(self.kind)}>"


@dataclass(frozen=True)
class Name:
    """A class or function that a file names; it is not imported."""

    kind: str

    def __repr__(self) -> str:
        return f"<{printable(self.kind)}>"


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors, and the type of the numbers in them."""

    data: torch.UntypedStorage
    dtype: torch.dtype


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}

# No sound checkpoint names these. All other names do no harm either: this is to tell the user.
_RUNS_CODE = {
    *("os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "pty", "runpy", "importlib"),
    *("ctypes", "pickle", "_pickle", "webbrowser", "torch.hub", "torch.load", "numpy.load"),
    *(f"builtins.{n}" for n in ("eval", "exec", "compile", "open", "__import__", "breakpoint")),
    *("io.open", "_io.open", "torch.serialization.load"),
}


class Unpickler(pickle._Unpickler):
    """Reads a pickle; see the module.

    The superclass is the standard library's reader in Python: unlike the one in C it lets every
    operation be checked, and its memory does not depend on numbers in the file.

    Args:
        file: to read from; reading more than there is must not allocate.
        size: bytes of the whole file; tensors cannot have more numbers.
        load_storage: from a key, a count of numbers and the bytes of one to a storage; None where
            there are no storages.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        load_storage: Callable[[str, int, int], torch.UntypedStorage] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self.size, self.load_storage = size, load_storage

    # --- names and what they make ----------------------------------------------------------------

    def find_class(self, module: str, name: str) -> object:
        """A value, or the name of what the file wants to have."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        kind = f"{module}.{name}"
        if _RUNS_CODE & {kind, module, module.split(".")[0]}:
            raise Refused(f"it names {printable(kind)}, which could run code")
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return Name(kind)

    def get_extension(self, code: int) -> None:
        """Refused: such numbers stand for names that only a program knows."""
        raise Refused(f"it uses the extension code {code}")

    def make(self, maker: object, args: object, kwargs: object = None) -> object:
        """Result of calling a known name with arguments."""
        if not isinstance(maker, Name | Foreign) or not isinstance(args, tuple):
            raise Refused(f"it calls a {type(maker).__name__}")
        if maker.kind == "copyreg._reconstructor" and args and isinstance(args[0], Name):
            return self.make(args[0], ())  # what the oldest protocols put around a class
        known = _KNOWN.get(maker.kind) if isinstance(maker, Name) else None
        if known is None:
            return Foreign(maker.kind, (*args, kwargs) if kwargs else args)
        if kwargs:
            raise Refused(f"it calls {maker.kind} with names")
        return known(self, *args)

    def persistent_load(self, pid: object) -> Storage:
        """A storage, which the pickle only refers to."""
        match pid:
            case ("storage", Name(kind), str(key), str(), int(numel), *view) if numel >= 0:
                dtype = STORAGES.get(kind.rpartition(".")[2])
                if dtype is None or any(view) or self.load_storage is None:
                    raise Refused(f"it holds a {printable(kind)} in a way that is not supported")
                return Storage(self.load_storage(key, numel, dtype.itemsize), dtype)
        raise Refused("it refers to something outside the pickle")

    # --- operations ------------------------------------------------------------------------------

    def load_reduce(self) -> None:
        """Call the last but one entry."""
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        """Call with names."""
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args, kwargs)

    def load_inst(self) -> None:
        """Call a name that stands in the operation."""
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self.make(self.find_class(module, name), tuple(self.pop_mark())))

    def load_obj(self) -> None:
        """Call the first entry since the mark."""
        maker, *args = self.pop_mark()
        self.append(self.make(maker, tuple(args)))

    def load_build(self) -> None:
        """Set an object's state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, np.ndarray):
            _fill_array(target, state)
        elif isinstance(target, argparse.Namespace | types.SimpleNamespace):
            vars(target).update({str(name): value for name, value in dict(state).items()})
        elif type(target) is collections.OrderedDict:
            if "_metadata" in state:  # a state dict's
                target._metadata = state["_metadata"]
        else:
            raise Refused(f"it sets the state of a {type(target).__name__}")

    def load_setitem(self) -> None:
        """Add an item."""
        value, key = self.stack.pop(), self.stack.pop()
        self._add_items([key, value])

    def load_setitems(self) -> None:
        """Add items."""
        self._add_items(self.pop_mark())

    def _add_items(self, flat: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target = target.items
        elif not isinstance(target, dict):
            raise Refused(f"it adds items to a {type(target).__name__}")
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def load_append(self) -> None:
        """Add an entry."""
        entry = self.stack.pop()
        self._add_entries([entry])

    def load_appends(self) -> None:
        """Add entries."""
        self._add_entries(self.pop_mark())

    def _add_entries(self, entries: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target = target.entries
        if isinstance(target, set):
            target.update(entries)
        elif isinstance(target, list | collections.deque):
            target.extend(entries)
        else:
            raise Refused(f"it adds entries to a {type(target).__name__}")

    def load_bytearray8(self) -> None:
        """Bytes, as many as there are at most."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.INST[0]: load_inst,
        pickle.OBJ[0]: load_obj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_appends,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


# --- what known names make; the first argument is the reader -------------------------------------


def _tensor(
    reader: Unpickler,
    storage: Storage,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    requires_grad: bool = False,
    hooks: object = None,
    *more: object,
) -> Tensor:
    """`torch._utils._rebuild_tensor` and its successors: a view of a storage."""
    dtype = storage.dtype
    if more and isinstance(more[0], torch.dtype):
        dtype, *more = more
    if any(more):
        raise Refused("it holds tensors with metadata, which are not supported")
    # One number more than the place of the last: what the storage must have.
    numel, steps = math.prod(size), zip(size, stride, strict=True)
    needed = offset + 1 + sum((n - 1) * step for n, step in steps) if numel else 0
    if (
        min(offset, *size, *stride, 0) < 0
        or needed * dtype.itemsize > storage.data.nbytes()
        or numel > reader.size  # an expanded one
    ):
        raise Refused(f"it holds a tensor of {tuple(size)} that is larger than its data")
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, tuple(size), tuple(stride))


def _parameter(reader: Unpickler, data: Tensor, *rest: object) -> Tensor:
    return data


def _subclass(reader: Unpickler, maker: object, kind: object, args: tuple, state: object) -> object:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are left out."""
    return reader.make(maker, args)


def _moved(reader: Unpickler, data: Tensor, dtype: torch.dtype, *rest: object) -> Tensor:
    """`torch._utils._rebuild_device_tensor_from_cpu_tensor`."""
    return data.to(dtype)


def _dtype(stated: Foreign) -> np.dtype:
    """Numpy's type from its placeholder."""
    name, order, rest = stated.args[0], "=", ()
    if isinstance(stated.state, tuple):
        _, order, *rest = stated.state
    known = stated.kind == "numpy.dtype" and re.fullmatch(r"[biufcSUO]\d{0,6}", str(name))
    if not known or any(rest[:3]):  # parts of a structured type
        raise Refused("it holds numbers of a type of numpy that is not supported")
    return np.dtype(name).newbyteorder(order)


def _array(reader: Unpickler, *args: object) -> np.ndarray:
    """`numpy.core.multiarray._reconstruct`: an array to be filled."""
    return np.empty(0)


def _fill_array(target: np.ndarray, state: tuple) -> None:
    _, shape, stated, fortran, data = state
    dtype = _dtype(stated)
    data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
    size = len(data) if dtype.hasobject else len(data) / dtype.itemsize
    if (
        min(shape, default=0) < 0
        or math.prod(shape) != size
        or dtype.hasobject != (type(data) is list)
    ):
        raise Refused("it holds an array that is not what it says")
    target.__setstate__((1, shape, dtype, fortran, data))


def _buffered(reader: Unpickler, data: bytes, stated: Foreign, shape: tuple, order: str) -> object:
    """`numpy.core.numeric._frombuffer`: an array of protocol 5."""
    return np.frombuffer(data, _dtype(stated)).reshape(shape, order=order)


def _number(reader: Unpickler, stated: Foreign, data: bytes | str) -> object:
    """`numpy.core.multiarray.scalar`, as Python's own number."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, _dtype(stated), count=1)[0].item()


def _encoded(reader: Unpickler, text: str = "", encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, by which the older protocols write bytes."""
    if encoding.replace("-", "") != "latin1":
        raise Refused(f"it encodes by {printable(encoding)}")
    return text.encode("latin1")


def _bytearray(reader: Unpickler, data: bytes | str = b"", *encoding: str) -> bytearray:
    return bytearray(_encoded(reader, data, *encoding) if isinstance(data, str) else bytes([*data]))


def _of_entries(kind: Callable[[Iterable], object]) -> Callable[..., object]:
    def make(reader: Unpickler, entries: list | tuple | dict = (), *rest: int | None) -> object:
        if not isinstance(entries, list | tuple | dict):
            raise Refused(f"it makes a {kind.__name__} of a {type(entries).__name__}")
        return kind(entries, *rest)

    return make


def _defaultdict(reader: Unpickler, factory: Name | None = None) -> dict:
    known = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str}
    name = factory.kind.removeprefix("builtins.") if factory else None
    return collections.defaultdict(known.get(name))


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(reader: Unpickler, *parts: str) -> pathlib.PurePath:
        return kind(*parts)

    return make


def _plain(kind: type) -> Callable[..., object]:
    """A type of numbers, whose values are no larger than what they are made of."""

    def make(reader: Unpickler, *args: object) -> object:
        if any(isinstance(arg, Name | Foreign) for arg in args):
            return Foreign(f"{kind.__module__}.{kind.__name__}", args)
        return kind(*args)

    return make


_windows = sys.platform == "win32"
_KNOWN: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _of_entries(torch.Size),
    "torch.device": _plain(torch.device),
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.numeric._frombuffer": _buffered,
    "numpy._core.numeric._frombuffer": _buffered,
    "_codecs.encode": _encoded,
    "builtins.bytes": _encoded,
    "builtins.bytearray": _bytearray,
    "builtins.set": _of_entries(set),
    "builtins.frozenset": _of_entries(frozenset),
    "builtins.complex": _plain(complex),
    "builtins.range": _plain(range),
    "builtins.slice": _plain(slice),
    "collections.OrderedDict": _of_entries(collections.OrderedDict),
    "collections.Counter": _of_entries(collections.Counter),
    "collections.deque": _of_entries(collections.deque),
    "collections.defaultdict": _defaultdict,
    "argparse.Namespace": lambda reader: argparse.Namespace(),
    "types.SimpleNamespace": lambda reader: types.SimpleNamespace(),
    "datetime.datetime": _plain(datetime.datetime),
    "datetime.date": _plain(datetime.date),
    "datetime.time": _plain(datetime.time),
    "datetime.timedelta": _plain(datetime.timedelta),
    "datetime.timezone": _plain(datetime.timezone),
}
for _module in ("pathlib", "pathlib._local"):
    _KNOWN |= {
        f"{_module}.PurePosixPath": _path(pathlib.PurePosixPath),
        f"{_module}.PureWindowsPath": _path(pathlib.PureWindowsPath),
        f"{_module}.PosixPath": _path(pathlib.PurePosixPath if _windows else pathlib.PosixPath),
        f"{_module}.WindowsPath": _path(
            pathlib.WindowsPath if _windows else pathlib.PureWindowsPath
        ),
    }
