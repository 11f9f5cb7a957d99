"""The segmentation programs on a model and data small enough for tests."""

from dataclasses import dataclass
from pathlib import Path

import torch

from models_convmae import MODELS
from tests.runs import Launcher, Process, Result

CONFIG = "SEG/configs/upernet_convmae_tiny_scenes.py"

STATS = (0.3, 0.25)
# The demo's model made smaller, six iterations of two crops: a run of a second or two.
CROP = ("--crop-size", 48)
OPTIONS = (
    "model.backbone.embed_dim=(16,24,32)", "model.backbone.depth=(1,1,2)",
    "model.decode_head.in_channels=[24,32,32]", "model.decode_head.channels=8",
    "model.auxiliary_head.in_channels=32", "model.auxiliary_head.channels=8",
    "train_dataloader.batch_size=2", "train_cfg.max_iters=6", "train_cfg.val_interval=6",
    "default_hooks.checkpoint.interval=2", "default_hooks.logger.interval=1",
    "param_scheduler.0.end=2", "param_scheduler.1.begin=2", "param_scheduler.1.end=6",
)  # fmt: skip


def save_pretrained(path: Path, side: int, **sizes: object) -> Path:
    """Save a checkpoint as pretraining on gray pictures leaves it, always the same weights.

    Its images were normalised by a mean and a deviation of their own, `STATS`.

    Args:
        path: the file, returned.
        side: of the pictures, in pixels.
        **sizes: of the tiny model, where they are others.
    """
    name = "convmae_convvit_tiny_patch16"
    torch.manual_seed(0)
    model = MODELS[name](img_size=side, in_chans=1, **sizes)
    args = {"model": name, "input_size": [side, side], "in_chans": 1}
    args |= {"mean": [STATS[0]], "std": [STATS[1]]}
    torch.save({"model": model.state_dict(), "args": args, "epoch": 1}, path)
    return path


@dataclass(frozen=True)
class Programs:
    """Starts SEG.train, SEG.test and SEG.predict as a user does, on the small model."""

    launcher: Launcher

    def start(
        self, name: str, *arguments: object, options: tuple[str, ...] = (), before: str = ""
    ) -> Process:
        command = [CONFIG, *arguments, *CROP, "--cfg-options", *OPTIONS, *options]
        return self.launcher.start(*command, program=f"SEG.{name}", before=before)

    def run(self, name: str, *arguments: object, **kwargs: object) -> Result:
        return self.start(name, *arguments, **kwargs).wait()
