"""Small checkpoints and data for the tests of the programs that run a frozen model."""

from pathlib import Path

import torch

from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import convvit_tiny_patch16
from tests.pictures import picture
from VideoConvMAE.models import videoconvvit_tiny_patch16

CLASSES = ["ant", "bee", "cat"]
GEOMETRY = dict(img_size=32, patch_size=(2, 2, 1))
# What every command line has.
FLAGS = ["--device", "cpu", "--num_workers", "0"]


def write_classes(root: Path, count: int, first: int = 0) -> Path:
    """So many pictures, in a folder a class by turns."""
    for i in range(first, first + count):
        path = root / CLASSES[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40, 48).save(path)
    return root


def save_classifier(path: Path, classes: list[str] | None = CLASSES) -> Path:
    """A fine-tuned model of random weights; without `classes` as the original code saves one."""
    torch.manual_seed(0)
    model = convvit_tiny_patch16(**GEOMETRY, num_classes=3)
    torch.nn.init.normal_(model.head.weight)  # so that the probabilities differ
    names = {"classes": classes} if classes else {}
    torch.save({"model": model.state_dict(), "args": {"input_size": [32, 32]}, **names}, path)
    return path


def save_autoencoder(path: Path) -> Path:
    """A pretrained model of random weights."""
    torch.manual_seed(0)
    model = convmae_convvit_tiny_patch16(**GEOMETRY)
    args = {"model": "convmae_convvit_tiny_patch16", "input_size": [32, 32]}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def save_video_classifier(path: Path) -> Path:
    """A video model of random weights that was fine-tuned at 2 clips x 3 crops, stride 2."""
    torch.manual_seed(0)
    geometry = dict(img_size=(4, 32, 32), patch_size=((2, 2, 2), (1, 2, 2), (1, 2, 2)))
    model = videoconvvit_tiny_patch16(**geometry, num_classes=2)
    torch.nn.init.normal_(model.head.weight)
    args = {"input_size": [32, 32], "patch_size": [2, 2, 2], "num_frames": 4, "tubelet": 2}
    args |= {"stride": 2, "sampling": "dense", "test_clips": 2, "test_crops": 3}
    content = {"model": model.state_dict(), "args": args, "classes": ["jump", "run"]}
    torch.save(content, path)
    return path
