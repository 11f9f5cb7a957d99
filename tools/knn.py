"""k-NN accuracy of a labelled folder by the features of any checkpoint.

`python -m tools.knn --checkpoint FILE --data_path DIR`
"""

import argparse
import sys
from collections.abc import Sequence

from engine_knn import NEIGHBORS, TEMPERATURE, Neighbors, knn_accuracy
from tools.inference import Frozen, add_inference_args, open_frozen
from util.data.loader import Loader
from util.errors import UsageError
from util.run.distributed import print_once
from util.run.parser import Parser, positive_float, positive_int
from util.run.program import run_main
from util.run.setup import eval_loader


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.knn",
        description="Classify val/ by the nearest neighbours in train/ (Wu et al., arXiv "
        "1805.01978; DINO's numbers), by the features of any checkpoint.",
    )
    add_inference_args(
        parser,
        data="folder with train/ and val/, in each a folder a class or shards; of videos also "
        "lists, train.csv and val.csv",
    )
    group = parser.add_argument_group("neighbours")
    group.add_argument(
        "--k", type=positive_int, default=NEIGHBORS, metavar="N", help="neighbours that vote"
    )
    group.add_argument(
        "--temperature",
        type=positive_float,
        default=TEMPERATURE,
        metavar="T",
        help="a neighbour of cosine similarity s weighs exp(s / T)",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Embed both splits, vote, print the accuracy."""
    frozen = open_frozen(args)
    train, val = (_split(frozen, name) for name in ("train", "val"))
    accuracy = knn_accuracy(
        frozen.model,
        (train, val),
        frozen.device,
        frozen.dtype,
        predict=frozen.features(),
        max_bad_images=args.max_bad_images,
        rule=Neighbors(args.k, args.temperature),
    )
    print_once(
        f"k-NN (k {args.k}, temperature {args.temperature:g}) of {len(val.dataset)} "
        f"{val.dataset.what} by {len(train.dataset)}: Acc@1 {accuracy['knn_acc1']:.3f} "
        f"Acc@5 {accuracy['knn_acc5']:.3f}"
    )
    return accuracy


def _split(frozen: Frozen, name: str) -> Loader:
    """`train` or `val` of `--data_path`: a folder, or a list of videos."""
    root = frozen.args.data_path
    lists = [root / f"{name}{ending}" for ending in (".csv", ".txt", ".json")]
    found = [path for path in (root / name, *lists * frozen.is_video) if path.exists()]
    if not found:
        raise UsageError(f"--data_path {root} has no {name}/: it takes train/ and val/")
    return eval_loader(frozen.args, frozen.dataset(found[0], labeled=True), frozen.batch_size)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
