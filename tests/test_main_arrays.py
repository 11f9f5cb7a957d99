"""Pretraining, fine-tuning, probing and evaluation on arrays, started as a user does."""

import csv
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from models_convvit import convvit_tiny_patch16
from tests.checks import assert_ok, assert_one_line, load, log_lines, same, weights
from tests.pictures import photo
from tools import embed, features
from util.data.array_stats import measure
from util.data.array_views import ArrayFormat
from util.data.datasets import open_images

SIZES = ["--input_size", 32, "--patch_size", 2, 2, 1]
RUN = ["--batch_size", 4, "--num_workers", 0, "--warmup_epochs", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of tiles of 7 channels and 16 bits: first or last, a corner without data."""
    root = tmp_path_factory.mktemp("tiles")
    for label, number in (("flower", 1), ("temple", 0)):
        image = np.asarray(photo(128, 192, number)).astype("u2") * 40
        for i in range(6):
            tile = image[i * 12 : i * 12 + 48, i * 20 : i * 20 + 48]
            tile = np.concatenate([tile, tile[..., ::-1] + 7, tile[..., :1] // 2], axis=-1)
            tile[:8, :12] = 0
            folder = root / ("val" if i > 3 else "train") / label
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", tile if i % 2 else np.moveaxis(tile, -1, 0))
    return root


@pytest.fixture(scope="module")
def statistics(data):
    found, _ = measure(open_images(data / "train", arrays=True), ArrayFormat(7, nodata=0))
    return ["--mean", *found["mean"], "--std", *found["std"]]


@pytest.fixture(scope="module")
def pretraining(statistics):
    model = ["--model", "convmae_convvit_tiny_patch16", *SIZES, "--in_chans", 7, "--nodata", 0]
    return [*model, *statistics, "--rot90", "--norm_pix_loss", *RUN, "--epochs", 3]


@pytest.fixture(scope="module")
def pretrained(data, pretraining, launcher, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained")
    flags = ["--data_path", data, *pretraining, "--knn_freq", 3, "--output_dir", output]
    done = launcher.run(*flags)
    assert done.code == 0, done.err
    assert done.out.startswith("files are read as arrays")
    return output


def test_the_checkpoint_has_what_says_how_to_read(pretrained, statistics):
    args = load(pretrained / "checkpoint.pth")["args"]
    assert args["arrays"] is True and args["nodata"] == 0
    assert args["mean"] == pytest.approx(statistics[1:8])
    assert (pretrained / "reconstruction.png").exists()


def test_a_run_that_was_stopped_reaches_the_same_weights_from_shards(
    data, pretraining, launcher, tmp_path
):
    code = launcher.run("write", data, tmp_path / "shards", "--arrays", program="tools.shards").code
    assert code == 0
    flags = ["--data_path", tmp_path / "shards" / "train", *pretraining]
    straight = launcher.run(*flags, "--output_dir", tmp_path / "a")
    assert straight.code == 0, straight.err
    stopped = launcher.start(*flags, "--print_freq", 1, "--output_dir", tmp_path / "b")
    stopped.wait_for("Epoch 1/3")
    stopped.signal(signal.SIGTERM)
    assert stopped.wait().code == 0
    resumed = launcher.run(*flags, "--print_freq", 1, "--output_dir", tmp_path / "b")
    assert resumed.code == 0, resumed.err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("program", ["main_finetune.py", "main_linprobe.py"])
def test_training_and_evaluation_read_as_the_checkpoint_says(
    program, data, pretrained, launcher, tmp_path
):
    flags = ["--data_path", data, *RUN]
    start = ["--finetune", pretrained / "checkpoint.pth", "--epochs", 1]
    trained = launcher.run(*flags, *start, "--output_dir", tmp_path, program=program)
    assert trained.code == 0, trained.err
    assert load(tmp_path / "checkpoint.pth")["args"]["nodata"] == 0
    evaluated = launcher.run(
        *flags, "--eval", "--resume", tmp_path / "checkpoint.pth", program=program
    )
    assert evaluated.code == 0, evaluated.err
    accuracy = next(line for line in trained.out.splitlines() if line.startswith("* Acc@1"))
    accuracy = accuracy.partition(", best")[0]
    assert accuracy in evaluated.out.splitlines()

    files = sorted((data / "val").rglob("*.npy"))
    (tmp_path / "files.txt").write_text("".join(f"{path}\n" for path in files))
    line = ["--checkpoint", tmp_path / "checkpoint.pth", "--data_path", tmp_path / "files.txt"]
    line += ["--output", tmp_path / "p.csv", "--num_workers", 0, "--device", "cpu"]
    assert_ok(launcher.run(*line, program="tools.predict"))
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [*map(str, files)]
    right = [Path(row["path"]).parent.name == row["prediction"] for row in rows]
    assert f"Acc@1 {100 * np.mean(right):.3f} " in accuracy


def test_a_colour_checkpoint_starts_a_model_of_seven_channels(data, statistics, launcher, tmp_path):
    colour = convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 1), num_classes=0)
    torch.save({"model": colour.state_dict(), "args": {"in_chans": 3}}, tmp_path / "x.pth")
    flags = ["--data_path", data, *RUN, "--finetune", tmp_path / "x.pth", "--epochs", 1]
    flags += [*SIZES, "--in_chans", 7, *statistics, "--output_dir", tmp_path / "out"]
    done = launcher.run(*flags, program="main_finetune.py")
    assert done.code == 0, done.err
    assert "patch_embed1.proj.weight (3 to 7 channels)" in done.out


def test_a_damaged_array_is_skipped_and_named(data, pretraining, launcher, tmp_path):
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.load(data / "train/temple/1.npy"))
    content = (tmp_path / "5.npy").read_bytes()
    (tmp_path / "5.npy").write_bytes(content[:-100])
    flags = ["--data_path", tmp_path, *pretraining, "--max_bad_images", 0.5]
    done = launcher.run(*flags, "--output_dir", tmp_path.parent / "out")
    assert done.code == 0, done.err
    assert done.err.count("5.npy cannot be decoded: skipped (it ends before its") == 1


def test_a_saved_model_is_looked_at_with_chosen_channels(data, pretrained, launcher, tmp_path):
    flags = ["--checkpoint", pretrained / "checkpoint.pth", "--images", data / "val"]
    flags += ["--rgb", 6, 5, 4, "--output", tmp_path / "a.png"]
    done = launcher.run(*flags, program="tools.visualize")
    assert done.code == 0, done.err
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_embedding_and_neighbours_read_as_the_checkpoint_says(data, pretrained, launcher, tmp_path):
    flags = ["--checkpoint", pretrained / "checkpoint.pth", "--num_workers", 0, "--device", "cpu"]
    embed = launcher.run(
        *flags, "--data_path", data / "val", "--output", tmp_path / "a.npz", program="tools.embed"
    )
    assert embed.code == 0, embed.err
    knn = launcher.run(*flags, "--data_path", data, program="tools.knn")
    assert knn.code == 0, knn.err
    assert "as arrays" in embed.out and "as arrays" in knn.out
    measured = log_lines(pretrained)[-1]["knn_acc1"]
    assert f"of 4 images by 8: Acc@1 {measured:.3f}" in knn.out


def test_a_list_of_arrays_has_the_features_and_pictures_of_its_folder(data, pretrained, tmp_path):
    files = sorted((data / "val").rglob("*.npy"))
    (tmp_path / "x.txt").write_text("".join(f"{path}\n" for path in files))
    found = {}
    for name, source in (("list", tmp_path / "x.txt"), ("folder", data / "val")):
        for program, ending, more in ((embed, "npz", []), (features, "png", ["--rgb", 6, 5, 4])):
            flags = ["--checkpoint", pretrained / "checkpoint.pth", "--data_path", source, *more]
            flags += ["--num_workers", 0, "--device", "cpu"]
            flags += ["--output", tmp_path / f"{name}.{ending}"]
            program.main(program.parse_args([*map(str, flags)]))
        found[name] = np.load(tmp_path / f"{name}.npz")["features"]
    np.testing.assert_array_equal(found["list"], found["folder"])
    assert (tmp_path / "list.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


WRONG = {
    "pictures to compare with": (["--knn_freq", 1, "--knn_path", "PICTURES"], "3 channels, not"),
    "no data at all": (["--data_path", "EMPTY"], "4 files of .* tried hold no data at all"),
    "another number of bands": (
        ["--finetune", "CHECKPOINT", "--bands", 1, 2, "--mean", 0, 0, "--std", 1, 1],
        "is a model of 7 channels, and this run has 2: only a model of one or three",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_do_not_fit_are_refused_before_a_step(
    kind, data, pretrained, pretraining, launcher, tmp_path
):
    for split in ("train", "val"):
        (tmp_path / "p" / split / "a").mkdir(parents=True)
        photo(40, 40).save(tmp_path / "p" / split / "a" / "0.png")
    (tmp_path / "e").mkdir()
    for i in range(4):
        np.save(tmp_path / "e" / f"{i}.npy", np.full((40, 40, 7), np.nan, "f4"))
    paths = {"PICTURES": tmp_path / "p", "EMPTY": tmp_path / "e"}
    paths["CHECKPOINT"] = pretrained / "checkpoint.pth"
    flags, phrase = WRONG[kind]
    start = RUN if "--finetune" in flags else pretraining
    line = ["--data_path", data, *start, *(paths.get(flag, flag) for flag in flags)]
    done = launcher.run(*line, "--output_dir", tmp_path / "out")
    assert_one_line(done, 2)
    assert re.search(phrase, done.err) and "Epoch" not in done.out
