"""A detector and scenes small enough for tests."""

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.distributed as dist

from models_convmae import convmae_convvit_tiny_patch16
from util.demo.coco import SPLITS, write_coco
from util.demo.scenes import scenes

CONFIG = "DET/configs/convmae_tiny_mask_rcnn_FPN_demo.py"
ENCODER = dict(embed_dim=(16, 24, 32), depth=(1, 1, 2))
STATS = (0.3, 0.25)  # mean and deviation by which its images were normalised
IMAGES = {"train": 6, "val": 3}


def write_scenes(folder: Path) -> Path:
    """The first scenes of each split in COCO's layout."""
    for name, count in IMAGES.items():
        write_coco(folder, name, list(itertools.islice(scenes(SPLITS[name]), count)))
    return folder


def write_encoder(path: Path) -> Path:
    """A pretraining checkpoint of a small grayscale autoencoder, as the demo's is one."""
    torch.manual_seed(0)
    args = dict(
        model="convmae_convvit_tiny_patch16", input_size=[32, 32], patch_size=[2, 2, 1], in_chans=1
    )
    args |= {"mean": [STATS[0]], "std": [STATS[1]]}
    model = convmae_convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 1), in_chans=1, **ENCODER)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 3}, path)
    return path


def overrides(folder: Path, output: Path, *more: str) -> list[str]:
    """The demo's recipe made smaller: three iterations of two scenes, seen half as large."""
    return [
        f"data.train.json={folder}/train.json",
        f"data.train.images={folder}/train",
        f"data.val.json={folder}/val.json",
        f"data.val.images={folder}/val",
        f"train.output_dir={output}",
        "train.init_checkpoint=''",
        "data.image_size=64",
        "model.backbone.bottom_up.embed_dim=[16,24,32]",
        "model.backbone.bottom_up.depth=[1,1,2]",
        "model.backbone.bottom_up.global_blocks=[1]",
        "dataloader.train.total_batch_size=2",
        "train.base_batch_size=2",
        "train.epochs=1",
        "train.warmup_epochs=0.4",
        "train.log_period=1",
        *more,
    ]


def arguments(settings: list[str], *, resume="none", eval_only=False) -> argparse.Namespace:
    """What `DET.engine.run` takes, for the CPU."""
    return argparse.Namespace(
        config_file=CONFIG, overrides=settings, resume=resume, eval_only=eval_only, num_gpus=0
    )


def change_json(path: Path, change) -> None:
    """Change the content of a json file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def save_normalised(path: str) -> None:
    """In each of two processes: the heads' norm on bfloat16 features, of which one has none."""
    from detectron2.layers import get_norm

    from DET.rcnn import norms_in_float32

    norm = get_norm("naiveSyncBN_N", 8).train()
    norms_in_float32(norm)
    objects = 0 if dist.get_rank() else 4
    x = (torch.randn(objects, 8, 7, 7) * 0.05 + 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    if objects:
        torch.save([x, y.detach()], path)
