import contextlib
import io
import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs Detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from DET.evaluation import Evaluator

SIZE = 60


def polygon(box):
    left, top, width, height = box
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def truth(boxes):
    """A data set of one image with objects of one class; all have masks."""
    annotations = [
        dict(id=i, image_id=1, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=0,
             segmentation=polygon(box))
        for i, box in enumerate(boxes, start=1)
    ]  # fmt: skip
    return dict(
        info={},
        images=[dict(id=1, file_name="x.png", height=SIZE, width=SIZE)],
        annotations=annotations,
        categories=[dict(id=1, name="thing")],
    )


def found(boxes):
    """Detections of those boxes, their masks filling them, the first with the highest score."""
    instances = Instances((SIZE, SIZE))
    corners = torch.tensor(boxes, dtype=torch.float32)
    corners[:, 2:] += corners[:, :2]
    instances.pred_boxes = Boxes(corners)
    instances.scores = torch.linspace(0.9, 0.5, len(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    instances.pred_masks = masks
    return instances


@pytest.fixture
def judge(tmp_path):
    def judged(content, detections, evaluator=Evaluator):
        path = tmp_path / "truth.json"
        path.write_text(json.dumps(content))
        for catalog in (DatasetCatalog, MetadataCatalog):
            if "judged" in catalog.list():
                catalog.remove("judged")
        register_coco_instances("judged", {}, str(path), str(tmp_path))
        DatasetCatalog.get("judged")
        judge = evaluator("judged", use_fast_impl=False)
        judge.reset()
        judge.process([{"image_id": 1}], [{"instances": detections}])
        return judge.evaluate()

    return judged


BOXES = [[4, 4, 20, 20], [30, 8, 20, 24], [10, 34, 16, 16]]
GUESSES = [[5, 5, 20, 20], [0, 50, 8, 8], [30, 8, 20, 20], [40, 40, 10, 10], [10, 34, 16, 16]]


def test_with_a_mask_everywhere_the_numbers_are_detectron2s(judge):
    ours = judge(truth(BOXES), found(GUESSES))
    theirs = judge(truth(BOXES), found(GUESSES), COCOEvaluator)
    for task in ("bbox", "segm"):
        np.testing.assert_equal(ours[task], theirs[task])
        assert 0 < ours[task]["AP"] < 100


def test_an_object_without_a_mask_counts_for_boxes_as_any_other(judge):
    content = truth(BOXES)
    with_masks = judge(content, found(GUESSES))
    del content["annotations"][1]["segmentation"]
    assert judge(content, found(GUESSES))["bbox"] == pytest.approx(with_masks["bbox"], nan_ok=True)


def test_masks_in_the_box_of_such_an_object_are_not_judged(judge):
    """As pycocotools counts where the object is a crowd."""
    content = truth(BOXES)
    crowd = truth(BOXES)
    crowd["annotations"][1]["iscrowd"] = 1
    del content["annotations"][1]["segmentation"]
    ours = judge(content, found(GUESSES))["segm"]
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = crowd
        api.createIndex()
        instances = found(GUESSES)
        from_masks = [
            dict(image_id=1, category_id=1, score=float(s), segmentation=encoded(m))
            for s, m in zip(instances.scores, instances.pred_masks, strict=True)
        ]
        evaluation = COCOeval(api, api.loadRes(from_masks), "segm")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert ours["AP"] == pytest.approx(100 * evaluation.stats[0])
    assert ours["AP"] != pytest.approx(judge(truth(BOXES), found(GUESSES))["segm"]["AP"])


def encoded(mask):
    import pycocotools.mask as coco

    rle = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {**rle, "counts": rle["counts"].decode()}
