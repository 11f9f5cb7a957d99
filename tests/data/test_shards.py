import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tests.pictures import decode, noisy, picture
from tools.shards import index, main, parse_args
from util.data.datasets import ImageFiles, LabeledImages
from util.data.folders import ImageFolder
from util.data.loader import Loader
from util.data.samplers import StepSampler, shuffle_groups
from util.data.shard_index import write_index
from util.data.shards import Shards, is_shards, write_shards
from util.errors import TrainingError, UsageError

COUNT = 23


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures of three formats in two class folders; no two are alike."""
    for i in range(COUNT):
        path = (
            tmp_path / "images" / ("ant", "bee")[i % 2] / f"{i:02d}.{('png', 'bmp', 'jpg')[i % 3]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "images"


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    """The same in shards of five."""
    write_shards(ImageFolder(folder), tmp_path / "shards", 5)
    return tmp_path / "shards"


def pattern(shards: Path, last: int = 4) -> Path:
    return shards / f"{{000000..{last:06d}}}.tar"


def contents(files) -> list[bytes]:
    return [files.open(i).read() for i in range(len(files))]


# --- writing and reading -------------------------------------------------------------------------


def test_shards_hold_every_file_unchanged_and_once(folder, shards):
    assert sorted(path.name for path in shards.iterdir()) == [
        *(f"{i:06d}.tar" for i in range(5)),
        "index.npz",
    ]
    assert Counter(contents(Shards(shards))) == Counter(contents(ImageFolder(folder)))
    assert Shards(shards).group_sizes == [5, 5, 5, 5, 3]


def test_shards_are_written_in_random_order(folder, shards):
    assert contents(Shards(shards)) != contents(ImageFolder(folder))


def test_an_image_keeps_its_label(folder, shards):
    files, labeled = LabeledImages(folder, decode), LabeledImages(shards, decode)
    assert labeled.classes == files.classes == ["ant", "bee"]
    known = {files.files.open(i).read(): files.labels[i] for i in range(COUNT)}
    assert all(known[labeled.files.open(i).read()] == labeled.labels[i] for i in range(COUNT))
    assert labeled.labels.dtype == np.int64


def test_webdataset_itself_reads_what_is_written(folder, shards):
    samples = list(
        webdataset.WebDataset(str(pattern(shards)), shardshuffle=False, empty_check=False)
    )
    assert len(samples) == COUNT
    for sample, expected in zip(samples, LabeledImages(shards, decode).labels, strict=True):
        assert int(sample["cls"]) == expected
        assert sum(name in sample for name in ("png", "bmp", "jpg")) == 1


def test_a_pattern_takes_its_shards_alone_in_its_order(shards):
    whole, part = Shards(shards), Shards(shards / "00000{3,1}.tar")
    assert part.group_sizes == [5, 5]
    assert contents(part) == contents(whole)[15:20] + contents(whole)[5:10]
    assert part.path(0).startswith(f"{shards}/000003.tar/")


def test_images_without_class_folders_have_no_labels(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    assert write_shards(ImageFolder(tmp_path), tmp_path / "shards", 2) == (2, None)
    with pytest.raises(UsageError, match=r"no labels: no \.cls"):
        LabeledImages(tmp_path / "shards", decode)


def test_names_that_differ_in_the_ending_or_have_dots_stay_apart(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "a.jpg", "a.b.png"):
        picture(len(name)).save(tmp_path / "images" / name)
    write_shards(ImageFolder(tmp_path / "images"), tmp_path / "shards", 5)
    assert len(Shards(tmp_path / "shards")) == 3


def test_both_parts_of_imagenet_s_layout_are_written(folder, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for name in ("train", "val"):
        (tmp_path / "set" / name).symlink_to(folder)
    main(parse_args(["write", str(tmp_path / "set"), str(tmp_path / "out"), "--shard_size", "10"]))
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("train", "val"), lines, strict=True):
        out = tmp_path / "out" / name
        assert line == f"23 images, 2 classes: 3 shards and their index in {out}"
        assert len(Shards(out)) == COUNT


def test_shards_are_not_written_over_others(folder, shards):
    with pytest.raises(UsageError, match="holds shards already"):
        write_shards(ImageFolder(folder), shards, 5)


# --- shards of others ----------------------------------------------------------------------------


def write_foreign(folder: Path, labels: list[int | None]) -> Path:
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "s-%03d.tar"), maxcount=2, verbose=0) as writer:
        for i, label in enumerate(labels):
            sample = {"__key__": f"dir/{i}", "png": picture(i), "json": {"number": i}}
            writer.write(sample if label is None else sample | {"cls": label})
    return folder


def test_foreign_shards_can_be_indexed(tmp_path, capsys):
    folder = write_foreign(tmp_path / "foreign", [2, 0, 1])
    (tmp_path / "names").write_text("ant\nbee\ncat\n")
    main(parse_args(["index", str(folder / "*.tar"), "--classes", str(tmp_path / "names")]))
    names = f"3 classes from {tmp_path / 'names'}"
    assert capsys.readouterr().out.splitlines() == [
        f"3 images in 2 shards, {names}: {folder / 'index.npz'}",
        f"left out of {folder}: 3 of .json",
    ]
    data = LabeledImages(folder / "s-{000..001}.tar", decode)
    assert (data.classes, data.labels.tolist()) == (["ant", "bee", "cat"], [2, 0, 1])
    assert torch.equal(data[1, 0][0], torch.from_numpy(np.array(picture(1))).movedim(-1, 0))


def test_an_index_that_is_written_again_keeps_the_names_of_the_classes(tmp_path, capsys):
    folder = write_foreign(tmp_path / "foreign", [2, 0, 1])
    (tmp_path / "names").write_text("ant\nbee\ncat\n")
    for options in (["--classes", str(tmp_path / "names")], []):
        main(parse_args(["index", str(folder / "*.tar"), *options]))
        assert LabeledImages(folder, decode).classes == ["ant", "bee", "cat"]
    assert "3 classes from the last index" in capsys.readouterr().out


def test_classes_without_names_are_numbers(tmp_path):
    folder = write_foreign(tmp_path / "foreign", [2, 0])
    index(parse_args(["index", str(folder / "s-000.tar")]))
    assert LabeledImages(folder, decode).classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("labels", "names", "complaint"),
    [
        ([1, None], None, r"1 samples of .* have no \.cls"),
        ([None, None], "ant\n", r"have no \.cls, so there are no classes"),
        ([0, 5], "ant\nbee\n", "label 5 of .* is beyond the 2 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, names, complaint):
    folder = write_foreign(tmp_path / "foreign", labels)
    options = []
    if names:
        (tmp_path / "names").write_text(names)
        options = ["--classes", str(tmp_path / "names")]
    with pytest.raises(UsageError, match=complaint):
        index(parse_args(["index", str(folder / "s-000.tar"), *options]))
    assert not (folder / "index.npz").exists()


def cut_short(shards: Path) -> None:
    os.truncate(shards / "000001.tar", 3000)


def remove_one(shards: Path) -> None:
    (shards / "000002.tar").unlink()


def remove_index(shards: Path) -> None:
    (shards / "index.npz").unlink()


def add_one(shards: Path) -> None:
    shutil.copy(shards / "000000.tar", shards / "000005.tar")


def spoil_index(shards: Path) -> None:
    (shards / "index.npz").write_bytes(b"no index")


@pytest.mark.parametrize(
    ("change", "last", "complaint"),
    [
        (cut_short, 4, r"000001\.tar is not the one of .*index\.npz: it has 3000 bytes"),
        (remove_one, 4, r"000002\.tar cannot be read: No such file"),
        (remove_index, 4, r"no .*index\.npz.*python -m tools.shards index"),
        (spoil_index, 4, r"index\.npz cannot be read .*write it again"),
        (lambda shards: None, 7, r"000005\.tar cannot be read: No such file"),
        (add_one, 5, r"000005\.tar is not in .*index\.npz"),
    ],
    ids=["cut short", "missing", "no index", "damaged index", "beyond all", "not in the index"],
)
def test_shards_that_are_not_those_of_the_index_are_refused(shards, change, last, complaint):
    change(shards)
    with pytest.raises(UsageError, match=complaint):
        Shards(pattern(shards, last))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{a,b}/0.tar", "must lie in one folder"),
        ("a/{0,0}.tar", "more than once"),
        ("a/{0..999999999}.tar", "more than 1000000 shards"),
        ("a/{0..3.tar", "no pattern of shards: Unbalanced braces"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        Shards(text)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UsageError, match=r"a\.tar is no whole shard"):
        index(parse_args(["index", str(tmp_path / "a.tar")]))


def test_a_data_path_says_what_it_is(folder, shards):
    assert is_shards(shards) and is_shards(pattern(shards)) and not is_shards(folder)


# --- an index that no longer fits ----------------------------------------------------------------


def reverse(tar: Path, change_labels_only: bool = False) -> None:
    """Write a shard again: the files of the same sizes the other way round, or other labels."""
    with tarfile.open(tar) as old:
        files = [(member, old.extractfile(member).read()) for member in old]
    if change_labels_only:
        files = [(m, b"1" if data == b"0" else data) for m, data in files]
    else:
        pairs = [files[i : i + 2] for i in range(0, len(files), 2)]
        files = [file for pair in reversed(pairs) for file in pair]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in files:
            new.addfile(member, io.BytesIO(data))


@pytest.fixture
def equal_sizes(tmp_path) -> Path:
    """A shard of bitmaps of the same size with labels, and its index."""
    (tmp_path / "s").mkdir()
    with webdataset.TarWriter(str(tmp_path / "s" / "0.tar"), mtime=0) as tar:
        for i in range(6):
            file = io.BytesIO()
            picture(i).save(file, "BMP")
            tar.write({"__key__": f"{i}", "bmp": file.getvalue(), "cls": i % 2})
    write_index(tmp_path / "s", ["0.tar"])
    return tmp_path / "s"


@pytest.mark.parametrize("labels_only", [False, True])
def test_a_shard_written_again_with_the_same_size_is_noticed(equal_sizes, labels_only):
    size = (equal_sizes / "0.tar").stat().st_size
    reverse(equal_sizes / "0.tar", labels_only)
    assert (equal_sizes / "0.tar").stat().st_size == size
    data = LabeledImages(equal_sizes, decode)
    with pytest.raises(TrainingError, match=r"bmp is not where index\.npz has it.*index it again"):
        for i in range(6):
            data[i, 0]


def test_a_shard_copied_elsewhere_still_fits_its_index(equal_sizes, tmp_path):
    shutil.copytree(equal_sizes, tmp_path / "copy", copy_function=shutil.copyfile)
    data = LabeledImages(tmp_path / "copy", decode)
    assert [data[i, 0][1:] for i in range(6)] == [(i % 2, i, ()) for i in range(6)]


def test_a_shard_that_no_longer_fits_ends_an_epoch_with_one_line(equal_sizes):
    reverse(equal_sizes / "0.tar")
    data = ImageFiles(equal_sizes, decode)
    with pytest.raises(TrainingError) as error:
        list(Loader(data, StepSampler(6, 2), 1).epoch(0))
    assert "is not where index.npz has it" in str(error.value) and "\n" not in str(error.value)


def damaged(index: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    change = {
        "lacks an array": {"offset": None},
        "other lengths": {"size": index["size"][:-1]},
        "floats": {"offset": index["offset"].astype(float)},
        "beyond the shard": {"offset": index["offset"] + 10**9},
        "negative": {"offset": -index["offset"]},
        "huge size": {"size": index["size"] * 0 + 2**62},
        "shards out of order": {"shard": index["shard"][::-1] + np.arange(6)[::-1]},
        "no such shard": {"shard": index["shard"] + 7},
        "no such class": {"label": index["label"] + 10**9},
        "two-dimensional": {"name": index["name"][None]},
        "a shard twice": {"shards": index["shards"].repeat(2), "bytes": index["bytes"].repeat(2)},
        "no shards": {"shards": index["shards"][:0], "bytes": index["bytes"][:0]},
    }[kind]
    return {name: array for name, array in (index | change).items() if array is not None}


@pytest.mark.parametrize(
    "kind",
    [
        *("lacks an array", "other lengths", "floats", "beyond the shard", "negative", "huge size"),
        *("shards out of order", "no such shard", "no such class", "two-dimensional", "no shards"),
        "a shard twice",
    ],
)
def test_an_index_whose_arrays_do_not_fit_is_refused(equal_sizes, kind):
    with np.load(equal_sizes / "index.npz") as file:
        index = damaged(dict(file), kind)
    np.savez(equal_sizes / "index.npz", **index)
    with pytest.raises(UsageError, match=r"index\.npz cannot be read \(.*\): write it again by"):
        Shards(equal_sizes)


def test_an_index_that_is_compressed_is_refused(equal_sizes):
    with np.load(equal_sizes / "index.npz") as file:
        np.savez_compressed(equal_sizes / "index.npz", **dict(file))
    with pytest.raises(UsageError, match="compressed"):
        Shards(equal_sizes)


# --- samples as the webdataset library has them --------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes | Image.Image] | list[tuple]) -> Path:
    """Files in a tar, as `tar` writes them; pictures as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            if isinstance(content, Image.Image):
                file = io.BytesIO()
                content.save(file, "PNG")
                content = file.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


