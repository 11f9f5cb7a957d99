"""Long jobs over files, in parts: one that is killed goes on after the last part it wrote."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine_features import Predict, check_bad_files, each_output
from tools.inference import Frozen
from util.atomic import write_atomically
from util.data.datasets import LabeledImages
from util.data.samplers import EvalSampler
from util.errors import UsageError
from util.run.args import check_folder_of, check_writable
from util.run.array_args import FORMAT_FLAGS
from util.run.distributed import (
    gather_objects,
    is_main_process,
    print_once,
    rank,
    wait_for_all,
    world_size,
)
from util.run.lock import hold
from util.run.normalization import given_stats

Columns = dict[str, np.ndarray]
_JOB = "job.json"
_REASON = 200  # letters of it that are kept


def parts_folder(output: Path) -> Path:
    """The folder of the parts of an output."""
    return output.with_name(output.name + ".parts")


class PartSampler(EvalSampler):
    """Batch sampler of `(index, seed)` that gives every sample of some parts once, in order.

    Args:
        parts: of the data set; no batch goes over the end of one.
        batch_size: images of a batch.
    """

    def __init__(self, parts: Sequence[range], batch_size: int) -> None:
        self.batches = [p[i : i + batch_size] for p in parts for i in range(0, len(p), batch_size)]
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches[self.first_batch :]:
            yield [(index, 0) for index in batch]


class PartedJob:
    """A model's outputs for every file of a data set, kept in parts until all are there.

    The parts lie in the folder `OUTPUT.parts`, each written whole or not at all, by any number of
    processes; the same command goes on with those that are missing.

    Args:
        frozen: the model.
        dataset: the files.
        output: the file that is to be made of the parts.
        settings: what else decides the outputs.
        most: files of a part.

    Raises:
        UsageError: the output is there already, or the parts are those of another job.
    """

    def __init__(
        self,
        frozen: Frozen,
        dataset: LabeledImages,
        output: Path,
        settings: Mapping[str, object],
        most: int = 1024,
    ) -> None:
        self.frozen, self.dataset = frozen, dataset
        self.folder = parts_folder(output)
        if output.exists():
            raise UsageError(f"--output {output} exists already: give another name")
        check_folder_of(output, "--output")
        # Small enough to share among processes, and to lose one.
        size = min(max(len(dataset) // 64, 64), most)
        starts = range(0, len(dataset), size)
        self.parts = [range(start, min(start + size, len(dataset))) for start in starts]
        check_writable(self.folder, "--output")
        hold(self.folder, "--output")
        claim = self._claim(settings) if is_main_process() else None
        self.missing, problem = gather_objects(claim)[0]
        if problem:
            raise UsageError(problem)

    def _claim(self, settings: Mapping[str, object]) -> tuple[list[range], str]:
        """The parts to compute, and what is wrong with those that are there; in the main process.

        They must be of the same files, model and settings.
        """
        status = os.stat(self.frozen.weights.path)
        paths = hashlib.sha256()
        for index in range(len(self.dataset)):
            paths.update(os.fsencode(self.dataset.path(index)) + b"\0")
        args = self.frozen.args
        clips = ("sampling", "stride", "test_clips", "test_crops") if self.frozen.is_video else ()
        arrays, stats = FORMAT_FLAGS if args.arrays else (), given_stats(args)
        job = {
            "files": [len(self.dataset), paths.hexdigest()],
            "checkpoint": [str(self.frozen.weights.path), status.st_size, status.st_mtime_ns],
            "input_size": list(args.input_size),
            "precision": str(self.frozen.dtype),
            "stats": stats and [*map(list, stats)],
            **{name: getattr(args, name) for name in (*clips, *arrays)},
            **settings,
        }
        path = self.folder / _JOB
        if not path.exists():
            write_atomically(path, lambda file: file.write(json.dumps(job).encode()))
        known = json.loads(path.read_text())
        differing = [name for name in job if known.get(name) != job[name]]
        if differing:
            return [], (
                f"{self.folder} holds parts of another job, which was killed (another "
                f"{', '.join(differing)}): remove it, or give another --output"
            )
        missing = [part for part in self.parts if not self._path(part).exists()]
        if done := len(self.parts) - len(missing):
            print_once(f"going on: {done} of {len(self.parts)} parts are in {self.folder}")
        return missing, ""

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:012d}.npz"

    def run(
        self, predict: Predict, columns: Callable[[Tensor], Mapping[str, Tensor]], title: str
    ) -> None:
        """Compute the parts that are missing, this process its share, and check the bad files.

        Args:
            predict: from the model and a batch to rows.
            columns: from rows `[n, …]`, float32, to what is kept of them, by name.
            title: of the progress bar.

        Raises:
            TrainingError: too many files cannot be decoded; the parts stay.
        """
        frozen, own = self.frozen, self.missing[rank() :: world_size()]
        sampler = PartSampler(own, frozen.batch_size)
        loader = frozen.loader(self.dataset, sampler)
        outputs = each_output(
            frozen.model, loader, frozen.device, frozen.dtype, predict, title=title
        )
        ends = {part.stop - 1: part for part in own}
        rows, bad = [], {}
        for samples, batch in zip(sampler.batches, outputs, strict=True):
            bad.update(batch.bad)
            rows.append({"index": batch.indices, **columns(batch.rows)})
            if part := ends.get(samples[-1]):
                self._write(part, rows, bad)
                rows, bad = [], {}
        wait_for_all()
        bad = {i: reason for part in self.read("bad") for i, reason in part["bad"].tolist()}
        self.count = sum(len(part["index"]) for part in self.read("index"))
        wait_for_all()  # the main process removes the parts once it has made the output
        max_bad = frozen.args.max_bad_images
        check_bad_files(bad, self.dataset, max_bad, self.count > 0)

    def _write(
        self, part: range, rows: Sequence[Mapping[str, Tensor]], bad: Mapping[int, str]
    ) -> None:
        columns = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}
        columns["bad"] = np.array(
            list(bad.items()), dtype=[("index", np.int64), ("reason", f"U{_REASON}")]
        )
        write_atomically(self._path(part), lambda file: np.savez(file, **columns))

    def read(self, *names: str) -> Iterator[Columns]:
        """Columns of all parts, in the order of the data set; of one part after the other."""
        for part in self.parts:
            with np.load(self._path(part)) as columns:
                yield {name: columns[name] for name in names}

    def remove(self) -> None:
        """Remove the parts, of which the output has been made."""
        shutil.rmtree(self.folder)
