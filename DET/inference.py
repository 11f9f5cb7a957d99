"""A trained detector on single images: what it finds, and a picture of it."""

from collections.abc import Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from omegaconf import DictConfig

from DET.checkpoint import fit_heads, normalize_as
from DET.config import build
from util.weights.load import load_weights
from util.weights.read import Weights

# Smaller pictures are enlarged to so many pixels, so that a person can read the labels.
SHORT_SIDE = 480


class Predictor:
    """A detector that takes images of any size as they are.

    Args:
        cfg: the detector's configuration; its heads are made as the weights have them.
        weights: a detector's.
        device: where it runs.
        threshold: lowest score of what counts as found.

    Raises:
        UsageError: weights of another architecture.
    """

    def __init__(
        self, cfg: DictConfig, weights: Weights, device: torch.device, threshold: float
    ) -> None:
        fit_heads(cfg.model, weights)
        cfg.model.roi_heads.box_predictor.test_score_thresh = threshold
        self.model = build(cfg.model, "model").to(device).eval()
        lines = str(load_weights(self.model, weights)), normalize_as(self.model, weights)
        self.report = "\n".join(filter(None, lines))
        self.classes = class_names(weights)
        self.image_format = cfg.model.input_format
        self.augmentations = T.AugmentationList(
            build(cfg.dataloader.test.mapper.augmentations, "dataloader.test.mapper.augmentations")
        )

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detections in an image `[H, W, C]`, uint8: boxes, scores, classes and masks."""
        sample = T.AugInput(image)
        self.augmentations(sample)
        pixels = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        height, width = image.shape[:2]
        (output,) = self.model([{"image": pixels, "height": height, "width": width}])
        return output["instances"].to("cpu")


def class_names(weights: Weights) -> list[str]:
    """The names in the file; COCO's for its 80 classes, else numbers."""
    if weights.classes:
        return weights.classes
    coco = MetadataCatalog.get("coco_2017_val").thing_classes
    return coco if weights.num_classes == len(coco) else list(map(str, range(weights.num_classes)))


def draw(image: np.ndarray, found: Instances, classes: Sequence[str]) -> np.ndarray:
    """A picture `[H', W', 3]`, uint8, of an image `[H, W, C]` with what was found in it."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    scale = max(1.0, SHORT_SIDE / min(image.shape[:2]))
    canvas = Visualizer(image, Metadata().set(thing_classes=list(classes)), scale=scale)
    return canvas.draw_instance_predictions(found).get_image()
