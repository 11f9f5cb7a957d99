"""Write the demo's scenes in COCO's layout: `python -m tools.demo_coco FOLDER`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.demo.coco import write_coco_scenes
from util.run.parser import Parser
from util.run.program import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(prog="python -m tools.demo_coco", description="Write the demo's scenes.")
    parser.add_argument("folder", type=Path, help="where to write pictures and annotations")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the scenes below a folder."""
    print(f"scenes in {write_coco_scenes(args.folder)}")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
