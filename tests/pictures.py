"""Real image files for the tests."""

import random
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from util.data.images import load_image


def picture(seed: int = 0, height: int = 24, width: int = 40) -> Image.Image:
    """Coloured squares: no two pictures are alike, and none looks like its mirror image."""
    squares = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8)))


def photo(height: int, width: int, number: int = 0) -> Image.Image:
    """One of the two photographs that come with scikit-learn, resized."""
    image = Image.fromarray(load_sample_images().images[number])
    return image.resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:03d}.png")
    return folder


def decode(file: BinaryIO) -> torch.Tensor:
    """The simplest transform of a data set: `[C, H, W]`, uint8."""
    return v2.functional.pil_to_tensor(load_image(file))


def noisy(file: BinaryIO) -> torch.Tensor:
    """Draws from every generator that an augmentation may use."""
    noise = torch.rand(1).item() + np.random.rand() + random.random()
    return decode(file).float() + noise
