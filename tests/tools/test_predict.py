"""Predictions for files without labels from the command line."""

import csv

import pytest

import main_finetune
from tests.pictures import write_pictures
from tests.tools.small import CLASSES, FLAGS, save_classifier
from tools import predict
from util.errors import UsageError
from VideoConvMAE import main_finetune as video_finetune


def run(checkpoint, data, output, *more):
    line = ["--checkpoint", checkpoint, "--data_path", data, "--output", output, *FLAGS, *more]
    predict.main(predict.parse_args(list(map(str, line))))
    return list(csv.DictReader(output.read_text().splitlines()))


def evaluated(main, checkpoint, data, folder):
    """The table that `--eval --predictions` of a main writes."""
    table = folder / "eval.csv"
    line = ["--eval", "--resume", checkpoint, "--data_path", data, "--predictions", table, *FLAGS]
    main.main(main.parse_args(list(map(str, line))))
    return list(csv.DictReader(table.read_text().splitlines()))


def assert_equal(rows, expected):
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert (row["path"], row["prediction"]) == (other["path"], other["prediction"])
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


def test_images_get_the_classes_and_probabilities_of_an_evaluation(classifier, classes, tmp_path):
    rows = run(classifier, classes / "val", tmp_path / "p.csv", "--batch_size", "4")
    assert_equal(rows, evaluated(main_finetune, classifier, classes, tmp_path))
    assert len({row["probability"] for row in rows}) > 1
    for row in rows:
        ranks = ("", "_2", "_3")
        assert sorted(row[f"prediction{n}"] for n in ranks) == CLASSES
        probabilities = [float(row[f"probability{n}"]) for n in ranks]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=5e-6)
    assert len(rows[0]) == 7  # of five wanted there are three


def test_videos_get_the_classes_and_probabilities_of_their_test(video_classifier, videos, tmp_path):
    rows = run(video_classifier, videos / "val", tmp_path / "p.csv")
    assert_equal(rows, evaluated(video_finetune, video_classifier, videos, tmp_path))


def test_a_checkpoint_without_names_of_classes_gives_their_numbers(tmp_path, capsys):
    checkpoint = save_classifier(tmp_path / "c.pth", classes=None)
    data = write_pictures(tmp_path / "flat", 3)
    rows = run(checkpoint, data, tmp_path / "p.csv", "--topk", "1")
    assert list(rows[0]) == ["path", "prediction", "probability"]
    assert {row["prediction"] for row in rows} <= {"0", "1", "2"}
    assert "does not name its classes" in capsys.readouterr().out


def test_a_pretrained_model_without_a_head_is_refused(autoencoder, classes, tmp_path):
    with pytest.raises(UsageError, match="it has no trained head; fine-tune or probe it first"):
        run(autoencoder, classes / "val", tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())


def test_flags_of_videos_are_refused_for_images(classifier, classes, tmp_path):
    with pytest.raises(UsageError, match="--stride is for videos"):
        run(classifier, classes / "val", tmp_path / "p.csv", "--stride", "2")
