"""Segmentation on embedded images: `make demo-seg`, or `python -m SEG.demo --pretrained FILE`.

Trains the tiny config twice on a few scenes of handwritten digits, from a pretrained encoder and
from random weights, and tests both on scenes of digits that neither has seen.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from SEG import options, test, train
from util.demo.scenes import write_ade_scenes
from util.run.parser import Parser, positive_int
from util.run.program import run_main

CONFIG = "SEG/configs/upernet_convmae_tiny_scenes.py"
LABELLED = 100  # scenes to learn from: pretraining counts where labels are few
# Of the classes in the loss: five in six pixels are background.
WEIGHTS = str([1.0] * 10 + [0.2]).replace(" ", "")
SETTINGS = [
    f"train_dataloader.dataset.indices={LABELLED}",
    f"model.decode_head.loss_decode.class_weight={WEIGHTS}",
    f"model.auxiliary_head.loss_decode.class_weight={WEIGHTS}",
]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(prog="python -m SEG.demo", description="Train and test on embedded images.")
    parser.add_argument(
        "--pretrained",
        type=Path,
        default=Path("output/demo/pretrain/checkpoint.pth"),
        metavar="FILE",
        help="checkpoint of main_pretrain.py --demo",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/demo"), help="scenes, checkpoints, pictures"
    )
    parser.add_argument(
        "--iterations",
        type=positive_int,
        metavar="N",
        help="training steps of each of the two runs (default: the config's)",
    )
    return parser.parse_args(argv)


def run(scenes: Path, pretrained: str, work_dir: Path, iterations: int | None) -> float:
    """Train and test once, by the programs' own command lines.

    Args:
        scenes: images and masks.
        pretrained: a checkpoint, or "none".
        work_dir: of the run.
        iterations: its length; None for the config's.

    Returns:
        mIoU on the validation scenes, in percent.
    """
    common = ["--data-path", str(scenes), "--work-dir", str(work_dir), "--cfg-options", *SETTINGS]
    length = [] if iterations is None else ["--iterations", str(iterations)]
    train.main(train.parse_args([CONFIG, "--pretrained", pretrained, *length, *common]))
    checkpoint = str(options.last_checkpoint(work_dir))
    show = ["--show-dir", str(work_dir / "overlays")]
    return test.main(test.parse_args([CONFIG, checkpoint, *show, *common]))["mIoU"]


def sheet(pictures: Sequence[Path], columns: int = 2) -> Image.Image:
    """Pictures of different sizes below and beside each other, on white."""
    images = [np.asarray(Image.open(path)) for path in pictures]
    height, width = (max(image.shape[axis] for image in images) + 8 for axis in (0, 1))
    rows = -(-len(images) // columns)
    canvas = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def main(args: argparse.Namespace) -> None:
    """Write the scenes, run twice, compare."""
    scenes = write_ade_scenes(args.output_dir / "scenes")
    output = args.output_dir / "seg"
    pretrained = run(scenes, str(args.pretrained), output / "pretrained", args.iterations)
    random = run(scenes, "none", output / "random", args.iterations)
    pictures = sorted((output / "pretrained" / "overlays").glob("*.png"))
    sheet(pictures[:8]).save(output / "overlays.png")
    print(
        f"\nmIoU on held-out scenes: {pretrained / 100:.3f} from the pretrained encoder, "
        f"{random / 100:.3f} from random weights\n"
        f"image, truth, prediction: {output}/overlays.png, all of them in "
        f"{output}/pretrained/overlays"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
