"""COCO's evaluation where some objects have no mask."""

import contextlib
import io

from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO


class Evaluator(COCOEvaluator):
    """Detectron2's evaluator; objects without a mask count for boxes alone.

    Args:
        dataset_name: of a registered data set in COCO's format.
        tasks: "bbox", "segm"; None for what the detector predicts.
        max_dets_per_image: how many detections of an image count, the best ones; None for COCO's
            100.
        use_fast_impl: Detectron2's compiled evaluation, if it is there.
        **options: further arguments of `COCOEvaluator`.

    Raises:
        ValueError: another task, or no number of detections.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: list[str] | None = None,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        **options,
    ) -> None:
        if not {*(tasks or ())} <= {"bbox", "segm"}:
            raise ValueError(f"tasks {tasks} must be bbox, segm or both")
        if max_dets_per_image is not None and not (
            type(max_dets_per_image) is int and max_dets_per_image > 0
        ):
            raise ValueError(f"max_dets_per_image {max_dets_per_image} must be a whole number")
        options |= {"max_dets_per_image": max_dets_per_image, "use_fast_impl": use_fast_impl}
        super().__init__(dataset_name, tasks, **options)
        self._coco_api = Truth(self._coco_api.dataset)


class Truth(COCO):
    """Annotations, in which the box of an object without a mask is a region that masks may fill.

    COCO does not judge what is predicted in such a region. Boxes are judged before masks, so
    that an object is one for them.
    """

    def __init__(self, dataset: dict) -> None:
        super().__init__()
        self.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()

    def annToRLE(self, ann: dict) -> dict:
        """The mask of an annotation, run-length encoded."""
        if not ann.get("segmentation"):
            left, top, width, height = ann["bbox"]
            right, bottom = left + width, top + height
            ann["iscrowd"] = 1
            ann["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        return super().annToRLE(ann)
