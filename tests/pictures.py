"""Real image files for the tests."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2


def picture(seed: int = 0, height: int = 24, width: int = 40) -> Image.Image:
    """Coloured squares: no two pictures are alike, and none looks like its mirror image."""
    squares = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8)))


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:03d}.png")
    return folder


def noisy(image: Image.Image) -> torch.Tensor:
    """Draws from every generator that an augmentation may use."""
    noise = torch.rand(1).item() + np.random.rand() + random.random()
    return v2.functional.pil_to_tensor(image).float() + noise
