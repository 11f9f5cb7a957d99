"""k-NN accuracy from the command line."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.checks import assert_ok
from tests.tools.small import FLAGS, write_classes
from tools import embed, knn
from util.errors import UsageError


def run(checkpoint, data, *more):
    line = ["--checkpoint", checkpoint, "--data_path", data, *FLAGS, *more]
    return knn.main(knn.parse_args(list(map(str, line))))


def features(checkpoint, data, output):
    line = ["--checkpoint", checkpoint, "--data_path", data, "--output", output, *FLAGS]
    embed.main(embed.parse_args(list(map(str, line))))
    return np.load(output)


@pytest.fixture(scope="module")
def expected(autoencoder, classes, tmp_path_factory):
    """scikit-learn's accuracy, by the features that `embed` writes."""
    folder = tmp_path_factory.mktemp("features")
    train, val = (
        features(autoencoder, classes / name, folder / f"{name}.npz") for name in ("train", "val")
    )
    theirs = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
    )
    theirs.fit(train["features"], train["labels"])
    accuracy = 100 * theirs.score(val["features"], val["labels"])
    assert 0 < accuracy < 100
    return accuracy


def test_the_accuracy_is_scikit_learns_by_the_embedded_features(autoencoder, classes, expected):
    found = run(autoencoder, classes, "--k", "5", "--temperature", "0.1", "--batch_size", "7")
    assert found["knn_acc1"] == pytest.approx(expected)
    assert found["knn_acc5"] == 100  # of three classes


def test_two_processes_have_the_accuracy_of_one(autoencoder, classes, expected, launcher):
    line = ["--checkpoint", autoencoder, "--data_path", classes, *FLAGS]
    results = launcher.run_ranks(*line, "--k", 5, "--temperature", 0.1, program="tools.knn")
    assert_ok(*results)
    assert f"of 17 images by 24: Acc@1 {expected:.3f}" in results[0].out


def test_other_classes_to_compare_with_are_refused(autoencoder, tmp_path):
    write_classes(tmp_path / "train", 3)
    write_classes(tmp_path / "val", 2)
    with pytest.raises(UsageError, match="it lacks cat"):
        run(autoencoder, tmp_path)
