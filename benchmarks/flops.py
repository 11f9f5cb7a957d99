"""Parameters and arithmetic of every model: `python -m benchmarks.flops`, from the root.

Forward passes of one image. Nothing is computed: the models have shapes, but no numbers.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models_convmae import MODELS as AUTOENCODERS
from models_convvit import ConvViT
from util.layers.architecture import SIZES
from util.run.logger import markdown_table
from util.run.parser import Parser

SEGMENTATION_CONFIG = "SEG/configs/upernet_convmae_{}_512_slide_160k_ade20k.py"


@dataclass(frozen=True)
class Model:
    """A model of the project.

    Attributes:
        task, size: what the row is called.
        pixels: side of the square image.
        build: makes it.
        run: its forward pass, of the model and a batch of images.
        paper: parameters and FLOPs as the paper states them, if it does.
    """

    task: str
    size: str
    pixels: int
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], object]
    paper: str = ""


def classifiers() -> Iterator[Model]:
    """ConvViT with a head of 1000 classes."""
    for size, sizes in SIZES.items():
        yield Model("classifier", size, 224, lambda s=sizes: ConvViT(**s), lambda m, x: m(x))


def autoencoders() -> Iterator[Model]:
    """Pretraining: the visible quarter is encoded, everything decoded."""

    def run(model: nn.Module, imgs: Tensor) -> Tensor:
        latent, _, ids_restore = model.forward_encoder(imgs, 0.75)
        return model.forward_decoder(latent, ids_restore)

    for size in SIZES:
        build = AUTOENCODERS[f"convmae_convvit_{size}_patch16"]
        yield Model("pretraining, 75 % masked", size, 224, build, run)


def segmentors() -> Iterator[Model]:
    """UperNet for 150 classes, without the auxiliary head, which only training uses.

    Raises:
        ModuleNotFoundError: requirements-seg.txt is not installed.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    import SEG  # noqa: F401
    from SEG.options import without_sync_bn

    init_default_scope("mmseg")
    papers = {"base": "153 M, 0.6 T"}
    for size in ("small", "base", "large"):
        config = Config.fromfile(SEGMENTATION_CONFIG.format(size)).model.to_dict()
        config = without_sync_bn({k: v for k, v in config.items() if k != "auxiliary_head"})
        yield Model(
            "UperNet", size, 512, lambda c=config: MODELS.build(c), lambda m, x: m(x),
            papers.get(size, ""),
        )  # fmt: skip


TASKS = {"classify": classifiers, "pretrain": autoencoders, "segment": segmentors}


def measure(model: Model) -> tuple[int, int]:
    """Parameters, and floating-point operations of a forward pass: two for a multiply-add.

    Those of matrix products and convolutions, as in `benchmarks.pretrain_step`.
    """
    with torch.device("meta"), torch.no_grad():
        network = model.build().eval()
        imgs = torch.empty(1, 3, model.pixels, model.pixels)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.run(network, imgs)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def table(tasks: Sequence[str]) -> str:
    """One row a model, as an aligned Markdown table."""
    rows = [["model", "size", "pixels", "M parameters", "GFLOP/image", "G multiply-add", "paper"]]
    for task in tasks:
        try:
            models = list(TASKS[task]())
        except ModuleNotFoundError as error:
            print(f"{task}: left out, {error.name} is not installed", file=sys.stderr)
            continue
        for model in models:
            parameters, flops = measure(model)
            numbers = [f"{parameters / 1e6:.1f}", f"{flops / 1e9:.4g}", f"{flops / 2e9:.4g}"]
            rows.append([model.task, model.size, str(model.pixels), *numbers, model.paper])
    return markdown_table(rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m benchmarks.flops",
        description="Parameters and arithmetic of every model of the project, for one image.",
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    args = parser.parse_args(argv)
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]}: one of {', '.join(TASKS)}")
    return args


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(table(args.tasks or list(TASKS)))


if __name__ == "__main__":
    sys.exit(main(parse_args()))
