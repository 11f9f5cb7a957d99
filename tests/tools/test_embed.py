"""Features of images and videos from the command line."""

import csv

import numpy as np
import pytest
import torch

from models_convvit import convvit_from_checkpoint
from tests.checks import assert_ok, assert_one_line
from tests.pictures import picture, write_pictures
from tests.runs import code_of
from tests.tools.small import CLASSES, FLAGS
from tools import embed
from util.data.folders import ImageFolder
from util.data.shards import write_shards
from util.data.transforms import center_crop_transform
from util.errors import TrainingError, UsageError


def run(checkpoint, data, output, *more):
    line = ["--checkpoint", checkpoint, "--data_path", data, "--output", output, *FLAGS, *more]
    embed.main(embed.parse_args(list(map(str, line))))
    return dict(np.load(output)) if output.suffix == ".npz" else np.load(output)


def images_of(paths):
    view = center_crop_transform((32, 32))
    return torch.stack([view(open(path, "rb")) for path in paths])


def test_the_pooled_features_are_what_the_trained_head_sees(classifier, classes, tmp_path):
    found = run(classifier, classes / "val", tmp_path / "f.npz", "--batch_size", "5")
    model = convvit_from_checkpoint(classifier).eval()
    with torch.no_grad():
        logits = model(images_of(found["paths"]))
        torch.testing.assert_close(model.head(torch.tensor(found["features"])), logits)
    assert found["classes"].tolist() == CLASSES
    names = found["classes"][found["labels"]].tolist()
    assert names == [path.split("/")[-2] for path in found["paths"]]
    assert len(names) == 17 and list(tmp_path.iterdir()) == [tmp_path / "f.npz"]


@pytest.mark.parametrize("stage", [2, 3])
def test_all_tokens_are_the_maps_that_timm_calls_intermediates(
    autoencoder, classes, tmp_path, stage
):
    found = run(autoencoder, classes / "val", tmp_path / "f.npz", "--tokens", "--stage", stage)
    model = convvit_from_checkpoint(autoencoder).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(images_of(found["paths"]), intermediates_only=True)
    tokens = torch.tensor(found["features"]).movedim(-1, 1)
    torch.testing.assert_close(tokens, maps[stage - 1], rtol=1e-4, atol=1e-5)


def test_an_npy_has_its_paths_and_labels_in_a_csv_beside_it(autoencoder, classes, tmp_path):
    features = run(autoencoder, classes / "val", tmp_path / "f.npy", "--stage", "1")
    assert features.shape == (17, 32)
    head, *rows = csv.reader((tmp_path / "f.csv").read_text().splitlines())
    assert head == ["path", "label"] and len(rows) == 17
    assert all(f"/{label}/" in path for path, label in rows)
    (tmp_path / "f.npy").unlink()
    with pytest.raises(UsageError, match=r"f\.csv, of the paths, exists already"):
        run(autoencoder, classes / "val", tmp_path / "f.npy")


def test_shards_lists_and_single_images_give_the_features_of_the_folder(
    autoencoder, classes, tmp_path
):
    whole = run(autoencoder, classes / "val", tmp_path / "f.npz")
    (tmp_path / "list.txt").write_text("\n".join([*whole["paths"][[3, 1]], ""]))
    listed = run(autoencoder, tmp_path / "list.txt", tmp_path / "l.npz")
    single = run(autoencoder, whole["paths"][3], tmp_path / "s.npz")
    write_shards(ImageFolder(classes / "val"), tmp_path / "shards", 9)
    shards = run(autoencoder, tmp_path / "shards", tmp_path / "t.npz")
    np.testing.assert_allclose(listed["features"], whole["features"][[3, 1]], atol=1e-5)
    np.testing.assert_allclose(single["features"], whole["features"][[3]], atol=1e-5)
    assert "labels" not in listed
    order = np.argsort([path.split("/")[-1].split("_")[0] for path in shards["paths"]])
    assert sorted(shards["labels"]) == sorted(whole["labels"])
    expected = whole["features"][np.argsort([path[-7:] for path in whole["paths"]])]
    np.testing.assert_allclose(shards["features"][order], expected, atol=1e-5)


