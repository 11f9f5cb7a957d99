"""Look into checkpoints, and convert them.

`python -m tools.checkpoint inspect FILE…` says what files are and what they are good for;
`python -m tools.checkpoint export FILE --to model.safetensors` writes the weights alone.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.errors import UsageError
from util.run.parser import Parser
from util.run.program import run_main
from util.weights.describe import describe
from util.weights.export import export_weights
from util.weights.read import read_weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.checkpoint", description="Look into checkpoints, and convert them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what files are and what they are good for")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE")
    export = commands.add_parser("export", help="write the weights alone")
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help=".safetensors, .pth or .pt"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Inspect or export."""
    if args.command == "inspect":
        print("\n\n".join(describe(read_weights(path)) for path in args.files))
        return
    found = read_weights(args.file)
    if args.to.exists():
        raise UsageError(f"--to {args.to} exists already: give another name")
    export_weights(found, args.to)
    print(f"{len(found.state)} tensors of {args.file} in {args.to}")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
