"""Start-up, memory and time an epoch of the input pipeline against the number of images.

`python -m benchmarks.growth --help`, from the repository root. The images are small JPEGs, hard
links to a few files, in a temporary folder with a thousand to a class; and the same in tar shards.
Each row is a process of its own; times are processor time, which other work changes least.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks.loader import write_photos
from benchmarks.measuring import environment, print_environment
from benchmarks.steps import resident_bytes
from util.data.datasets import LabeledImages
from util.data.folders import ImageFolder
from util.data.loader import Loader
from util.data.samplers import StepSampler
from util.data.shards import write_shards
from util.data.transforms import pretrain_transform
from util.errors import UsageError
from util.run.logger import markdown_table
from util.run.parser import Parser, positive_int

PIXELS = 32
MIB = 2**20
A_CLASS = 1000
LINKS = 20_000  # to one file; ext4 allows 65,000
LAYOUTS = ("folder", "shards")
COLUMNS = {
    "make_s": "s to write",
    "make_mib": "peak MiB then",
    "start_s": "s to start",
    "start_mib": "MiB held",
    "peak_mib": "peak MiB",
    "first_s": "s to first batch",
    "image_ms": "ms an image",
    "worker_mib": "MiB of a worker's own",
}
"""The columns of a row, by their names in the JSON file."""


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    add = parser.add_argument
    counts = [10**4, 10**5, 10**6]
    add("--counts", type=positive_int, nargs="+", default=counts, metavar="N", help="of images")
    add("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, help="how they lie")
    add("--shard_size", type=positive_int, default=10_000, metavar="N", help="images of a shard")
    add("--sample", type=positive_int, default=4096, metavar="N", help="images to read")
    add("--batch_size", type=positive_int, default=64, metavar="N", help="images of a batch")
    add("--folder", type=Path, help="where to make the images (default: the system's for such)")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--row", nargs=2, help=argparse.SUPPRESS)
    return parser


def make_images(root: Path, count: int) -> None:
    """Fill a folder with class folders of images, links to a few files."""
    sources = root.parent / "sources"
    sources.mkdir()
    write_photos(sources, 1 + count // LINKS, (PIXELS, PIXELS))
    files = sorted(sources.iterdir())
    for number in range(count):
        name = f"n{number // A_CLASS:08d}"
        if number % A_CLASS == 0:
            os.makedirs(root / name)
        os.link(files[number % len(files)], root / name / f"{name}_{number}.JPEG")


def own_bytes(process: int) -> int:
    """Memory that a process has for itself, written to since it was forked."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def read_some(loader: Loader, batches: int) -> tuple[float, float]:
    """Seconds until the first batch, and of an image of the others."""
    start = time.process_time()
    stream = loader.epoch(0)
    next(stream)
    first = time.process_time()
    read = sum(len(batch[0]) for batch in islice(stream, batches - 1))
    stream.close()
    return first - start, (time.process_time() - first) / max(1, read)


def write_row(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Write the images of a folder into shards."""
    idle, start = peak_from_here(), time.process_time()
    write_shards(ImageFolder(folder / "folder"), folder / "shards", args.shard_size)
    seconds = time.process_time() - start
    return {"make_s": seconds, "make_mib": (resident_bytes("VmHWM") - idle) / MIB}


def read_row(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Open the images, and read some."""
    row, idle, start = {}, peak_from_here(), time.process_time()
    dataset = LabeledImages(folder, pretrain_transform((PIXELS, PIXELS)))
    row["start_s"] = time.process_time() - start
    row["start_mib"] = (resident_bytes("VmRSS") - idle) / MIB
    row["peak_mib"] = (resident_bytes("VmHWM") - idle) / MIB
    batch = min(args.batch_size, len(dataset))
    sampler = StepSampler(len(dataset), batch, group_sizes=dataset.group_sizes)
    batches = min(max(2, args.sample // batch), len(sampler))
    row["first_s"], image = read_some(Loader(dataset, sampler), batches)
    row["image_ms"] = 1000 * image
    loader = Loader(dataset, sampler, num_workers=1)
    for _ in islice(loader.epoch(0), batches):
        row["worker_mib"] = own_bytes(loader._workers[0].pid) / MIB
    return row


def peak_from_here() -> int:
    """Forget the peak of resident memory so far; return what is resident."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def measure_afresh(row: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """`write_row` or `read_row` in a process of its own."""
    options = ("shard_size", "sample", "batch_size")
    argv = [word for name in options for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, "-m", "benchmarks.growth", "--row", row, str(folder), *argv]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def table(rows: Sequence[tuple[int, str, dict[str, float]]]) -> str:
    """All rows; an epoch is reckoned from the images that were read."""
    content = [["images", "layout", *COLUMNS.values(), "s an epoch"]]
    for count, layout, row in rows:
        values = [f"{row[name]:.3g}" if name in row else "" for name in COLUMNS]
        epoch = row["first_s"] + row["image_ms"] / 1000 * count
        content.append([f"{count:,}", layout, *values, f"{epoch:.3g}"])
    return markdown_table(content)


def report(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print, and write the file if one is wanted."""
    surroundings = environment("growth", argv)
    print_environment(surroundings)
    rows = []
    for count in args.counts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            make_images(Path(folder, "folder"), count)
            for layout in args.layouts:
                row = measure_afresh("write", Path(folder), args) if layout == "shards" else {}
                row |= measure_afresh("read", Path(folder, layout), args)
                rows.append((count, layout, row))
    print(f"\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"environment": surroundings, "rows": rows}, indent=2))


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        if sys.platform != "linux":
            raise UsageError("resident memory is read from Linux's /proc")
        if args.folder and not args.folder.is_dir():
            raise UsageError(f"--folder {args.folder} is no folder")
        if args.row:
            measure = {"write": write_row, "read": read_row}[args.row[0]]
            print(json.dumps(measure(Path(args.row[1]), args)))
        else:
            report(args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
