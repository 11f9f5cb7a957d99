"""Time, memory and arithmetic of one pretraining step: ConvMAE as here, as published, and MAE.

`python -m benchmarks.pretrain_step --help`, from the repository root. Three forms are compared in
one run, on random images: forward, backward and AdamW.

- `visible`: this project's model, which computes the visible blocks only;
- `dense`: the same model as the original computes it;
- `mae`: a plain MAE ViT of the same width.

Not compared unless named:

- `complementary`: FastConvMAE's several masks of each image. Its numbers are those of a mask, which
  counts as an image: a batch holds as many fewer images;
- `predict_share=S`: a share S of the removed patches is predicted;
- `teacher=NAME`: visible tokens mimic those of timm's model NAME, with random weights.

With `--video` the same of clips: VideoConvMAE, its dense form, and a plain VideoMAE.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from benchmarks.reference import DenseMaskedAutoencoder, PlainMaskedAutoencoder
from benchmarks.steps import Benchmark, add_step_args, run
from models_convmae import MODELS
from models_teacher import Teacher
from util.data.transforms import channel_stats
from util.run.parser import Parser, mask_ratio
from VideoConvMAE.models import DECODER, VIDEO
from VideoConvMAE.models import MODELS as VIDEO_MODELS

# The plain ViT beside each ConvMAE: width and heads of its stage 3, one block more, its decoder.
TINY_DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
MAE_SIZES = {
    "tiny": dict(embed_dim=128, depth=5, num_heads=2, **TINY_DECODER),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


# VideoMAE's: all sizes have the decoder of VideoConvMAE, and no class token.
VIDEO_DECODERS = {"tiny": TINY_DECODER} | dict.fromkeys(("small", "base"), DECODER)


class Mimic(nn.Module):
    """A student, and its teacher that sees the images first."""

    complementary = False

    def __init__(self, student: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        self.student, self.teacher, self.geometry = student, teacher, student.geometry

    def forward(self, imgs: Tensor, mask_ratio: float) -> tuple[Tensor, ...]:
        """As the student's, with the teacher's tokens in its loss."""
        return self.student(imgs, mask_ratio, features=self.teacher(imgs))


def build_mimic(name: str, args: argparse.Namespace) -> Mimic:
    """The image model of `args`, and timm's model `name` as its teacher.

    Raises:
        ValueError: no such model, or one without patch tokens; clips.
    """
    if args.video or not timm.is_model(name):
        raise ValueError(f"--forms teacher={name}: must be a timm model, for images")
    model = timm.create_model(name, num_classes=0)
    config = resolve_model_data_config(model)
    teacher = Teacher(name, model, config["input_size"][1:], config["mean"], config["std"])
    student = MODELS[f"convmae_convvit_{args.model}_patch16"](
        img_size=args.input_size, mimic_dim=teacher.width
    )
    return Mimic(student, teacher.see_through(*channel_stats(3), student.geometry.grid(3)))


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """The model of one form, on its device.

    Raises:
        ValueError: sizes or a mask ratio that do not fit.
    """
    size = clip_size(args) if args.video else args.input_size
    if form == "mae" and args.video:
        patch = tuple(math.prod(p) for p in zip(*VIDEO["patch_size"], strict=True))
        clips = dict(patch_size=patch, mask_unit=(size[0] // patch[0], 1, 1), class_token=False)
        decoder = VIDEO_DECODERS[args.model]
        model = PlainMaskedAutoencoder(size, **MAE_SIZES[args.model] | clips | decoder)
    elif form == "mae":
        model = PlainMaskedAutoencoder(size, **MAE_SIZES[args.model])
    elif form.startswith("teacher="):
        model = build_mimic(form.removeprefix("teacher="), args)
    elif args.video:
        model = VIDEO_MODELS[f"videoconvmae_{args.model}_patch16"](img_size=size)
    else:
        model = MODELS[f"convmae_convvit_{args.model}_patch16"](img_size=size)
    model.complementary = form == "complementary"
    if form == "dense":
        model.__class__ = DenseMaskedAutoencoder  # the same module, computed the other way
    model.geometry.predicted_patches(mask_ratio_of(args), predict_share_of(form))
    return model.to(args.device)


def clip_size(args: argparse.Namespace) -> tuple[int, ...]:
    """(T, H, W) of a clip."""
    return (VIDEO["img_size"][0], args.input_size, args.input_size)


def random_images(args: argparse.Namespace) -> tuple[Tensor]:
    """A batch `[N, 3, H, W]` or `[N, 3, T, H, W]` of noise."""
    size = clip_size(args) if args.video else (args.input_size, args.input_size)
    return (torch.randn(args.batch_size, 3, *size, device=args.device),)


def mask_ratio_of(args: argparse.Namespace) -> float:
    """The share to remove: 0.75 of a picture, 0.9 of a clip, unless given."""
    return args.mask_ratio or (0.9 if args.video else 0.75)


def predict_share_of(form: str) -> float:
    """The share to predict in a form: 1 unless it is `predict_share=S`.

    Raises:
        ValueError: no number.
    """
    name, _, value = form.partition("=")
    return float(value) if name == "predict_share" else 1.0


def loss(form: str, model: nn.Module, args: argparse.Namespace, imgs: Tensor) -> Tensor:
    """The loss of a batch, as each form's training takes it."""
    if (share := predict_share_of(form)) != 1:
        return model(imgs, mask_ratio_of(args), predict_share=share)[0]
    return model(imgs, mask_ratio_of(args))[0]


def masks(model: nn.Module, args: argparse.Namespace) -> int:
    """Masks of an image."""
    return model.geometry.num_masks(mask_ratio_of(args)) if model.complementary else 1


BENCHMARK = Benchmark(
    *("pretrain_step", build, random_images, loss, ("visible", "dense", "mae")),
    more=("complementary", "predict_share=0.5", "teacher=vit_base_patch16_224.dino"),
    masks=masks,
)


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
        metavar="SHARE",
        help="share of patches to remove (default: 0.75, of clips 0.9)",
    )
    parser.add_argument(
        "--video",
        action="store_true",
        help=f"clips of {VIDEO['img_size'][0]} frames: VideoConvMAE beside a plain VideoMAE",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    run(BENCHMARK, get_args_parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
