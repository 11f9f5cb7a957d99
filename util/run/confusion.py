"""Confusion matrix of a classifier: counts, accuracy of each class, a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.atomic import write_atomically

MOST_NAMES = 50  # classes whose names a picture has room for


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `[num_classes, num_classes]`: a row for each true class, a column for each predicted.

    Args:
        labels: `[n]`.
        predictions: `[n]`.
        num_classes: of both.
    """
    pairs = labels * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(matrix: np.ndarray) -> np.ndarray:
    """Share of each class that is predicted as it, in percent; NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return 100 * matrix.diagonal() / matrix.sum(axis=1)


def write_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Write a matrix as CSV, and as a picture beside it (`.png`).

    A row of the table is a true class: its name, number of samples, accuracy in percent, and for
    each predicted class the count.

    Raises:
        TrainingError: a file cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["label", "samples", "accuracy", *classes])
    for name, row, accuracy in zip(classes, matrix.tolist(), class_accuracies(matrix), strict=True):
        table.writerow([name, sum(row), "" if np.isnan(accuracy) else f"{accuracy:.2f}", *row])
    content = text.getvalue().encode(errors="surrogateescape")
    write_atomically(path, lambda file: file.write(content))
    draw_confusion(path.with_suffix(".png"), matrix, classes)


def draw_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Draw a matrix: the share of each true class, a row, that is predicted as each class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.2 * len(classes), 14)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= MOST_NAMES:
        names = [name.encode(errors="replace").decode().replace("$", r"\$") for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)
