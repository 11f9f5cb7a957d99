"""Files and flags damaged at random: what is read is what was written, or is refused in a line.

Nothing else may come out: no other exception, nothing that hangs, no change in silence where a
format has checks. A failure prints the seed and the case.
"""

import contextlib
import io
import json
import random
import struct
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
from models_convvit import convvit_tiny_patch16
from tests.checks import same
from tests.data.test_shards import contents
from tests.mutations import ROUNDS, bounded_memory, mutations, watched
from tests.pictures import picture, write_pictures
from util.data.folders import ImageFolder
from util.data.images import load_image
from util.data.shard_index import write_index
from util.data.shards import Shards, write_shards
from util.errors import TrainingError, UsageError
from util.run.states import check_content
from util.weights.checkpoint import load_file
from util.weights.read import read_weights
from util.weights.tensorfile import load_tensors, save_tensors


def is_one_line(error: Exception) -> bool:
    text = str(error)
    return bool(text) and len(text.splitlines()) == 1 and len(text) < 2000


# --- images --------------------------------------------------------------------------------------

IMAGES = {
    "png": {}, "jpg": {"quality": 90}, "webp": {"quality": 80}, "bmp": {}, "ppm": {},
    "tif": {"compression": "tiff_lzw"}, "deflated.tiff": {"compression": "tiff_adobe_deflate"},
    "jpeg.tiff": {"compression": "jpeg"}, "progressive.jpg": {"progressive": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IMAGES)
def test_damaged_images_are_pictures_or_bad_files(name, tmp_path):
    path, outcomes = tmp_path / f"a.{name}", Counter()
    picture(0, 64, 80).save(path, **IMAGES[name])
    with bounded_memory():
        for case, data in mutations(path.read_bytes(), 100, head=200):
            path.write_bytes(data)
            with watched(case):
                try:
                    outcomes[load_image(path, max_pixels=10**6).mode] += 1
                except OSError as error:
                    assert str(error).startswith(f"{path} cannot be decoded: ")
                    assert is_one_line(error)
                    outcomes["error"] += 1
    assert outcomes["error"] > 10 and outcomes.keys() <= {"RGB", "error"}


# --- shards and their index ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzzed")
    for i in range(8):
        path = root / "images" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    write_shards(ImageFolder(root / "images"), root / "shards", 4)
    return root / "shards"


def test_a_damaged_index_is_refused_or_changes_nothing(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    whole, before, refused = (shards / "index.npz").read_bytes(), contents(Shards(shards)), 0
    (tmp_path / "index.npz").unlink()
    with bounded_memory():
        for case, data in mutations(whole, 300):
            (tmp_path / "index.npz").write_bytes(data)
            with watched(case):
                try:
                    assert contents(Shards(tmp_path)) == before
                except (UsageError, TrainingError) as error:
                    assert is_one_line(error)
                    refused += 1
    assert refused > 200


def test_a_damaged_shard_is_indexed_and_read_or_refused(shards, tmp_path):
    whole, outcomes = (shards / "000000.tar").read_bytes(), Counter()
    for case, data in mutations(whole, 300, head=1600):
        (tmp_path / "0.tar").write_bytes(data)
        with watched(case):
            try:
                write_index(tmp_path, ["0.tar"])
                outcomes[len(contents(Shards(tmp_path)))] += 1
            except (UsageError, TrainingError) as error:
                assert is_one_line(error)
                outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and max(n for n in outcomes if n != "refused") <= 8


def test_a_shard_damaged_after_it_was_indexed_gives_no_other_image_or_label(shards, tmp_path):
    whole = (shards / "000000.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole)
    write_index(tmp_path, ["0.tar"], ["ant", "bee"])
    before = contents(Shards(tmp_path))
    refused = 0
    for case, data in mutations(whole, 200, seed=1, head=1600):
        (tmp_path / "0.tar").write_bytes(data)
        with watched(case):
            try:
                found = contents(Shards(tmp_path))
            except (UsageError, TrainingError) as error:
                assert is_one_line(error)
                refused += 1
                continue
            # The bytes of a picture are the decoder's to check, but they are of that picture.
            assert [*map(len, found)] == [*map(len, before)]
            assert all(data not in before[:i] + before[i + 1 :] for i, data in enumerate(found))
    assert refused > 100


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content() -> dict:
    torch.manual_seed(0)
    model = convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 1), num_classes=2)
    few = {n: t for n, t in model.state_dict().items() if t.numel() < 400}
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"params": [0]}]}
    return {
        "model": few, "optimizer": optimizer, "scaler": {}, "epoch": 1, "step": 2,
        "random_state": [{"torch": torch.arange(9)}], "num_images": 4, "program": "fine-tuning",
        "args": {"lr": 1e-3, "model": "x", "input_size": [32, 32]}, "classes": ["ant", "bee"],
    }  # fmt: skip