def names_of(folder: Path) -> list[str]:
    files = Shards(folder)
    return [files.path(i).split(".tar/")[1] for i in range(len(files))]


def library_s_keys(path: Path) -> list[str]:
    return [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]


ODD_NAMES = {
    "a.v2.png": picture(0), "a.v2.cls": b"1",  # a dot in the name
    "b.left.png": picture(1), "b.right.png": picture(2), "b.cls": b"0",  # a pair
    "c.json": b"{}", "c.mask.png": picture(3), "c.PNG": picture(4), "c.cls": b"1",
    "dir.with.dots/d.png": picture(5), "dir.with.dots/d.cls": b"0",
    "__MACOSX/._c.png": b"no picture", "__meta__/e.png": picture(0), "README": b"text",
}  # fmt: skip


def test_a_sample_has_one_picture_and_what_is_left_out_is_counted(tmp_path, capsys):
    folder = write_tar(tmp_path / "s" / "0.tar", ODD_NAMES)
    index(parse_args(["index", str(folder / "0.tar")]))
    data = LabeledImages(folder, decode)
    assert names_of(folder) == ["a.v2.png", "b.left.png", "c.PNG", "dir.with.dots/d.png"]
    assert data.labels.tolist() == [1, 0, 1, 0]
    left_out = {
        "further images of a sample (.right.png)": 1, "further images of a sample (.mask.png)": 1,
        "of .json": 1, "hidden": 1, "without an ending": 1, "of .png": 1,
    }  # fmt: skip
    assert data.files.left_out == left_out
    assert data.left_out == capsys.readouterr().out.splitlines()[1]
    for count_and_kind in ("1 hidden", "1 of .json"):
        assert count_and_kind in data.left_out


