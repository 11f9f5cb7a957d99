"""Time, memory and arithmetic of one pretraining step: ConvMAE as here, as published, and MAE.

`python -m benchmarks.pretrain_step --help`, from the repository root. Three forms are compared in
one run, on random images: forward, backward and AdamW.

- `visible`: this project's model, which computes the visible blocks only;
- `dense`: the same model as the original computes it;
- `mae`: a plain MAE ViT of the same width.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.reference import DenseMaskedAutoencoder, PlainMaskedAutoencoder
from benchmarks.steps import Benchmark, add_step_args, run
from models_convmae import MODELS
from util.args import Parser, mask_ratio

# The plain ViT beside each ConvMAE: width and heads of its stage 3, one block more, its decoder.
TINY_DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
MAE_SIZES = {
    "tiny": dict(embed_dim=128, depth=5, num_heads=2, **TINY_DECODER),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """The model of one form, on its device.

    Raises:
        ValueError: sizes or a mask ratio that do not fit.
    """
    if form == "mae":
        model = PlainMaskedAutoencoder(img_size=args.input_size, **MAE_SIZES[args.model])
    else:
        model = MODELS[f"convmae_convvit_{args.model}_patch16"](img_size=args.input_size)
    if form == "dense":
        model.__class__ = DenseMaskedAutoencoder  # the same module, computed the other way
    model.geometry.visible_patches(args.mask_ratio)
    return model.to(args.device)


def random_images(args: argparse.Namespace) -> tuple[Tensor]:
    """A batch `[N, 3, H, W]` of noise."""
    size = args.input_size
    return (torch.randn(args.batch_size, 3, size, size, device=args.device),)


def loss(model: nn.Module, args: argparse.Namespace, imgs: Tensor) -> Tensor:
    """The loss of a batch."""
    return model(imgs, args.mask_ratio)[0]


BENCHMARK = Benchmark("pretrain_step", build, random_images, loss, ("visible", "dense", "mae"))


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.pretrain_step",
        description="Compare one pretraining step (forward, backward, AdamW) of ConvMAE on visible "
        "blocks, of dense ConvMAE and of a plain MAE: seconds, images/s, peak memory in MiB over "
        "the idle model and optimizer, GFLOPs per image.",
    )
    add_step_args(parser, BENCHMARK, list(MAE_SIZES), batch=16)
    parser.add_argument(
        "--mask_ratio",
        type=mask_ratio,
        default=0.75,
        metavar="SHARE",
        help="share of patches to remove",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    run(BENCHMARK, get_args_parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
