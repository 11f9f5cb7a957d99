"""Classes of unlabelled images or videos by a trained classifier.

`python -m tools.predict --checkpoint FILE --data_path DIR --output predictions.csv`
"""

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from tools.inference import add_inference_args, open_frozen
from tools.parts import PartedJob
from util.atomic import write_atomically
from util.errors import UsageError
from util.run.distributed import is_main_process, print_once
from util.run.parser import Parser, positive_int
from util.run.program import run_main
from util.weights.read import KINDS, Weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.predict",
        description="Write the most probable classes of images or videos, labels not needed. A job "
        "that was killed goes on with the same command; torchrun shares it among processes.",
    )
    add_inference_args(parser, views=None)
    group = parser.add_argument_group("predictions")
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="CSV",
        help="path, and class and probability of the first, second, … best class",
    )
    group.add_argument(
        "--topk", type=positive_int, default=5, metavar="N", help="classes of each file"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Predict for every file, then write the table."""
    if args.output.suffix != ".csv":
        raise UsageError(f"--output {args.output} must end in .csv")
    frozen = open_frozen(args)
    names = class_names(frozen.weights)
    k = min(args.topk, len(names))

    def best(logits: Tensor) -> Mapping[str, Tensor]:
        probabilities, classes = logits.softmax(dim=1).topk(k)
        return {"classes": classes, "probabilities": probabilities}

    dataset = frozen.dataset(args.data_path)
    job = PartedJob(frozen, dataset, args.output, {"topk": k})
    job.run(frozen.logits, best, "predict")
    if is_main_process():
        write_atomically(args.output, lambda file: _write(job, names, k, file))
        job.remove()
        print(f"predictions of {job.count} {dataset.what} in {args.output}")


def class_names(weights: Weights) -> Sequence[str]:
    """Names of a classifier's outputs, their numbers where the checkpoint does not say.

    Raises:
        UsageError: weights without a trained head.
    """
    if weights.kind not in ("classifier", "probe"):
        raise UsageError(
            f"--checkpoint {weights.path} is {KINDS[weights.kind]}: it has no trained head; "
            f"fine-tune or probe it first"
        )
    if weights.classes:
        return weights.classes
    print_once(f"note: {weights.path} does not name its classes: they are numbered from 0")
    return [str(number) for number in range(weights.num_classes)]


def _write(job: PartedJob, names: Sequence[str], k: int, file: BinaryIO) -> None:
    # As `--predictions` writes it, and the further classes behind.
    heads = ["prediction", "probability"]
    heads += [f"{head}_{n}" for n in range(2, k + 1) for head in ("prediction", "probability")]
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    table = csv.writer(text)
    table.writerow(["path", *heads])
    for part in job.read("index", "classes", "probabilities"):
        for index, classes, probabilities in zip(*part.values(), strict=True):
            pairs = zip(classes, probabilities, strict=True)
            cells = [cell for c, p in pairs for cell in (names[c], f"{p:.6f}")]
            table.writerow([job.dataset.path(index), *cells])
    text.detach()


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