def test_samples_are_those_of_the_library(tmp_path):
    folder = write_tar(
        tmp_path / "s" / "0.tar", {n: c for n, c in ODD_NAMES.items() if "_" not in n}
    )
    write_index(folder, ["0.tar"])
    assert library_s_keys(folder / "0.tar") == ["a", "b", "c", "dir.with.dots/d"]
    assert len(Shards(folder)) == 4


def test_a_key_that_comes_again_later_is_another_sample_as_in_the_library(tmp_path):
    files = [("a.png", picture(0)), ("b.png", picture(1)), ("a.png", picture(2))]
    folder = write_tar(tmp_path / "s" / "0.tar", files)
    write_index(folder, ["0.tar"])
    assert library_s_keys(folder / "0.tar") == ["a", "b", "a"]
    assert names_of(folder) == ["a.png", "b.png", "a.png"]
    data = ImageFiles(folder, decode)
    assert torch.equal(data[2, 0][0], torch.from_numpy(np.array(picture(2))).movedim(-1, 0))


def test_what_is_left_out_of_some_shards_is_counted_for_these(tmp_path):
    for i in range(3):
        extra = {f"{j}.txt": b"x" for j in range(i)}
        write_tar(tmp_path / "s" / f"{i}.tar", {"a.png": picture(i), **extra})
    write_index(tmp_path / "s", ["0.tar", "1.tar", "2.tar"])
    assert Shards(tmp_path / "s").left_out == {"of .txt": 3}
    assert Shards(tmp_path / "s" / "{0..1}.tar").left_out == {"of .txt": 1}


