"""One measured training step of a detector, for `benchmarks.det_memory`; needs Detectron2."""

import argparse
import time
from statistics import median

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from DET.config import load_config
from util.run.logger import peak_memory_mb
from util.run.optim_step import OptimStep

OUT_OF_MEMORY = "out of memory"
OBJECTS = 8  # in an image: COCO's has about seven


def random_batch(cfg: DictConfig, batch_size: int, rng: np.random.Generator) -> list[dict]:
    """Square images of noise, with rectangles for objects."""
    side, channels = cfg.data.image_size, len(cfg.model.pixel_mean)
    batch = []
    for _ in range(batch_size):
        corner = rng.uniform(0, 0.7 * side, (OBJECTS, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.3, (OBJECTS, 2)) * side], 1)
        objects = Instances((side, side))
        objects.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        objects.gt_classes = torch.from_numpy(
            rng.integers(0, cfg.model.roi_heads.num_classes, OBJECTS)
        )
        objects.gt_masks = PolygonMasks([[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes])
        pixels = rng.integers(0, 256, (channels, side, side), np.uint8)
        batch.append({"image": torch.from_numpy(pixels), "instances": objects})
    return batch


def load(args: argparse.Namespace, checkpointing: bool) -> DictConfig:
    """The recipe at the wanted size."""
    size = [f"data.image_size={args.image_size}"] if args.image_size else []
    cfg = load_config(args.config_file, size)
    encoder = "bottom_up" if "bottom_up" in cfg.model.backbone else "net"
    cfg.model.backbone[encoder].use_act_checkpoint = checkpointing
    return cfg


def measure(args: argparse.Namespace, batch_size: int, checkpointing: bool) -> dict | str:
    """Peak memory in MiB and median seconds per image. For a fresh process only.

    On CUDA it is what torch allocates, on a CPU resident memory with all that Python takes.
    """
    device = torch.device(args.device)
    if args.limit_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit_gb * 2**30 / total))
    cfg = load(args, checkpointing)
    seconds = []
    try:
        model = instantiate(cfg.model).to(device).train()
        cfg.optimizer.params.model = model
        step = OptimStep(model, instantiate(cfg.optimizer), device, args.dtype)
        batch = random_batch(cfg, batch_size, np.random.default_rng(0))
        for _ in range(1 + args.steps):
            start = time.perf_counter()
            with EventStorage():
                step.begin([batch], 1)
                for images in step.micro_batches:
                    with step.autocast():
                        losses = model(images)
                    step.backward(sum(losses.values()))
            step.update().loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return OUT_OF_MEMORY
    return {"mib": peak_memory_mb(device), "seconds": median(seconds[1:]) / batch_size}
