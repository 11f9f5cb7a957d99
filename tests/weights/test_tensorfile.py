import os
import random

import pytest
import safetensors.torch
import torch

from tests.checks import same
from util.errors import UsageError
from util.weights.tensorfile import DIGEST, load_tensors, save_tensors

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 2),
}
TEXTS = {"info": '{"epoch": 3}'}


@pytest.fixture
def path(tmp_path):
    save_tensors(STATE, TEXTS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_what_was_written_is_read(path):
    state, metadata = load_tensors(path)
    assert same(state, STATE)
    assert metadata == {"format": "pt", **TEXTS}


def test_a_name_that_is_no_utf_8_is_written_and_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    save_tensors(STATE, TEXTS, path)
    assert same(load_tensors(path)[0], STATE)


def test_others_read_the_file(path):
    assert same(safetensors.torch.load_file(path), STATE)


def test_a_view_is_written_as_its_own(tmp_path):
    save_tensors({"t": STATE["a"].t()}, {}, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")[0]["t"], STATE["a"].t())


def test_no_flipped_bit_changes_what_is_read(path):
    content, want = path.read_bytes(), load_tensors(path)
    refused = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 1500):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state, metadata = load_tensors(path)
            # The one place where a flip goes unseen is the digest's own name.
            assert same(state, want[0]) and metadata.items() >= want[1].items()
        except UsageError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 1400


def test_damage_in_a_tensor_is_said_to_be_that(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is damaged: its content is not what was written"):
        load_tensors(path)


def test_a_file_of_others_has_no_digest_and_is_read(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors", {"by": "someone"})
    state, metadata = load_tensors(tmp_path / "x.safetensors")
    assert same(state, STATE) and metadata == {"by": "someone"}
    assert DIGEST not in metadata


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}" + bytes(9),
     b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"],
    ids=["empty", "text", "bytes", "surplus", "huge_header"],
)  # fmt: skip
def test_another_file_is_refused_in_a_line(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.safetensors cannot be read") as error:
        load_tensors(tmp_path / "x.safetensors")
    assert str(error.value).isprintable()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_tensors(tmp_path / "x.safetensors")