@pytest.mark.parametrize(
    ("order", "count"), [("a.png b.png a.cls b.cls", 2), ("a.png b.png b.cls a.cls", 1)]
)
def test_labels_apart_from_their_pictures_are_told_with_the_remedy(tmp_path, order, count):
    files = {"a.png": picture(0), "b.png": picture(1), "a.cls": b"0", "b.cls": b"1"}
    folder = write_tar(tmp_path / "s" / "0.tar", {name: files[name] for name in order.split()})
    complaint = rf"{count} samples of .* no \.cls beside them.*tar --sort=name"
    with pytest.raises(UsageError, match=complaint):
        write_index(folder, ["0.tar"])


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (b"cat", r"a\.cls is no label: it holds 'cat', not a number from 0"),
        (b"-1", "not a number from 0"),
        (b"1" * 25, "not a number from 0"),
        (b"1" * 1000, "it has 1000 bytes"),
        (b"1000000000", "label 1000000000 of .* is beyond 1000000 classes"),
    ],
)
def test_labels_that_are_none_are_refused_and_allocate_nothing(tmp_path, label, complaint):
    folder = write_tar(tmp_path / "s" / "0.tar", {"a.png": picture(0), "a.cls": label})
    with pytest.raises(UsageError, match=complaint):
        write_index(folder, ["0.tar"])


