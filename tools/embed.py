"""Features of images or videos by any checkpoint.

`python -m tools.embed --checkpoint FILE --data_path DIR --output features.npz`
"""

import argparse
import csv
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tools.inference import add_inference_args, open_frozen
from tools.parts import PartedJob, parts_folder
from util.atomic import write_atomically
from util.errors import UsageError
from util.run.distributed import is_main_process
from util.run.parser import Parser
from util.run.program import run_main

_SPLITS = {"train", "val", "validation", "test"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.embed",
        description="Write the features of images or videos, by any checkpoint. A job that was "
        "killed goes on with the same command; torchrun shares it among processes.",
    )
    add_inference_args(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npz with features, paths and, where there are any, labels and classes; or .npy with "
        "the features, a .csv of paths and labels beside it",
    )
    group.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=3, help="of the encoder, 3 is the last"
    )
    group.add_argument(
        "--tokens",
        action="store_true",
        help="all tokens of the stage, as a grid, in the place of one vector: of stage 3 what the "
        "head sees, of 1 and 2 the mean",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Embed every file, then put the parts together."""
    if args.output.suffix not in (".npz", ".npy"):
        raise UsageError(f"--output {args.output} must end in .npz or .npy")
    table = args.output.with_suffix(".csv")
    going_on = parts_folder(args.output).exists()
    if args.output.suffix == ".npy" and table.exists() and not going_on:
        raise UsageError(f"{table}, of the paths, exists already: give --output another name")
    frozen = open_frozen(args)
    if args.tokens and frozen.is_video and args.test_clips * args.test_crops > 1:
        raise UsageError("--tokens are of one view: leave --test_clips and --test_crops away")
    dataset = frozen.dataset(args.data_path)
    settings = {name: getattr(args, name) for name in ("stage", "tokens")}
    job = PartedJob(frozen, dataset, args.output, settings, most=64 if args.tokens else 1024)
    job.run(frozen.features(args.stage, args.tokens), lambda rows: {"features": rows}, "embed")
    if is_main_process():
        rows = _labels(job)
        if args.output.suffix == ".npz":
            write_atomically(args.output, lambda file: _write_npz(job, rows, file))
        else:
            text = _table(rows).encode(errors="surrogateescape")
            write_atomically(table, lambda file: file.write(text))
            write_atomically(args.output, lambda file: _write_features(job, file))
        shape = _shape(job)
        job.remove()
        print(f"{dataset.what} of {dataset.root}: features {shape} in {args.output}")


def _labels(job: PartedJob) -> dict[str, np.ndarray]:
    """Paths of the rows, and labels and classes where there are any."""
    indices = np.concatenate([part["index"] for part in job.read("index")])
    dataset = job.dataset
    rows = {"paths": np.array([dataset.path(index) for index in indices.tolist()])}
    # Splits are no classes: somebody gave the folder above them.
    if dataset.classes and not set(dataset.classes) <= _SPLITS:
        rows |= {"labels": dataset.labels[indices], "classes": np.array(dataset.classes)}
    return rows


def _shape(job: PartedJob) -> tuple[int, ...]:
    first = next(job.read("features"))["features"]
    return (job.count, *first.shape[1:])


def _write_features(job: PartedJob, file: BinaryIO) -> None:
    """The features as numpy's .npy, a part at a time: they need not fit into memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": _shape(job)}
    np.lib.format.write_array_header_1_0(file, header)
    for part in job.read("features"):
        file.write(part["features"].astype("<f4").tobytes())


def _write_npz(job: PartedJob, rows: dict[str, np.ndarray], file: BinaryIO) -> None:
    """Features and rows as numpy's .npz."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            _write_features(job, member)
        for name, values in rows.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _table(rows: dict[str, np.ndarray]) -> str:
    """Paths, and the classes' names where there are any, as CSV."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    if "labels" in rows:
        table.writerow(["path", "label"])
        table.writerows(zip(rows["paths"], rows["classes"][rows["labels"]], strict=True))
    else:
        table.writerow(["path"])
        table.writerows([path] for path in rows["paths"])
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
