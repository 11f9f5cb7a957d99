"""Data sets of a run: any COCO-format json and image folder, registered with Detectron2."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import detectron2.data.detection_utils as utils
import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig

from DET.checkpoint import boxes_only
from DET.coco import read_coco
from util.atomic import write_atomically
from util.data.images import load_image
from util.errors import TrainingError, UsageError
from util.run.distributed import gather_objects, is_main_process

logger = logging.getLogger("DET")

CHANNELS = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class Split:
    """What a model must know of a registered data set.

    Attributes:
        json: the annotation file that was registered, without what is broken.
        source: the one that was given.
        classes: names, in the order of the model's outputs.
        has_masks: whether there are masks to learn.
        has_bitmaps: whether some masks are no polygons.
    """

    json: str
    source: str
    classes: list[str]
    has_masks: bool
    has_bitmaps: bool


def register(name: str, files: Mapping, folder: Path) -> Split:
    """Check an annotation file, say what is skipped, and register the rest.

    All processes call this together; the main one reads and tells the others.

    Args:
        name: of the data set in Detectron2's catalogs; an older one of that name is replaced.
        files: `json`, the annotation file, and `images`, the folder of its images.
        folder: where the sound part is written if something is broken.

    Raises:
        UsageError: a file that is missing or not in COCO's format, or nothing sound in it.
    """
    split = None
    if is_main_process():
        coco = read_coco(files["json"], files["images"])
        (logger.warning if coco.skipped else logger.info)("%s: %s", name, coco)
        path = coco.path
        if coco.changed:
            path = folder / f"{name}.json"
            content = json.dumps(coco.content).encode()
            write_atomically(path, lambda file: file.write(content))
        split = Split(str(path), str(coco.path), coco.classes, coco.has_masks, coco.has_bitmaps)
    split = gather_objects(split)[0]
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, split.json, files["images"])
    return split


def prepare_data(cfg: DictConfig, training: bool) -> list[str]:
    """Register the data sets of a configuration and fit it to them: classes, masks, evaluation.

    Returns:
        The names of the classes.

    Raises:
        UsageError: files that cannot be used, or that do not go together.
    """
    folder = Path(cfg.train.output_dir)
    splits = [
        register(name, cfg.data[name], folder)
        for name in (("train", "val") if training else ("val",))
        if name == "train" or cfg.data[name].json
    ]
    if not splits:
        raise UsageError("nothing to evaluate on: data.val.json and data.val.images are not given")
    if len(splits) == 2 and splits[0].classes != splits[1].classes:
        raise UsageError(
            f"the classes of {splits[0].source} ({', '.join(splits[0].classes)}) and of "
            f"{splits[1].source} ({', '.join(splits[1].classes)}) differ"
        )
    cfg.model.roi_heads.num_classes = len(splits[0].classes)
    if training:
        _fit_masks(cfg, splits[0])
    if not splits[-1].has_masks:
        cfg.dataloader.evaluator.tasks = ["bbox"]
    return splits[0].classes


def _fit_masks(cfg: DictConfig, train: Split) -> None:
    """Train what the annotations hold: boxes alone if there are no masks."""
    mapper = cfg.dataloader.train.mapper
    if train.has_bitmaps:
        mapper.instance_mask_format = "bitmask"
    if not train.has_masks:
        logger.warning("%s has no masks: training boxes only, without a mask head", train.source)
        boxes_only(cfg.model)
        mapper.use_instance_mask = mapper.recompute_boxes = False


class Mapper(DatasetMapper):
    """Detectron2's mapper, reading any image file as a viewer shows it.

    In training an image that cannot be read, or whose size is not what its annotations are for,
    is named and another one takes its place; in evaluation it is an error.
    """

    def __call__(self, record: dict) -> dict | None:
        """A data set's record to the model's input: `image` `[C, H, W]` and, to train, instances.

        Raises:
            TrainingError: an image to evaluate on that cannot be used.
        """
        record = copy.deepcopy(record)
        try:
            image = read_array(record["file_name"], self.image_format)
            utils.check_image_size(record, image)
        except (OSError, utils.SizeMismatchError) as error:
            reason = " ".join(str(error).split())
            if not self.is_train:
                raise TrainingError(f"cannot evaluate: {reason}") from error
            logger.warning("skipped an image: %s", reason)
            return None
        sample = T.AugInput(image)
        transforms = self.augmentations(sample)
        image = sample.image
        record["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            self._transform_annotations(record, transforms, image.shape[:2])
        else:
            record.pop("annotations", None)
        return record


def read_array(path: str | Path, image_format: str) -> np.ndarray:
    """An image file as `[H, W, C]`, uint8, in the format `L` or `RGB`.

    Raises:
        OSError: a file that cannot be decoded.
    """
    image = np.array(load_image(path, CHANNELS[image_format]))
    return image if image.ndim == 3 else image[..., None]
