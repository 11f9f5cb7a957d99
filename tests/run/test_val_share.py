"""--val_share: which files are trained on, and which a run and its evaluation validate on."""

import argparse
from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
from tests.tools.small import FLAGS, save_classifier, write_classes
from tools import shards
from util.errors import UsageError
from util.run.labeled_data import build_data, val_images
from util.run.same_run import plain
from util.run.val_share import follow_share
from util.weights.read import read_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`train/` of 15 pictures of 3 classes."""
    return write_classes(tmp_path_factory.mktemp("train_only") / "train", 15).parent


def parsed(data: Path, *flags: object, main=main_finetune) -> argparse.Namespace:
    args = main.parse_args(list(map(str, ["--data_path", data, "--batch_size", 2, *FLAGS, *flags])))
    args.input_size, args.pin_mem, args.arrays, args.in_chans = (32, 32), False, None, 3
    return args


def names(dataset) -> list[str]:
    return [Path(dataset.path(i)).name for i in range(len(dataset))]


def split(data: Path, *flags: object, main=main_finetune):
    args = parsed(data, "--val_share", 0.4, *flags, main=main)
    return [loader.dataset for loader in build_data(args, transform=torch.load)]


def checkpoint(folder: Path, data: Path, *flags: object) -> Path:
    """A classifier of a run on `data`."""
    path = save_classifier(folder / "c.pth")
    content = torch.load(path, weights_only=True)
    content["args"] |= plain(parsed(data, "--val_share", 0.4, *flags))
    content["args"]["input_size"] = [32, 32]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_the_parts_are_of_all_classes_and_make_up_the_whole(main, data, capsys):
    train, val = split(data, main=main)
    assert sorted(names(train) + names(val)) == [f"{i:03d}.png" for i in range(15)]
    assert sorted(val.labels) == [0, 0, 1, 1, 2, 2] and val.classes == train.classes
    assert f"validation: 6 of 15 images of {data}/train, of 3 of 3 classes" in (
        capsys.readouterr().out
    )


def test_held_out_images_are_seen_as_in_evaluation(data):
    _, val = split(data)
    whole = val_images(parsed(data, "--val_path", data / "train")).dataset
    place = names(whole).index(names(val)[0])
    assert torch.equal(val.load(0), whole.load(place))
    assert val.labels[0] == whole.labels[place]


def test_a_folder_a_class_without_train_is_split_as_it_is(data):
    assert names(split(data / "train")[1]) == names(split(data)[1])


@pytest.mark.parametrize("seed", [0, 7])
def test_evaluation_takes_the_files_that_the_run_held_out(seed, data, tmp_path):
    path = checkpoint(tmp_path, data, "--seed", seed)
    expected = names(split(data, "--seed", seed)[1])
    assert names(val_images(parsed(data), read_weights(path)).dataset) == expected


def test_evaluation_takes_other_data_whole_and_says_so(data, tmp_path, capsys):
    weights = read_weights(checkpoint(tmp_path, data))
    assert len(val_images(parsed(data / "train"), weights).dataset) == 15
    assert f"all of {data}/train; the run held out a share of {data}" in capsys.readouterr().out
    assert len(val_images(parsed(data, "--val_path", data / "train"), weights).dataset) == 15


def test_a_run_goes_on_with_its_share():
    args = main_finetune.parse_args([])
    follow_share(args, {"val_share": 0.25})
    assert args.val_share == 0.25


def test_a_class_too_small_to_give_an_image_is_told(data, tmp_path, capsys):
    write_classes(tmp_path / "train", 15)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train/ant/000.png").rename(tmp_path / "train/dog/000.png")
    _, val = split(tmp_path)
    out, err = capsys.readouterr()
    assert "of 3 of 4 classes (--val_share 0.4, --seed 0); classes too small to give one: 1" in out
    assert "(dog): nothing tells how they do" in err and len(val.classes) == 4


REFUSED = {
    "a val": (lambda d: write_classes(d / "val", 3), [], "there is .*val: leave one"),
    "val_path": (lambda d: None, ["--val_path", "x"], "there is --val_path x: leave one"),
    "all": (lambda d: None, ["--val_share", "1"], "--val_share 1 must lie above 0 and below 1"),
    "shards": (
        lambda d: shards.main(shards.parse_args(["write", str(d), str(d / "s")])),
        ["--data_path", "s"],
        "--val_share takes a folder with a folder a class",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_split_is_refused(kind, tmp_path, monkeypatch):
    change, flags, phrase = REFUSED[kind]
    write_classes(tmp_path / "train", 6)
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=phrase):
        split(tmp_path, *flags)


def test_evaluating_with_another_share_is_refused(data, tmp_path):
    weights = read_weights(checkpoint(tmp_path, data))
    with pytest.raises(UsageError, match=r"held out 0\.4; leave the flag away"):
        val_images(parsed(data, "--val_share", 0.2), weights)
