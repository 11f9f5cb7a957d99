"""Draw what a detector finds in images.

`python -m DET.predict --config-file FILE --checkpoint FILE IMAGES… --out DIR`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from DET.train_net import check_installed
from util.data.files import find_lost
from util.data.folders import list_images
from util.errors import UsageError
from util.run import args as arguments
from util.run.distributed import init_processes
from util.run.parser import Parser, device_name, share
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m DET.predict",
        description="Draw the boxes and masks that a trained detector finds.",
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="the detector's recipe or config.yaml")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="the trained detector")
    add("images", type=Path, nargs="+", metavar="IMAGES", help="files, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures to write")
    add(
        "--threshold",
        type=share,
        default=0.5,
        metavar="SCORE",
        help="lowest score of what is drawn",
    )
    where = "where to run: auto, cuda, cuda:N for one GPU of several, mps or cpu"
    add("--device", type=device_name, default="auto", help=where)
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the detector, then draw image after image."""
    check_installed()
    from DET.checkpoint import read_detector
    from DET.config import load_config
    from DET.data import read_array
    from DET.inference import Predictor, draw

    files = [f for path in args.images for f in (list_images(path) if path.is_dir() else [path])]
    cfg = load_config(args.config_file)
    device = init_processes(args.device)
    targets = target_names(files, args.out)
    predictor = Predictor(cfg, read_detector(args.checkpoint), device, args.threshold)
    print(predictor.report)
    arguments.check_writable(args.out, "--out")
    for file, target in zip(files, targets, strict=True):
        try:
            image = read_array(file, predictor.image_format)
        except OSError as error:
            raise UsageError(str(error)) from error
        found = predictor(image)
        Image.fromarray(draw(image, found, predictor.classes)).save(target)
        print(f"{file}: {len(found)} found, drawn in {target}")


def target_names(files: Sequence[str | Path], folder: Path) -> list[Path]:
    """A picture for each file, with a number where an earlier file has the name.

    Raises:
        UsageError: a picture would be written over one of the files.
    """
    stems = [Path(file).stem for file in files]
    # The names of all files are theirs before any gets a number; for some disks a and A are one.
    names, given, targets = {stem.casefold() for stem in stems}, set(), []
    for stem in stems:
        if stem.casefold() in given:
            numbered = (f"{stem}-{number}" for number in itertools.count(2))
            stem = next(name for name in numbered if name.casefold() not in names | given)
        given.add(stem.casefold())
        targets.append(folder / f"{stem}.png")
    if lost := find_lost(targets, files):
        raise UsageError(f"--out {folder}: {lost} is one of the images: give another folder")
    return targets


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
