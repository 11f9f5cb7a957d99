"""What a reader of pickles takes, and that nothing in a file runs, whatever it says."""

import argparse
import collections
import datetime
import functools
import pathlib
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch

from util.errors import UsageError
from util.weights.checkpoint import load_file
from util.weights.unpickle import Foreign, Name

FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}],
    ids=["protocol_2", "protocol_4", "protocol_5", "legacy"],
)


CALLS: list[str] = []


class Own:
    """A class of another program, which counts what is done with it."""

    def __init__(self, **values):
        vars(self).update(values)

    def __setstate__(self, state):
        CALLS.append("setstate")


class OwnDict(dict):
    """Another program's mapping, as mmengine's ConfigDict."""


class OwnList(list):
    """Another program's sequence."""


def through_a_file(value, path, **form):
    torch.save({"x": value}, path, **form)
    return load_file(path)["x"]


# --- harmless things ------------------------------------------------------------------------------

HARMLESS = {
    "path": pathlib.Path("a/b"),
    "windows_path": pathlib.PureWindowsPath("c:/a"),
    "defaultdict": collections.defaultdict(list, {1: [2]}),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "ordered": collections.OrderedDict(a=1),
    "namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
    "simple_namespace": types.SimpleNamespace(a=1),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "bytes": b"\x00\xff",
    "no_bytes": b"",
    "bytearray": bytearray(b"ab"),
    "complex": 1 + 2j,
    "range": range(3, 9, 2),
    "long": -(2**70),
    "date": datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
    "span": datetime.timedelta(hours=3),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda:1"),
    "size": torch.Size([2, 3]),
}


@FORMS
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_types_are_read_as_they_are(name, form, tmp_path):
    value = through_a_file(HARMLESS[name], tmp_path / "x.pth", **form)
    assert type(value) is type(HARMLESS[name])
    assert value == HARMLESS[name]


@FORMS
@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.int64(-3), np.bool_(True), np.float16(2), np.str_("text")]
)
def test_numpy_numbers_become_pythons(number, form, tmp_path):
    value = through_a_file(number, tmp_path / "x.pth", **form)
    assert (type(value), value) == (type(number.item()), number.item())


@FORMS
@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.ones((2, 3), order="F"), np.array(5, ">i4"), np.zeros(0),
     np.array(["a", "bc"]), np.array([None, "x"], dtype=object)],
    ids=["c", "fortran", "big_endian", "empty", "text", "objects"],
)  # fmt: skip
def test_numpy_arrays_are_read(array, form, tmp_path):
    value = through_a_file(array, tmp_path / "x.pth", **form)
    assert value.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(value, array)


@FORMS
@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6).view(2, 3).t(), torch.tensor(3.0), torch.zeros(0, 3), torch.ones(1).expand(4),
     torch.arange(9.0)[2:7:2], torch.zeros(2, dtype=torch.bfloat16),
     torch.ones(3, dtype=torch.uint16), torch.ones(2, dtype=torch.float8_e4m3fn),
     torch.tensor([1 + 2j]), torch.tensor([True]), torch.nn.Parameter(torch.ones(2))],
    ids=["transposed", "scalar", "empty", "expanded", "part", "bf16", "uint16", "float8", "complex",
         "bool", "parameter"],
)  # fmt: skip
def test_tensors_are_read_as_they_were(tensor, form, tmp_path):
    value = through_a_file(tensor, tmp_path / "x.pth", **form)
    expected = tensor.detach()
    assert (value.dtype, value.shape, value.stride()) == (
        (expected.dtype, expected.shape, expected.stride())
    )
    assert value.tolist() == expected.tolist()


def test_tensors_that_share_memory_still_do(tmp_path):
    whole = torch.zeros(4)
    first, second = through_a_file([whole, whole[1:]], tmp_path / "x.pth")
    second.fill_(7)
    assert first.tolist() == [0, 7, 7, 7]