def test_a_file_that_cannot_be_decoded_is_named_and_left_out(autoencoder, tmp_path, capsys):
    data = write_pictures(tmp_path / "flat", 6)
    (data / "002.png").write_bytes(b"no picture")
    found = run(autoencoder, data, tmp_path / "f.npz", "--max_bad_images", "0.2")
    assert [path[-7:-4] for path in found["paths"]] == ["000", "001", "003", "004", "005"]
    assert "002.png cannot be decoded: skipped" in capsys.readouterr().err
    alone = run(autoencoder, data / "003.png", tmp_path / "s.npz")
    np.testing.assert_allclose(found["features"][2:3], alone["features"], atol=1e-5)
    with pytest.raises(TrainingError, match="1 of 6 images cannot be decoded"):
        run(autoencoder, data, tmp_path / "g.npz")


def test_views_of_a_video_are_averaged(video_classifier, videos, tmp_path):
    one = run(video_classifier, videos / "val", tmp_path / "1.npz", "--tokens")
    assert one["features"].shape == (3, 2, 4, 4, 128)
    assert one["labels"].tolist() == [0, 0, 1]
    single = run(video_classifier, one["paths"][2], tmp_path / "s.npz", "--tokens")
    np.testing.assert_allclose(single["features"], one["features"][2:], atol=1e-5)
    several = run(video_classifier, videos / "val", tmp_path / "6.npz", "--test_clips", "2")
    assert several["features"].shape == (3, 128)
    with pytest.raises(UsageError, match="--tokens are of one view"):
        run(video_classifier, videos / "val", tmp_path / "t.npz", "--tokens", "--test_crops", "3")


# --- parts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """150 pictures: parts of 64, 64 and 22."""
    root = tmp_path_factory.mktemp("many")
    for i in range(150):
        picture(i, 16, 16).save(root / f"{i:03d}.png")
    return root


def kill_after(files: int) -> None:
    import os
    import signal

    from tools import parts

    write, done = parts.write_atomically, []

    def write_and_die(path, content):
        write(path, content)
        done.append(path)
        if len(done) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.write_atomically = write_and_die


def test_a_killed_job_goes_on_where_it_was(autoencoder, many, launcher, tmp_path):
    output = tmp_path / "f.npz"
    line = ["--checkpoint", autoencoder, "--data_path", many, "--output", output, *FLAGS]
    killed = code_of(kill_after, files=3)  # the job's description and two parts
    assert launcher.run(*line, program="tools.embed", before=killed).code == -9
    assert not output.exists()
    other = launcher.run(*line, "--stage", 2, program="tools.embed")
    assert_one_line(other, 2, "parts of another job, which was killed (another stage)")
    result = launcher.run(*line, program="tools.embed")
    assert_ok(result)
    assert "going on: 2 of 3 parts" in result.out
    whole = run(autoencoder, many, tmp_path / "whole.npz")
    found = dict(np.load(output))
    assert found["paths"].tolist() == whole["paths"].tolist()
    np.testing.assert_allclose(found["features"], whole["features"], atol=1e-5)
    with pytest.raises(UsageError, match="exists already"):
        run(autoencoder, many, output)


def test_two_processes_write_the_features_of_one(autoencoder, many, launcher, tmp_path):
    line = ["--checkpoint", autoencoder, "--data_path", many, "--output", tmp_path / "2.npz"]
    assert_ok(*launcher.run_ranks(*line, *FLAGS, program="tools.embed"))
    whole, found = run(autoencoder, many, tmp_path / "1.npz"), np.load(tmp_path / "2.npz")
    assert found["paths"].tolist() == whole["paths"].tolist()
    np.testing.assert_allclose(found["features"], whole["features"], atol=1e-5)
