"""Images a second that one core reads and augments: as MAE does it, and as here.

`python -m benchmarks.loader --help`, from the repository root. One process with one thread reads
the same JPEG files in every form; what counts is the processor time it takes:

- `mae`: Pillow decodes, crops and resizes; each image to float and normalised (MAE's pipeline);
- `ours`: this project's data set, batches of 8-bit pixels as the device gets them;
- `normalized`: the same, and the batch normalised on this core too.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import BinaryIO

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms

from benchmarks.measuring import (
    environment,
    median_and_range,
    print_environment,
    processor_time,
    ratios,
    time_rounds,
)
from util.data.datasets import ImageFiles
from util.data.loader import collate
from util.data.transforms import normalize, pretrain_transform
from util.errors import UsageError
from util.run.logger import markdown_table
from util.run.parser import Parser, positive_int

FORMS = ("mae", "ours", "normalized")
BATCH_SIZE = 64


@dataclass(frozen=True)
class Files:
    """The files that are read.

    Attributes:
        folder: where they are.
        count: how many.
        mean_bytes: size of one.
    """

    folder: Path
    count: int
    mean_bytes: float

    @classmethod
    def of(cls, folder: Path) -> "Files":
        """Look at a folder."""
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return cls(folder, len(sizes), sum(sizes) / max(1, len(sizes)))


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.loader",
        description="Images a second that one core decodes and augments for pretraining, as MAE "
        "does it and as here, on the same files.",
    )
    add = parser.add_argument
    add("--data_path", type=Path, help="folder of JPEGs (default: made of two photographs)")
    add("--num_images", type=positive_int, default=128, metavar="N", help="files to make")
    add(
        "--image_size",
        type=positive_int,
        nargs=2,
        default=(375, 500),
        metavar="PIXELS",
        help="height and width about which the sizes of the made files vary",
    )
    add("--input_size", type=positive_int, default=224, metavar="PIXELS", help="of the model")
    add("--rounds", type=positive_int, default=9, metavar="N", help="times that all is read")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    return parser


def write_photos(folder: Path, count: int, size: Sequence[int]) -> None:
    """Write JPEGs as ImageNet has them: parts of scikit-learn's two photographs.

    Sizes vary by a twentieth, every fourth picture is upright, qualities are 93 to 96: at 375 x
    500 pixels a file has about 76 kB.
    """
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    draw = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        height, width = (int(side * draw.uniform(0.95, 1.05)) for side in size)
        scale = draw.uniform(0.8, 1) * min(photo.width / width, photo.height / height)
        left = draw.uniform(0, photo.width - scale * width)
        top = draw.uniform(0, photo.height - scale * height)
        part = (left, top, left + scale * width, top + scale * height)
        picture = photo.resize((width, height), Image.Resampling.LANCZOS, box=part)
        if number % 4 == 3:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(folder / f"{number:04d}.jpg", quality=int(draw.integers(93, 97)))


def mae_transform(size: int) -> Callable[[BinaryIO], Tensor]:
    """MAE's pretraining pipeline: PIL and torchvision, an image at a time."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=3),  # bicubic
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
        ]
    )
    return lambda file: augment(Image.open(file).convert("RGB"))


def read_all(dataset: ImageFiles, finish: Callable[[Tensor], Tensor], draw: Iterator[int]) -> None:
    """Read a data set once, in batches, as a worker of the loader does."""
    for start in range(0, len(dataset), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(dataset)))
        images, _ = collate([dataset[index, next(draw)] for index in indices])
        finish(images)


def seeds() -> Iterator[int]:
    """Another augmentation for each image and round, the same in each run and form."""
    draw = np.random.default_rng(0)
    while True:
        yield int(draw.integers(2**63))


def measure(files: Files, args: Namespace) -> dict[str, list[float]]:
    """Seconds that an image takes in each form, one entry a round."""
    size = (args.input_size, args.input_size)
    ours = ImageFiles(files.folder, pretrain_transform(size))
    mae = ImageFiles(files.folder, mae_transform(args.input_size))
    runs = {
        "mae": partial(read_all, mae, lambda images: images, seeds()),
        "ours": partial(read_all, ours, lambda images: images, seeds()),
        "normalized": partial(read_all, ours, normalize, seeds()),
    }
    seconds = time_rounds(runs, args.rounds, processor_time, warmup=1)
    return {form: [s / len(ours) for s in times] for form, times in seconds.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Images/s, milliseconds and the ratio to MAE's pipeline."""
    rows = [["form", "images/s a core", "ms an image (min–max)", "times MAE's (min–max)"]]
    for form, values in seconds.items():
        times = median_and_range(ratios(seconds["mae"], values))
        milliseconds = median_and_range([1000 * value for value in values])
        rows.append([form, f"{1 / median(values):.0f}", milliseconds, times])
    return markdown_table(rows)


def report(files: Files, args: Namespace, argv: Sequence[str]) -> None:
    """Measure, print, and write the file if one is wanted."""
    surroundings = environment("loader", argv) | {
        "libraries": f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
        f"simplejpeg {simplejpeg.__version__}",
        "files": f"{files.count}, {files.mean_bytes / 1000:.0f} kB each",
    }
    print_environment(surroundings)
    seconds = measure(files, args)
    print(f"\n{table(seconds)}")
    if args.json:
        content = {"environment": surroundings, "seconds_per_image": seconds}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.data_path:
            report(Files.of(args.data_path), args, argv)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_photos(Path(folder), args.num_images, args.image_size)
                report(Files.of(Path(folder)), args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