def test_a_state_dict_keeps_the_versions_of_its_modules(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert through_a_file(state, tmp_path / "x.pth")._metadata == state._metadata


# --- foreign things -------------------------------------------------------------------------------


@FORMS
def test_an_object_of_a_foreign_class_is_a_placeholder_with_what_it_held(form, tmp_path):
    CALLS.clear()
    value = through_a_file(Own(a=np.int64(1)), tmp_path / "x.pth", **form)
    assert isinstance(value, Foreign)
    assert (value.kind, value.state) == (f"{__name__}.Own", {"a": 1})
    assert CALLS == []


@FORMS
def test_foreign_containers_keep_their_entries(form, tmp_path):
    a, b = through_a_file([OwnDict(a=3), OwnList([1, 2])], tmp_path / "x.pth", **form)
    assert (a.items, b.entries) == ({"a": 3}, [1, 2])


def test_a_foreign_class_or_function_is_a_name(tmp_path):
    value = through_a_file([Own, max], tmp_path / "x.pth")
    assert value == [Name(f"{__name__}.Own"), Name("builtins.max")]


def test_a_foreign_module_is_not_imported(tmp_path):
    module = types.ModuleType("a_module_that_is_nowhere")
    module.Thing = type("Thing", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        torch.save({"x": module.Thing()}, tmp_path / "x.pth")
    finally:
        del sys.modules[module.__name__]
    assert load_file(tmp_path / "x.pth")["x"].kind == "a_module_that_is_nowhere.Thing"


def test_a_partial_application_stays_unapplied(tmp_path):
    value = through_a_file(functools.partial(max, 3), tmp_path / "x.pth")
    assert isinstance(value, Foreign)


def test_mmengines_own_objects_do_not_keep_its_checkpoints_from_being_read(tmp_path):
    mmengine = pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    config = mmengine.ConfigDict(a=1, b=dict(c=[2]))
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"meta": config, "log": {"loss": buffer}, "w": torch.ones(2)}, tmp_path / "x.pth")
    content = load_file(tmp_path / "x.pth")
    assert content["w"].tolist() == [1, 1]
    assert content["log"]["loss"].kind.endswith("HistoryBuffer")


# --- hostile things -------------------------------------------------------------------------------


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def call_of(module, attribute, *args):
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


def tensor(numel, size, stride, offset=0, key="0"):
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu")
    args = storage + number(numel) + b"tQ" + number(offset) + numbers(size) + numbers(stride)
    return call_of("torch._utils", "_rebuild_tensor_v2", args, b"\x89N")


MARKER = "the_file_ran_code"
TOUCH = text(f"touch {MARKER}")
OPEN = text(f"open({MARKER!r}, 'w')")
ARRAY_ARGS = name("numpy", "ndarray") + b")" + text("b")
NDARRAY = call_of("numpy.core.multiarray", "_reconstruct", ARRAY_ARGS)


def filled_array(kind, size, data):
    dtype = call_of("numpy", "dtype", text(kind))
    return NDARRAY + b"(K\x01" + numbers([size]) + dtype + b"\x89" + data + b"tb"


# Values that a file of 16 bytes of tensors holds under "x", after a protocol 2 opcode.
HOSTILE = {
    "os.system": call_of("os", "system", TOUCH),
    "by_instance": b"(" + TOUCH + b"iposix\nsystem\n",
    "by_object": b"(" + name("posix", "system") + TOUCH + b"o",
    "by_stack": text("posix") + text("system") + b"\x93" + TOUCH + b"\x85R",
    "by_new": name("posix", "system") + TOUCH + b"\x85\x81",
    "eval": call_of("builtins", "eval", OPEN),
    "exec_of_python_2": call_of("__builtin__", "exec", OPEN),
    "subprocess": call_of("subprocess", "Popen", TOUCH),
    "torch.load": call_of("torch", "load", text("x.pth")),
    "pickle.loads": call_of("_pickle", "loads", text("x")),
    "below_a_tensor": call_of(
        "torch._tensor", "_rebuild_from_type_v2", name("posix", "system"), b"N", TOUCH + b"\x85N"
    ),
    "extension": b"\x82\x01",
    "large_extension": b"\x84" + struct.pack("<i", 70000),
    "module_source": b"(" + text("module") + name("torch", "Tensor") + text("a") * 2 + b"tQ",
    "state_of_a_class": name("argparse", "Namespace") + b"N}" + text("x") + text("y") + b"s\x86b",
    "state_of_a_function": name("torch._utils", "_rebuild_tensor_v2")
    + b"N}" + text("__defaults__") + b")s\x86b",
    "codec": call_of("_codecs", "encode", text("x" * 99), text("zip")),
    "many_bytes": call_of("builtins", "bytes", number(2**40)),
    "many_bytes_in_array": call_of("builtins", "bytearray", number(2**40)),
    "bytearray_opcode": b"\x96" + struct.pack("<Q", 2**40),
    "long_text": b"\x8d" + struct.pack("<Q", 2**40),
    "set_of_a_range": call_of("builtins", "set", call_of("builtins", "range", number(2**40))),
    "array_beyond_its_data": filled_array("f8", 10**9, text("ab")),
    "objects_beyond_their_list": filled_array("O8", 10**6, b"]"),
    "array_of_odd_type": filled_array("V8,i4", 1, text("ab")),
    "number_beyond_its_data": call_of(
        "numpy.core.multiarray", "scalar", call_of("numpy", "dtype", text("f8")), text("ab")
    ),
    "tensor_beyond_its_storage": tensor(4, [10**10], [1]),
    "storage_beyond_its_data": tensor(10**10, [4], [1]),
    "expanded_without_end": tensor(4, [10**12], [0]),
    "offset_before_its_storage": tensor(4, [2], [1], -1),
    "backwards": tensor(4, [2], [-1], 1),
    "storage_that_is_not_there": tensor(4, [4], [1], key="9"),
    "storage_outside": tensor(4, [4], [1], key="../data.pkl"),
}  # fmt: skip


