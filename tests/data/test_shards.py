import os
import shutil
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
    [("{a,b}/0.tar", "must lie in one folder"), ("a/{0,0}.tar", "more than once")],
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
    opened.remove("index.npz")
    assert sorted(opened) == [f"{i:06d}.tar" for i in range(5)]


def test_the_index_holds_where_tar_has_the_files(shards):
    files = Shards(shards)
    with tarfile.open(shards / "000000.tar") as tar:
        for i in range(5):
            name = files.path(i).split(".tar/")[1]
            assert tar.extractfile(name).read() == files.open(i).read()
            assert Image.open(files.open(i)).size == (40, 24)
