"""Data sets of a run: any COCO-format json and image folder, registered with Detectron2."""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import detectron2.data.detection_utils as utils
import detectron2.data.transforms as T
import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Instances
from omegaconf import DictConfig
from PIL import Image

from DET.checkpoint import boxes_only
from DET.coco import Coco, read_coco
from DET.settings import CHANNELS
from util.atomic import write_atomically
from util.data.files import open_regular, reason_of, retried
from util.data.images import load_image, open_image, orientation
from util.errors import TrainingError, UsageError
from util.run.distributed import gather_objects, is_main_process, rank

logger = logging.getLogger("DET")
Found = TypeVar("Found")

# How a picture turned upright is turned back to how it is stored, by its EXIF orientation.
_TURN_BACK = {
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@dataclass(frozen=True)
class Split:
    """Properties of a registered data set that the model depends on.

    Attributes:
        json: the annotation file that was registered, without what is broken.
        source: the one that was given.
        images: how many it has, those without objects included.
        classes: names, in the order of the model's outputs.
        has_masks: whether there are masks to learn.
        has_bitmaps: whether some masks are no polygons.
    """

    json: str
    source: str
    images: int
    classes: list[str]
    has_masks: bool
    has_bitmaps: bool


def register(name: str, files: Mapping, folder: Path) -> Split:
    """Check an annotation file, say what is skipped, and register the rest.

    All processes call this together; one of each machine reads and tells the others there.

    Args:
        name: of the data set in Detectron2's catalogs; an older one of that name is replaced.
        files: `json`, the annotation file, and `images`, the folder of its images.
        folder: where the sound part is written if something is broken.

    Raises:
        UsageError: a file that is missing or not in COCO's format, nothing sound in it, images to
            evaluate on that cannot be, or other data on another machine.
    """
    found = None
    if comm.get_local_rank() == 0:
        try:
            found = _read_split(name, files, folder)
        except UsageError as error:
            found = error
    everywhere = gather_objects(found)
    splits = [split for split in everywhere if split is not None]
    for error in splits:
        if isinstance(error, UsageError):
            raise error if is_main_process() else SystemExit(2)  # said once
    if any(replace(split, json="") != replace(splits[0], json="") for split in splits):
        raise UsageError(
            f"{files['json']} and its images are not the same on all machines: "
            f"{', '.join(f'{split.images:,} images' for split in splits)}"
        )
    split = everywhere[rank() - comm.get_local_rank()]
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, split.json, files["images"])
    return split


def _read_split(name: str, files: Mapping, folder: Path) -> Split:
    """Read a data set in one process of a machine."""
    coco = read_coco(files["json"], files["images"])
    if is_main_process():
        (logger.warning if coco.warnings else logger.info)("%s: %s", name, coco)
    if name == "val":
        _check_readable(coco, Path(files["images"]))
    path = coco.path
    if coco.changed:
        # Machines may share the folder or not: each writes and reads its own.
        machine = rank() // comm.get_local_size()
        path = folder / (f"{name}-{machine}.json" if machine else f"{name}.json")
        content = json.dumps(coco.content).encode()
        write_atomically(path, lambda file: file.write(content))
    images = len(coco.content["images"])
    return Split(str(path), str(coco.path), images, coco.classes, coco.has_masks, coco.has_bitmaps)


def _check_readable(coco: Coco, folder: Path) -> None:
    """Find before training what evaluation would fail on: files that are not as the json says."""
    faults = []
    for image in coco.content["images"]:
        path = folder / image["file_name"]
        size = (image["width"], image["height"])
        try:
            found = _header(path, lambda picture: picture.size)
        except TrainingError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything
            why = reason_of(error, path) if isinstance(error, OSError) else error
            faults.append(f"{path} cannot be read: {' '.join(str(why).split())}")
            continue
        if size not in (found, found[::-1]):
            faults.append(f"{path} has {found[0]}x{found[1]} pixels, not {size[0]}x{size[1]}")
    if faults:
        raise UsageError(
            f"cannot evaluate on {len(faults):,} of the images of {coco.path}: {faults[0]}"
            f"{', …' * (len(faults) > 1)}; mend them or take them out of the json"
        )


def prepare_data(cfg: DictConfig, training: bool) -> Split:
    """Register the data sets of a configuration and fit it to them: classes, masks, evaluation.

    Returns:
        The data set to train on, or to evaluate on if this is no training.

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
    return splits[0]


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

    A picture whose size in the json is the one that is stored, before it is turned upright, is
    read as it is stored: so are its annotations.

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
            if image.shape[:2] == (record["width"], record["height"]):
                image = _as_stored(image, record["file_name"])
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
        annotations = record.pop("annotations", [])
        if self.is_train:
            record["instances"] = self._instances(annotations, transforms, image.shape[:2])
        return record

    def _instances(
        self, annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        """The single objects of an augmented image of `size` (height, width).

        If masks are learnt, `gt_has_mask` says which objects have one; for the others the box
        stands in.
        """
        annotations = [a for a in annotations if not a["iscrowd"]]
        has_mask = torch.tensor(["segmentation" in a for a in annotations], dtype=torch.bool)
        for annotation in annotations:
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            elif "segmentation" not in annotation:
                left, top, width, height = annotation["bbox"]
                right, bottom = left + width, top + height
                corners = [left, top, right, top, right, bottom, left, bottom]
                annotation["segmentation"] = [corners]
            annotation.pop("keypoints", None)
        annotations = [
            utils.transform_instance_annotations(a, transforms, size) for a in annotations
        ]
        instances = utils.annotations_to_instances(annotations, size, self.instance_mask_format)
        if self.use_instance_mask and annotations:
            instances.gt_has_mask = has_mask
            if self.recompute_boxes:  # a crop can make an object's box smaller
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return utils.filter_empty_instances(instances)


def _header(path: str | Path, look: Callable[[Image.Image], Found]) -> Found:
    """The findings of `look` in an image file's header, which alone is decoded.

    Raises:
        OSError: no sound file of an image.
        TrainingError: the storage fails.
    """

    def once() -> Found:
        with open_regular(path) as file, open_image(file) as picture:
            return look(picture)

    return retried(once, path)


def _as_stored(image: np.ndarray, path: str) -> np.ndarray:
    """An upright picture `[H, W, C]` as its file stores it, if that is turned by a quarter."""
    turn = _TURN_BACK.get(_header(path, orientation))
    return turn(image) if turn else image


def read_array(path: str | Path, image_format: str) -> np.ndarray:
    """An image file as `[H, W, C]`, uint8, in the format `L` or `RGB`.

    Raises:
        OSError: a file that cannot be decoded.
    """
    image = np.array(load_image(path, CHANNELS[image_format]))
    return image if image.ndim == 3 else image[..., None]
