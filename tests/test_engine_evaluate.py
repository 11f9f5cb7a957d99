"""Tables of an evaluation."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score

import main_finetune
from tests.tools.small import CLASSES, FLAGS, save_classifier, write_classes
from util.errors import UsageError


def evaluate(folder, *more):
    data = write_classes(folder / "data", 17)
    checkpoint = save_classifier(folder / "c.pth")
    line = ["--eval", "--resume", checkpoint, "--data_path", data, *FLAGS, *more]
    main_finetune.main(main_finetune.parse_args(list(map(str, line))))


def test_the_confusion_matrix_and_accuracies_are_scikit_learns(tmp_path):
    table, rows = tmp_path / "confusion.csv", tmp_path / "rows.csv"
    evaluate(tmp_path, "--confusion", table, "--predictions", rows)
    found = list(csv.DictReader(rows.read_text().splitlines()))
    labels, predictions = ([row[name] for row in found] for name in ("label", "prediction"))
    head, *lines = csv.reader(table.read_text().splitlines())
    assert head == ["label", "samples", "accuracy", *CLASSES]
    assert [line[0] for line in lines] == CLASSES
    counts = np.array([line[3:] for line in lines], int)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predictions))
    assert [int(line[1]) for line in lines] == [6, 6, 5]
    accuracies = 100 * recall_score(labels, predictions, average=None)
    assert [float(line[2]) for line in lines] == pytest.approx(accuracies, abs=0.005)
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("flag", ["--predictions", "--confusion"])
def test_a_table_that_could_not_be_written_is_refused_before_anything_is_read(tmp_path, flag):
    with pytest.raises(UsageError, match=f"the folder of {flag} .* does not exist"):
        evaluate(tmp_path, flag, tmp_path / "missing/table.csv")


def test_a_matrix_that_would_lie_under_its_own_picture_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        evaluate(tmp_path, "--confusion", tmp_path / "c.png")
