"""Write WebDataset shards of image folders, and indices of shards.

`python -m tools.shards write DIR OUT`, `python -m tools.shards index SHARDS`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from util.data.arrays import ARRAY_EXTENSIONS
from util.data.folders import ImageFolder, describe, find_train_folder
from util.data.images import IMAGE_EXTENSIONS
from util.data.shard_index import INDEX, known_classes, write_index
from util.data.shards import UNFINISHED, expand, write_shards
from util.errors import UsageError
from util.run.parser import Parser, positive_int
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.shards",
        description="Write WebDataset shards of image folders, and indices of shards.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("write", help="copy a folder of images into shards").add_argument
    add("source", type=Path, metavar="DIR", help="of images; its train/ and val/ if it has them")
    add("target", type=Path, metavar="OUT", help="folder for the shards, or for train/ and val/")
    add("--shard_size", type=positive_int, default=1000, metavar="N", help="images of a shard")
    add(
        "--arrays",
        action="store_true",
        help="take .npy and .npz, too; a file keeps its bytes, whatever they are",
    )
    add = commands.add_parser("index", help="index shards that came without one").add_argument
    add("shards", nargs="+", type=Path, help="tar files of one folder, or a quoted pattern")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the classes, a line each (default: those of the index that is there, else "
        "their numbers)",
    )
    return parser.parse_args(argv)


def write(args: Namespace) -> None:
    """`write DIR OUT`."""
    train = find_train_folder(args.source)
    parts = [(train, args.target)]
    if train != args.source:
        parts = [(args.source / name, args.target / name) for name in ("train", "val")]
    for source, target in parts:
        if source.is_dir() or source == train:
            images = ImageFolder(source, ARRAY_EXTENSIONS if args.arrays else IMAGE_EXTENSIONS)
            count, classes = write_shards(images, target, args.shard_size)
            labels = f"{classes} classes" if classes else "no labels"
            print(f"{len(images)} images, {labels}: {count} shards and their index in {target}")
            _print_left_out(images.left_out, source)


def index(args: Namespace) -> None:
    """`index SHARDS`."""
    paths = [path for pattern in args.shards for path in _existing(pattern)]
    folder = paths[0].parent
    if any(path.parent != folder for path in paths):
        raise UsageError("the shards must lie in one folder, beside their index")
    if (folder / UNFINISHED).exists():
        raise UsageError(f"{folder} was not written to its end: `write` it again, index and all")
    classes = _read_names(args.classes) if args.classes else known_classes(folder)
    count, left_out = write_index(folder, [path.name for path in paths], classes)
    named = f", {len(classes)} classes from {args.classes or 'the last index'}" if classes else ""
    print(f"{count} images in {len(paths)} shards{named}: {folder / INDEX}")
    _print_left_out(left_out, folder)


def _read_names(path: Path) -> list[str]:
    """The lines of a text file, with or without a byte order mark."""
    try:
        lines = path.read_text("utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"--classes {path} cannot be read: {error.strerror}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not all(map(str.strip, lines)):
        raise UsageError(f"--classes {path} must have the name of a class in each line")
    return lines


def _print_left_out(left_out: Counter[str], folder: Path) -> None:
    if left_out:
        print(f"left out of {folder}: {describe(left_out)}")


def _existing(pattern: Path) -> list[Path]:
    """The files of a pattern: with * and ? as a shell has it, or with braces."""
    if set("*?[") & set(pattern.name):
        paths = sorted(pattern.parent.glob(pattern.name))
        if not paths:
            raise UsageError(f"no file is called {pattern}")
        return paths
    folder, names = expand(pattern)
    if names is None:
        raise UsageError(f"{pattern} is no tar file: shards end in .tar")
    return [folder / name for name in names]


def main(args: Namespace) -> None:
    """Run a command."""
    {"write": write, "index": index}[args.command](args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # names need not be UTF-8
    sys.exit(run_main(main, parse_args()))