def as_zip(value, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/data.pkl", b"\x80\x02}" + text("x") + value + b"s.")
        archive.writestr("r/data/0", bytes(16))


def as_legacy(value, path):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": sys.byteorder == "little"}]
    begin = b"".join(pickle.dumps(part, 2) for part in head)
    end = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    path.write_bytes(begin + b"\x80\x02}" + text("x") + value + b"s." + end)


@pytest.mark.parametrize("write", [as_zip, as_legacy])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_line_runs_nothing_and_allocates_nothing(
    kind, write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tensor(4, [4], [1]), tmp_path / "x.pth")
    load_file(tmp_path / "x.pth")  # imports what reading a sound file does
    write(HOSTILE[kind], tmp_path / "x.pth")
    tracemalloc.start()
    happened = events_while(lambda: load_file(tmp_path / "x.pth"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(happened.pop(), UsageError) and peak < 2**24
    assert not set(happened) & {"exec", "os.system", "subprocess.Popen", "os.fork", "os.exec"}
    assert not (tmp_path / MARKER).exists()


RECORDED: list = []
sys.addaudithook(lambda event, args: RECORDED.append(event) if RECORDED else None)


def events_while(action):
    """What Python's audit hooks see of an action, and the bad use that it ends in."""
    RECORDED[:] = ["begin"]
    try:
        action()
        outcome = None
    except UsageError as error:
        outcome = error
        assert str(error).isprintable()
    events = [*RECORDED, outcome]
    RECORDED.clear()
    return events


@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_the_same_container_with_a_sound_tensor_is_read(write, tmp_path):
    write(tensor(4, [2, 2], [2, 1]), tmp_path / "x.pth")
    assert torch.equal(load_file(tmp_path / "x.pth")["x"], torch.zeros(2, 2))


def test_the_recorder_sees_code_that_runs():
    assert "exec" in events_while(lambda: exec("pass"))


def test_a_huge_memo_number_allocates_nothing(tmp_path):
    as_zip(b"N" + b"r" + struct.pack("<I", 2**32 - 1), tmp_path / "x.pth")
    assert load_file(tmp_path / "x.pth") == {"x": None}


def test_the_state_of_an_ordered_dict_cannot_replace_its_methods(tmp_path):
    value = call_of("collections", "OrderedDict") + b"}" + text("items") + text("y") + b"sb"
    as_zip(value, tmp_path / "x.pth")
    assert list(load_file(tmp_path / "x.pth")["x"].items()) == []


def test_a_refused_name_cannot_break_the_line(tmp_path):
    value = text("posix") + text("a\n\x1b[31mb") + b"\x93"
    as_zip(value, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"posix\.a\?\?\[31mb") as error:
        load_file(tmp_path / "x.pth")
    assert str(error.value).isprintable()
