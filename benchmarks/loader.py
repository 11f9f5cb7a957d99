"""Images a second that one core reads and augments: as MAE does it, and as here.

`python -m benchmarks.loader --help`, from the repository root. One process with one thread reads
the same JPEG files in every form; what counts is the processor time it takes:

- `mae`: Pillow decodes, crops and resizes; each image to float and normalised (MAE's pipeline);
- `ours`: this project's data set, batches as the device gets them: 8-bit pixels in pretraining;
- `normalized`: the same, and the batch normalised on this core too.

With `--task finetune` the first two with RandAugment and random erasing as `main_finetune.py` and
MAE (timm's `create_transform`) have them, and what the operations of RandAugment take.
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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform
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
from util.data.datasets import ImageFiles, seeded
from util.data.loader import collate
from util.data.transforms import finetune_transform, normalize, pretrain_transform
from util.errors import UsageError
from util.run.logger import markdown_table
from util.run.parser import Parser, positive_int

TASKS = {"pretrain": ("mae", "ours", "normalized"), "finetune": ("mae", "ours")}
BATCH_SIZE = 64
# Of the fine-tuning recipe, as MAE and `main_finetune.py` have it.
POLICY = "rand-m9-mstd0.5-inc1"
RATE = 0.5  # share of the images that a drawn operation changes
CALLS = 30  # of each operation that is timed on its own


@dataclass(frozen=True)
class Files:
    """The files that are read.

    Attributes:
        folder: where they are.
        indices: their places in the data set of the folder.
        total: files of the folder.
        mean_bytes: size of one.
        left_out: other files of the folder, which are not read.
    """

    folder: Path
    indices: list[int]
    total: int
    mean_bytes: float
    left_out: str

    @classmethod
    def of(cls, folder: Path, most: int) -> "Files":
        """The images of a folder, no more than `most`, at equal distances.

        Raises:
            UsageError: there are none.
        """
        dataset = ImageFiles(folder, lambda file: file)
        total = len(dataset)
        indices = np.linspace(0, total - 1, min(most, total)).astype(int).tolist()
        sizes = [len(dataset.files.open(index).read()) for index in indices]
        return cls(folder, indices, total, sum(sizes) / len(sizes), dataset.left_out)

    def __str__(self) -> str:
        share = "" if len(self.indices) == self.total else f" of {self.total:,}"
        others = f"; {self.left_out}" if self.left_out else ""
        return f"{len(self.indices)}{share}, {self.mean_bytes / 1000:.0f} kB each{others}"


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.loader",
        description="Images a second that one core decodes and augments for training, as MAE does "
        "it and as here, on the same files.",
    )
    add = parser.add_argument
    add("--task", default="pretrain", choices=list(TASKS), help="whose augmentation")
    add("--data_path", type=Path, help="folder of JPEGs (default: made of two photographs)")
    add(
        "--num_images",
        type=positive_int,
        default=128,
        metavar="N",
        help="files to make, or to read of the folder",
    )
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


def mae_transform(task: str, size: int) -> Callable[[BinaryIO], Tensor]:
    """MAE's pipeline: PIL and torchvision or timm, an image at a time."""
    stats = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    if task == "finetune":
        augment = create_transform(
            size,
            is_training=True,
            color_jitter=None,
            auto_augment=POLICY,
            interpolation="bicubic",
            **dict(re_prob=0.25, re_mode="pixel", re_count=1),
            **stats,
        )
    else:
        augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=3),  # bicubic
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(**stats),
            ]
        )
    return lambda file: augment(Image.open(file).convert("RGB"))


def read_all(
    dataset: ImageFiles,
    indices: Sequence[int],
    finish: Callable[[Tensor], Tensor],
    draw: Iterator[int],
) -> None:
    """Read files once, in batches, as a worker of the loader does.

    Raises:
        UsageError: one cannot be decoded, so that the forms would not read the same.
    """
    for start in range(0, len(indices), BATCH_SIZE):
        part = indices[start : start + BATCH_SIZE]
        images, bad = collate([dataset[index, next(draw)] for index in part])
        if bad:
            index, reason = bad[0]
            raise UsageError(f"{dataset.path(index)} cannot be decoded: {reason}; leave it out")
        finish(images)


def seeds() -> Iterator[int]:
    """Another augmentation for each image and round, the same in each run and form."""
    draw = np.random.default_rng(0)
    while True:
        yield int(draw.integers(2**63))


def measure(files: Files, args: Namespace) -> dict[str, list[float]]:
    """Seconds that an image takes in each form, one entry a round."""
    size = (args.input_size, args.input_size)
    own = {"pretrain": pretrain_transform, "finetune": finetune_transform}[args.task]
    ours = ImageFiles(files.folder, own(size))
    mae = ImageFiles(files.folder, mae_transform(args.task, args.input_size))
    forms = {"mae": (mae, lambda images: images), "ours": (ours, lambda images: images)}
    forms["normalized"] = (ours, normalize)
    runs = {
        name: partial(read_all, forms[name][0], files.indices, forms[name][1], seeds())
        for name in TASKS[args.task]
    }
    seconds = time_rounds(runs, args.rounds, processor_time, warmup=1)
    return {form: [s / len(files.indices) for s in times] for form, times in seconds.items()}


def operation_times(files: Files, size: int) -> dict[str, float]:
    """Seconds that each operation of RandAugment takes on a picture, at the recipe's strengths."""
    with Image.open(ImageFiles(files.folder, lambda file: file).files.open(files.indices[0])) as i:
        picture = i.convert("RGB").resize((size, size))
    policy = rand_augment_transform(POLICY, dict(interpolation=Image.Resampling.BICUBIC))

    def calls(operation: AugmentOp) -> None:
        with seeded(0):
            for _ in range(CALLS):
                operation(picture)

    for operation in policy.ops:
        operation.prob = 1.0
    times = {
        op.name: min(processor_time(partial(calls, op)) for _ in range(3)) for op in policy.ops
    }
    return {name: seconds / CALLS for name, seconds in times.items()}


def operations_table(times: dict[str, float], image: float) -> str:
    """Milliseconds of each operation, and the share of an image's time that it takes on average.

    Args:
        times: of `operation_times`.
        image: seconds that an image takes in all.
    """
    rows = [["operation", "ms a call", "share of an image's time"]]
    often = 2 * RATE / len(times)  # two are drawn
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        rows.append([name, f"{1000 * seconds:.2f}", f"{seconds * often / image:.1%}"])
    total = sum(times.values()) * often
    rows.append(["all, as drawn", f"{1000 * total:.2f}", f"{total / image:.1%}"])
    return markdown_table(rows)


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
        "files": str(files),
    }
    print_environment(surroundings)
    seconds = measure(files, args)
    print(f"\n{table(seconds)}")
    if args.task == "finetune":
        times = operation_times(files, args.input_size)
        print(f"\n{operations_table(times, median(seconds['ours']))}")
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
            report(Files.of(args.data_path, args.num_images), args, argv)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_photos(Path(folder), args.num_images, args.image_size)
                report(Files.of(Path(folder), args.num_images), args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
