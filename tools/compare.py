"""A table of finished runs side by side: `python -m tools.compare RUN_FOLDER…`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.errors import UsageError
from util.run.logger import markdown_table
from util.run.parser import Parser
from util.run.program import run_main
from util.run.run_log import read_log

COLUMNS = ("run", "epochs", "train loss", "test loss", "acc@1", "best acc@1")


def row_of(folder: Path) -> list[str]:
    """A run's last line of log.txt as a table row; "–" where it has no number.

    Raises:
        UsageError: a folder without a log, or with an empty one.
    """
    try:
        lines, _ = read_log(folder / "log.txt")
    except OSError as error:
        raise UsageError(f"{folder} holds no log.txt of a run: {error.strerror}") from error
    if not lines:
        raise UsageError(f"{folder / 'log.txt'} is empty: the run has not finished an epoch yet")
    last, best = lines[-1], max((line.get("test_acc1") or 0 for line in lines), default=0)

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    accuracy = last.get("test_acc1")
    losses = (number(last.get(name), ".4f") for name in ("train_loss", "test_loss"))
    accuracies = (number(accuracy, ".2f"), number(best if accuracy is not None else None, ".2f"))
    return [folder.name, str(last["epoch"] + 1), *losses, *accuracies]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.compare", description="Print a table of finished runs side by side."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="--output_dir of a run"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(markdown_table([COLUMNS, *map(row_of, args.folders)]))


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
