"""Segment pictures: `python -m SEG.predict CONFIG CHECKPOINT IMAGES… --out DIR`."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.models import BaseSegmentor
from mmseg.registry import MODELS
from PIL import Image

from SEG import options
from SEG.data import class_colours, class_names
from SEG.hooks import overlay
from util.data.files import find_lost
from util.data.folders import list_images
from util.data.images import load_image
from util.errors import UsageError
from util.run.args import check_writable
from util.run.parser import Parser
from util.run.program import run_main
from util.weights.load import load_weights
from util.weights.read import Weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m SEG.predict",
        description="Segment pictures. Writes DIR/classes/*.png, the number of the class in each "
        "pixel, and DIR/overlays/*.png to look at.",
    )
    options.add_config_args(parser)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="of SEG.train, or the published one"
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="files, or folders of them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    return parser.parse_args(argv)


FOLDERS = ("classes", "overlays")


def name_outputs(images: Sequence[Path], out: Path) -> dict[str, Path]:
    """Name of the output, relative and without an ending, to image file.

    Raises:
        UsageError: a path without images, two outputs with one name, or one that is an image.
    """
    files: dict[str, Path] = {}
    for given in images:
        found = map(Path, list_images(given)) if given.is_dir() else [given]
        for path in found:
            relative = path.relative_to(given) if given.is_dir() else Path(path.name)
            other = files.setdefault(str(relative.with_suffix("")), path)
            if other != path:
                raise UsageError(
                    f"{other} and {path} would be written to the same file: give them in two calls"
                )
    targets = (target_of(out, *pair) for pair in itertools.product(FOLDERS, files))
    if lost := find_lost(targets, files.values()):
        raise UsageError(f"--out {out}: {lost} is one of the images: give another folder")
    return files


def target_of(out: Path, folder: str, name: str) -> Path:
    """File of an output."""
    return out / folder / f"{name}.png"


def build_segmentor(config: Config, weights: Weights, device: torch.device) -> BaseSegmentor:
    """A config's model with trained weights, ready to predict.

    Raises:
        UsageError: weights of another model.
    """
    init_default_scope(config.default_scope)
    config.model.backbone.pretrained = None
    with options.clear_errors():
        model = revert_sync_batchnorm(MODELS.build(config.model))
    print(load_weights(model, weights))
    return model.to(device).eval()


@torch.inference_mode()
def predict(model: BaseSegmentor, pipeline: Compose, path: Path) -> np.ndarray:
    """The class of each pixel of an image file, `[H, W]`, uint8.

    Raises:
        UsageError: a file that cannot be decoded.
    """
    sample = pipeline({"img_path": str(path)})
    (result,) = model.test_step(pseudo_collate([sample]))
    return result.pred_sem_seg.data[0].to(torch.uint8).cpu().numpy()


def write(out: Path, name: str, path: Path, classes: np.ndarray, colours: list[list[int]]) -> None:
    """Write class map and overlay of an image."""
    picture = Image.fromarray(classes)
    picture.putpalette(np.array(colours, np.uint8).tobytes())  # its pixels stay class numbers
    image = overlay(np.asarray(load_image(path)), classes, colours)
    for folder, content in zip(FOLDERS, (picture, Image.fromarray(image)), strict=True):
        target = target_of(out, folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        content.save(target)


def shares(classes: np.ndarray, names: Sequence[str], most: int = 5) -> str:
    """The largest classes of a class map, with their share of the image."""
    counts = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    largest = [i for i in np.argsort(-counts)[:most] if counts[i] > 0]
    return ", ".join(f"{names[i]} {counts[i]:.1%}" for i in largest)


def main(args: argparse.Namespace) -> None:
    """Build the model, then segment one image after the other."""
    config = options.read_config(args)
    files = name_outputs(args.images, args.out)
    weights, _ = options.read_segmentor(args.checkpoint)
    options.set_num_classes(config, weights.num_classes)
    options.use_stats(config, weights)
    device = options.start(config)
    check_writable(args.out, "--out")
    names = class_names(weights.classes or weights.num_classes)
    model, colours = build_segmentor(config, weights, device), class_colours(names)
    steps = config.test_dataloader.dataset.pipeline
    pipeline = Compose([step for step in steps if step["type"] != "LoadMask"])
    done = 0
    for name, path in files.items():
        try:
            classes = predict(model, pipeline, path)
        except UsageError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            continue
        write(args.out, name, path, classes, colours)
        print(f"{name}: {shares(classes, names)}", flush=True)
        done += 1
    if not done:
        raise UsageError("none of the images could be read")
    print(f"{done} images: class maps in {args.out}/classes, overlays in {args.out}/overlays")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
