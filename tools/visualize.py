"""Draw original, masked and reconstructed images side by side.

`python -m tools.visualize --checkpoint FILE --images FILE… --output grid.png`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torchvision.utils import save_image

from models_convmae import convmae_from_weights
from util.data.arrays import ARRAY_EXTENSIONS
from util.data.files import is_one_of
from util.data.folders import scan
from util.data.images import IMAGE_EXTENSIONS, MAX_PIXELS
from util.data.transforms import denormalize
from util.errors import UsageError
from util.run.args import check_folder_of
from util.run.array_args import (
    add_array_args,
    array_format,
    complete_arrays,
    follow_checkpoint,
)
from util.run.normalization import add_stats_args, given_stats
from util.run.parser import Parser, mask_ratio, positive_int, seed
from util.run.pictures import draw_images, load_images, stretched
from util.run.program import run_main
from util.weights.describe import guesses
from util.weights.read import read_weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m tools.visualize",
        description="Draw original, masked and reconstructed images side by side.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of a masked autoencoder")
    add("--images", type=Path, nargs="+", required=True, help="files, or folders of them")
    add("--output", type=Path, default=Path("reconstruction.png"), help="picture to write")
    add("--mask_ratio", type=mask_ratio, default=0.75, help="share of patches to remove")
    add("--max_images", type=positive_int, default=16, help="take no more than so many")
    add("--columns", type=positive_int, default=2, help="images next to each other")
    add("--seed", type=seed, default=0, help="of the masks")
    add_stats_args(parser)
    add_array_args(parser, training=False)
    parser.set_defaults(max_pixels=MAX_PIXELS)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load, reconstruct, write the picture."""
    if args.output.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"--output {args.output} has no ending of a picture, such as .png")
    check_folder_of(args.output, "--output")
    missing = [str(path) for path in args.images if not path.exists()]
    if missing:
        raise UsageError(f"--images: {', '.join(missing)} does not exist")
    weights = read_weights(args.checkpoint)
    model = convmae_from_weights(weights)
    args.in_chans = model.in_chans
    follow_checkpoint(args, weights.args)
    complete_arrays(args, weights)
    if args.in_chans != model.in_chans:
        raise UsageError(
            f"{args.checkpoint} is a model of {model.in_chans} channels, --bands give "
            f"{args.in_chans}"
        )
    form, stats = array_format(args) if args.arrays else None, given_stats(args)
    endings = ARRAY_EXTENSIONS if args.arrays else IMAGE_EXTENSIONS
    files = [f for p in args.images for f in (scan(p, endings)[0] if p.is_dir() else [p])]
    if is_one_of(args.output, files):
        raise UsageError(f"--output {args.output} is one of the images: give another name")
    if taken := guesses(weights):
        print(f"note: {args.checkpoint}: taken are {taken}")
    try:
        model.geometry.visible_patches(args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio: {error}") from error
    size, files = model.geometry.img_size, files[: args.max_images]
    imgs = load_images(files, size, model.in_chans, form, stats)
    show = stretched(imgs, args.rgb) if args.arrays else partial(denormalize, stats=stats)
    drawing = draw_images(model, imgs, args.mask_ratio, args.seed, args.columns, show)
    save_image(drawing.picture, args.output)
    print(f"{len(imgs)} images: original, masked, reconstruction in {args.output}")
    print(drawing.errors)


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
