"""Time, memory and arithmetic of a classifier's evaluation, beside timm's ViT.

`python -m benchmarks.inference_step --help`, from the repository root. Three forms are compared in
one run, on random images: a forward pass, nothing kept for a backward one.

- `tokens`: this project's classifier, channels last from the first layer on;
- `grid`: the same model as the original computes it, channels first, norms between permutations;
- `vit`: timm's ViT of that size's name, `vit_base_patch16_224` for base.
"""

import argparse
import sys
from collections.abc import Sequence

import timm
from torch import Tensor, nn

from benchmarks import finetune_step
from benchmarks.steps import Benchmark, add_step_args, run
from util.run.parser import Parser


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """The model of one form, on its device.

    Raises:
        ValueError: the patch does not divide the input size.
    """
    if form != "vit":
        return finetune_step.build(form, args).eval()
    name, size = f"vit_{args.model}_patch16_224", args.input_size
    if size % 16:
        raise ValueError(f"--input_size {size} is not divisible by the patch of 16")
    model = timm.create_model(name, img_size=size, num_classes=finetune_step.NUM_CLASSES)
    return model.eval().to(args.device)


def random_images(args: argparse.Namespace) -> tuple[Tensor]:
    """Images `[N, 3, H, W]` of noise."""
    return finetune_step.random_batch(args)[:1]


def logits(form: str, model: nn.Module, args: argparse.Namespace, imgs: Tensor) -> Tensor:
    """The model's outputs."""
    return model(imgs)


BENCHMARK = Benchmark(
    *("inference_step", build, random_images, logits, ("tokens", "grid", "vit")), training=False
)


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.inference_step",
        description="Compare evaluation of the classifier with channels last, as published, and of "
        "timm's ViT: seconds, images/s, peak memory in MiB over the idle model, GFLOPs per image.",
    )
    add_step_args(parser, BENCHMARK, finetune_step.SIZES, batch=16)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    run(BENCHMARK, get_args_parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
