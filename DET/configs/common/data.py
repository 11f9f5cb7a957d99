"""Data paths and loading: COCO with large-scale jitter, in padded squares.

Any other data set: `data.train.json=… data.train.images=… data.val.json=… data.val.images=…`.
"""

import os

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)

from DET.data import Mapper
from DET.evaluation import Evaluator

_root = os.getenv("DETECTRON2_DATASETS", "datasets") + "/coco"

data = dict(
    train=dict(json=f"{_root}/annotations/instances_train2017.json", images=f"{_root}/train2017"),
    # val.json=null: no evaluation
    val=dict(json=f"{_root}/annotations/instances_val2017.json", images=f"{_root}/val2017"),
    image_size=1024,  # side of the square that the model sees, in pixels
    flip=0.5,  # probability that a training image is mirrored; 0 for text
)
# Padding is gray, and comes before the normalisation.
_square = L(T.FixedSizeCrop)(
    crop_size=["${data.image_size}", "${data.image_size}"], pad=True, pad_value=128.0
)

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="train"),
        mapper=L(Mapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeScale)(
                    min_scale=0.1,
                    max_scale=2.0,
                    target_height="${data.image_size}",
                    target_width="${data.image_size}",
                ),
                _square,
                L(T.RandomFlip)(prob="${data.flip}", horizontal=True),
            ],
            image_format="RGB",
            use_instance_mask=True,
            recompute_boxes=True,  # a crop can make an object's box smaller
        ),
        total_batch_size=32,  # images of one step, over all GPUs and micro-batches
        aspect_ratio_grouping=False,  # every crop is a square
        num_workers=8,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="val", filter_empty=False),
        mapper=L(Mapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length="${data.image_size}", max_size="${data.image_size}"
                ),
                _square,
            ],
            image_format="${dataloader.train.mapper.image_format}",
        ),
        num_workers=4,
    ),
    evaluator=L(Evaluator)(dataset_name="val"),
)
