"""Look into checkpoints, and convert them.

`python -m tools.checkpoint inspect FILE…` says what files are and what they are good for;
`python -m tools.checkpoint export FILE --to model.safetensors` writes the weights alone, with
`--encoder` only the encoder's, as timm takes them.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models_convvit import ConvViT, convvit_from_weights
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.parser import Parser
from util.run.program import run_main
from util.weights.describe import describe, show_stats
from util.weights.export import export_weights
from util.weights.read import Weights, read_weights


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
    export.add_argument(
        "--encoder",
        action="store_true",
        help="the encoder alone, by the names that timm.create_model's checkpoint_path takes",
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
    if args.encoder:
        model, _ = convvit_from_weights(found, num_classes=0)
        info = {name: value for name, value in found.info.items() if name != "classes"}
        found = replace(found, state=model.state_dict(), info=info, known=found.architecture)
    export_weights(found, args.to)
    print(f"{len(found.state)} tensors of {args.file} in {args.to}")
    if args.encoder:
        print(creation(found, model, args.to))


def creation(weights: Weights, model: ConvViT, path: Path) -> str:
    """The lines of Python by which timm creates a headless model from its exported weights."""
    architecture = weights.architecture
    size, video = architecture.size_name or "base", architecture.ndim == 3
    named = Architecture.named(f"_{size}_")
    defaults = (named.with_time() if video else named).kwargs()
    kwargs = {n: v for n, v in architecture.kwargs().items() if v != defaults[n]}
    kwargs |= {"global_pool": "token"} if model.global_pool == "token" else {}
    given = "".join(f"{name}={value!r}, " for name, value in kwargs.items())
    module, prefix = ("VideoConvMAE.models", "video") if video else ("models_convvit", "")
    note = f"\n# images are normalised by {show_stats(weights.stats)}" if weights.stats else ""
    return (
        f"import timm, {module}\n"
        f'model = timm.create_model("{prefix}convvit_{size}_patch16", num_classes=0, {given}'
        f'checkpoint_path="{path}"){note}'
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