def join(first: Path, second: Path) -> None:
    first.write_bytes(first.read_bytes() + second.read_bytes())


def damage_a_header(first: Path, second: Path) -> None:
    data = bytearray(first.read_bytes())
    with tarfile.open(first) as tar:
        data[tar.getmembers()[1].offset + 3] ^= 0xFF
    first.write_bytes(data)


@pytest.mark.parametrize("change", [join, damage_a_header])
def test_a_tar_of_which_no_reader_sees_the_rest_is_refused(tmp_path, change):
    files = {f"{i}.png": picture(i) for i in range(3)}
    for name in ("0", "1"):
        folder = write_tar(tmp_path / "s" / f"{name}.tar", files)
    change(folder / "0.tar", folder / "1.tar")
    with pytest.raises(UsageError, match=r"0\.tar is no whole shard: .* behind byte"):
        write_index(folder, ["0.tar"])


def test_a_fifo_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UsageError, match="a FIFO"):
        write_index(tmp_path, ["a.tar"])


def test_long_and_strange_names_are_written_and_read(tmp_path):
    folder = tmp_path / "images" / ("long" * 40) / ("name" * 50)
    folder.mkdir(parents=True)
    names = [b"x" * 150 + b".png", b"caf\xe9.png", "näme.png".encode(), b"__a__.png"]
    for i, name in enumerate(names):
        picture(i).save(folder / "p.png")
        os.rename(folder / "p.png", os.fsencode(folder) + b"/" + name)
    source = ImageFolder(tmp_path / "images")
    write_shards(source, tmp_path / "shards", 2)
    assert Counter(contents(Shards(tmp_path / "shards"))) == Counter(contents(source))
    pattern = str(tmp_path / "shards" / "{000000..000001}.tar")
    assert len(list(webdataset.WebDataset(pattern, shardshuffle=False))) == 4


# --- a call that was killed ----------------------------------------------------------------------


def test_shards_of_a_killed_call_are_written_again(folder, tmp_path, monkeypatch):
    write_shards(ImageFolder(folder), tmp_path / "expected", 5)
    kill = f"""
import os, signal
from pathlib import Path
from util.data.folders import ImageFolder
from util.data import shards

real, opened = ImageFolder.open, []
def open_until_killed(self, index):
    opened.append(index)
    if len(opened) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, index)
ImageFolder.open = open_until_killed
shards.write_shards(ImageFolder({str(folder)!r}), Path({str(tmp_path / "out")!r}), 5)
"""
    assert subprocess.run([sys.executable, "-c", kill]).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "000001.tar").exists()
    with pytest.raises(UsageError, match="was not written to its end"):
        index(parse_args(["index", str(tmp_path / "out" / "*.tar")]))
    write_shards(ImageFolder(folder), tmp_path / "out", 5)
    for name in ("out", "expected"):
        assert len(list((tmp_path / name).iterdir())) == 6
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_picture_that_cannot_be_read_is_named_and_the_call_can_be_repeated(folder, tmp_path):
    (folder / "ant" / "gone.png").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"gone\.png: No such file or directory"):
        write_shards(ImageFolder(folder), tmp_path / "out", 5)
    (folder / "ant" / "gone.png").unlink()
    write_shards(ImageFolder(folder), tmp_path / "out", 5)
    assert len(Shards(tmp_path / "out")) == COUNT


def test_files_that_are_left_out_of_shards_are_told(folder, tmp_path, capsys):
    (folder / "notes.txt").touch()
    main(parse_args(["write", str(folder), str(tmp_path / "out")]))
    assert capsys.readouterr().out.splitlines()[1] == f"left out of {folder}: 1 of .txt"


@pytest.mark.parametrize("text", ["", "\n\n", "ant\n\nbee\n"])
def test_names_of_classes_must_be_names(tmp_path, text):
    folder = write_foreign(tmp_path / "foreign", [0, 1])
    (tmp_path / "names").write_text(text)
    with pytest.raises(UsageError, match="must have the name of a class in each line"):
        index(parse_args(["index", str(folder / "*.tar"), "--classes", str(tmp_path / "names")]))


# --- an epoch ------------------------------------------------------------------------------------