def use(path: Path) -> None:
    """The steps of programs with a checkpoint before they build a model by it."""
    check_content(load_file(path), str(path))
    weights = read_weights(path)
    assert weights.kind and weights.num_classes >= 0
    weights.architecture.flags()


def test_a_damaged_checkpoint_is_refused_or_changes_nothing(content, tmp_path):
    path, refused = tmp_path / "checkpoint.pth", 0
    torch.save(content, path)
    whole, before = path.read_bytes(), load_file(path)
    with bounded_memory():
        for case, data in mutations(whole, 400):
            path.write_bytes(data)
            with watched(case):
                try:
                    assert same(load_file(path), before)
                except UsageError as error:
                    assert is_one_line(error)
                    refused += 1
    assert refused > 200


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_of_odd_content_is_used_or_refused(content, tmp_path, protocol):
    """The pickle within is damaged, the archive's checksums are right."""
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, pickle_protocol=protocol)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("/data.pkl"))
    with bounded_memory():
        for case, data in mutations(members[pickled], 200, seed=2):
            with zipfile.ZipFile(path, "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, data if name == pickled else member)
            with watched(case):
                try:
                    use(path)
                except UsageError as error:
                    assert is_one_line(error)


def test_a_damaged_checkpoint_of_the_older_format_is_used_or_refused(content, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with bounded_memory():
        for case, data in mutations(path.read_bytes(), 300, seed=3, head=2000):
            path.write_bytes(data)
            with watched(case):
                try:
                    use(path)
                except UsageError as error:
                    assert is_one_line(error)


def test_a_damaged_safetensors_file_is_refused_or_changes_nothing(content, tmp_path):
    path, refused, unseen = tmp_path / "a.safetensors", 0, 0
    save_tensors(content["model"], {"info": json.dumps({"epoch": 1})}, path)
    whole, before = path.read_bytes(), load_tensors(path)
    with bounded_memory():
        for case, data in mutations(whole, 400, head=8 + struct.unpack("<q", whole[:8])[0]):
            path.write_bytes(data)
            with watched(case):
                try:
                    found = load_tensors(path)
                except UsageError as error:
                    assert is_one_line(error)
                    refused += 1
                    continue
                if not same(found, before):
                    # The one place where damage goes unseen is the digest's own name.
                    assert b'"sha256"' not in data
                    unseen += 1
    assert refused > 200 and unseen < 5


# --- flags ---------------------------------------------------------------------------------------

VALUES = [
    *("", "0", "1", "2", "3", "-1", "0.5", "1e-30", "1e308", "nan", "inf", "16", "32", "224"),
    *("999999999999", "x", "ä", "auto", "none", "cpu", "cuda:9", "rand-m9", "rand-mx", "augmix-w0"),
    *("original", "3a", "pixel", "batch", "1 2", "32 48", "0.2 0.8", "0.8 0.2", "4 2 2", "16 16 1"),
    *("٣", "1_0", "0x10", "\udcff", "a" * 300, "/proc/x"),
]  # fmt: skip


class Checked(Exception):
    """All checks of the flags are passed: the data are to be read."""


@pytest.mark.parametrize("main", [main_pretrain, main_finetune, main_linprobe])
def test_odd_flags_are_taken_or_refused_in_a_line(main, tmp_path, monkeypatch, capsys):
    def reached(*_: object, **__: object) -> None:
        raise Checked

    monkeypatch.setattr(main, "build_data", reached)
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "data", 1)
    start = ["--data_path", "data", "--output_dir", "out", "--device", "cpu"]
    if main is not main_pretrain:
        start += ["--model", "convvit_tiny_patch16"]
    with contextlib.suppress(SystemExit):
        main.parse_args(["--help"])
    known = sorted({word for word in capsys.readouterr().out.split() if word.startswith("--")})
    known = [word.strip("],.:;") for word in known if word[2:].replace("_", "").isalpha()]
    outcomes = Counter()
    for case in range(300 * ROUNDS):
        draw = random.Random(f"{main.__name__} {case}")
        line = [*start]
        for flag in draw.sample([f for f in known if f not in ("--help", "--eval")], 2):
            line += [flag, *(draw.choice(VALUES).split() or [""])][: draw.choice((1, 2, 2, 2, 3))]
        said = io.TextIOWrapper(io.BytesIO(), errors="backslashreplace", write_through=True)
        with watched(f"case {case}: {line}"), contextlib.redirect_stderr(said):
            try:
                main.main(main.parse_args(line))
            except Checked:
                outcomes["taken"] += 1
            except UsageError as error:
                assert is_one_line(error)
                outcomes["refused"] += 1
            except SystemExit as error:
                assert (error.code, said.buffer.getvalue().count(b"\n")) == (2, 1)
                outcomes["refused"] += 1
        capsys.readouterr()
    assert outcomes["taken"] > 2 and outcomes["refused"] > 20
