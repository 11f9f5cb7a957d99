"""Check images and masks before training: `python -m SEG.check CONFIG --data-path DIR`."""

import argparse
import sys
from collections.abc import Sequence

from SEG import options
from SEG.survey import Survey, read_masks
from util.errors import UsageError
from util.run.parser import Parser
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m SEG.check",
        description="Read all masks and the images to validate on; name each file that training "
        "or validation could not use, and count the pixels of each class.",
    )
    options.add_config_args(parser)
    options.add_data_args(parser)
    return parser.parse_args(argv)


def table(surveys: Sequence[Survey]) -> str:
    """The classes as rows: share of the pixels, and masks that have one."""
    width = max(len(name) for name in surveys[0].classes)
    heads = [f"{found.what:>12} {'masks':>7}" for found in surveys]
    lines = [" " * (width + 4) + "".join(heads)]
    for number, name in enumerate(surveys[0].classes):
        cells = []
        for found in surveys:
            share = found.pixels[number] / max(int(found.pixels[:-1].sum()), 1)
            cells.append(f"{share:12.3%} {found.masks[number]:7d}")
        lines.append(f"{number:3d} {name:{width}}" + "".join(cells))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Read the config, then the data."""
    config = options.read_config(args)
    options.use_data(config, args)
    loaders = {"training": config.train_dataloader, "validation": config.val_dataloader}
    with options.clear_errors():
        surveys = read_masks(loaders)
    if not surveys:
        return
    print(table(surveys))
    for found in surveys:
        print("\n".join([found.summary(), *(f"note: {note}" for note in found.notes())]))
    errors = [error for found in surveys for error in found.errors]
    if errors:
        print("\n".join(errors))
        raise UsageError(f"{len(errors)} files cannot be used: those named above")
    for found in surveys:
        found.check()


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