def test_a_bad_image_in_a_shard_is_named_and_replaced(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no picture")
    write_shards(ImageFolder(folder), tmp_path / "shards", 5)
    data = ImageFiles(tmp_path / "shards", decode)
    bad = next(i for i in range(5) if "4_4.png" in data.path(i))
    image, reported = data[bad, 0]
    assert reported[0][0] == bad and image.shape == (3, 24, 40)
    assert data.path(bad) == f"{tmp_path}/shards/000000.tar/4_4.png"


def test_a_shard_that_ends_too_early_gives_up_its_images(shards):
    data = ImageFiles(shards, decode)
    for i in range(5):
        os.truncate(shards / f"{i:06d}.tar", 100)
    with pytest.raises(TrainingError, match="the shard ends before it"):
        data[0, 0]


def epoch_of(path: Path, workers: int = 0, rank: int = 0, world_size: int = 1, start: int = 0):
    data = ImageFiles(path, noisy)
    sampler = StepSampler(
        *(len(data), 2, 1, rank, world_size, 3), group_sizes=data.files.group_sizes
    )
    return [images for images, _ in Loader(data, sampler, workers).epoch(1, start)]


def test_an_epoch_has_every_image_once_whatever_the_workers_and_processes(shards):
    one = torch.cat(epoch_of(shards))
    assert len({image.numpy().tobytes() for image in one}) == len(one) == 22
    assert torch.equal(torch.cat(epoch_of(shards, workers=2)), one)
    ranks = [epoch_of(pattern(shards), 2, rank, 2) for rank in range(2)]
    two = torch.cat([batch for step in zip(*ranks, strict=True) for batch in step])
    assert torch.equal(two, one[: len(two)]) and len(two) == 20


def test_an_epoch_goes_on_where_it_was_left(shards):
    whole, rest = epoch_of(shards), epoch_of(shards, workers=2, start=4)
    assert len(rest) == len(whole) - 4
    assert all(map(torch.equal, rest, whole[4:]))


def test_shuffling_keeps_few_shards_in_use_at_a_time():
    sizes = [100] * 50
    order = shuffle_groups(sizes, 400, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(5000))
    shards = (order // 100).split(400)
    assert [len(part.unique()) for part in shards] == [4] * 12 + [2]
    assert all((part.diff() != 0).float().mean() > 0.4 for part in shards)  # mixed within
    other = shuffle_groups(sizes, 400, torch.Generator().manual_seed(1))
    assert not torch.equal(order, other)


def test_shards_of_different_sizes_are_shuffled_whole():
    order = shuffle_groups([3, 1, 7, 2], 5, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(13))


def test_a_shard_is_opened_once_for_many_images(shards, monkeypatch):
    import util.data.shards as module

    opened, real = [], module.open_regular

    def counted(path):
        opened.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(module, "open_regular", counted)
    module._open_shard.cache_clear()
    contents(Shards(shards))
    assert sorted(opened) == [f"{i:06d}.tar" for i in range(5)]


MANY_SHARDS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from tests.pictures import decode
from util.data.datasets import ImageFiles

data = ImageFiles(sys.argv[1], decode)
print(len(data), sum(bad == () for _, bad in (data[i, 0] for i in range(len(data)))))
"""


def test_more_shards_than_files_that_may_be_open_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(80):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    write_shards(ImageFolder(tmp_path / "images"), tmp_path / "shards", 1)
    command = [sys.executable, "-c", MANY_SHARDS, str(tmp_path / "shards")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "80 80\n"


def test_the_index_holds_where_tar_has_the_files(shards):
    files = Shards(shards)
    with tarfile.open(shards / "000000.tar") as tar:
        for i in range(5):
            name = files.path(i).split(".tar/")[1]
            assert tar.extractfile(name).read() == files.open(i).read()
            assert Image.open(files.open(i)).size == (40, 24)


def test_an_array_is_the_picture_of_a_sample_that_has_no_other(tmp_path):
    members = {"a.png": picture(0), "a.npy": b"features", "b.npy": b"array", "c.npz": b"array"}
    folder = write_tar(tmp_path / "s" / "0.tar", members)
    index(parse_args(["index", str(folder / "0.tar")]))
    assert names_of(folder) == ["a.png", "b.npy", "c.npz"]


def test_arrays_in_shards_keep_their_bytes(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(24).reshape(2, 3, 4))
    main(parse_args(["write", str(tmp_path), str(tmp_path.parent / "out"), "--arrays"]))
    with Shards(tmp_path.parent / "out").open(0) as file:
        assert file.read() == (tmp_path / "a.npy").read_bytes()
