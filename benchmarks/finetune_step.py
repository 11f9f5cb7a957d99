"""Time, memory and arithmetic of one fine-tuning step: the classifier as here, and as published.

`python -m benchmarks.finetune_step --help`, from the repository root. Two forms are compared in
one run, on random images and labels: forward, backward and AdamW.

- `tokens`: this project's classifier, channels last from the first layer on;
- `grid`: the same model as the original computes it, channels first, norms between permutations.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference import GridConvViT
from benchmarks.steps import Benchmark, add_step_args, run
from models_convvit import MODELS
from util.run.parser import Parser

SIZES = ("tiny", "small", "base", "large")
NUM_CLASSES = 1000


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """The model of one form, on its device.

    Raises:
        ValueError: the patch does not divide the input size.
    """
    name = f"convvit_{args.model}_patch16"
    model = MODELS[name](img_size=args.input_size, num_classes=NUM_CLASSES, drop_path_rate=0.1)
    if form == "grid":
        model.__class__ = GridConvViT  # the same module, computed the other way
    return model.train().to(args.device)


def random_batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, H, W]` of noise and labels `[N]`."""
    size = args.input_size
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=args.device)
    return torch.randn(args.batch_size, 3, size, size, device=args.device), labels


def loss(
    form: str, model: nn.Module, args: argparse.Namespace, imgs: Tensor, labels: Tensor
) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(model(imgs), labels)


BENCHMARK = Benchmark("finetune_step", build, random_batch, loss, ("tokens", "grid"))


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.finetune_step",
        description="Compare one fine-tuning step (forward, backward, AdamW) of the classifier "
        "with channels last and as published: seconds, images/s, peak memory in MiB over the idle "
        "model and optimizer, GFLOPs per image.",
    )
    add_step_args(parser, BENCHMARK, SIZES, batch=8)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    run(BENCHMARK, get_args_parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
