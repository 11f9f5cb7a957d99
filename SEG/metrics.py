"""The mean over classes is a number only where each class has a pixel to be judged by."""

import logging
import warnings

import numpy as np
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from util.data.classes import some


@METRICS.register_module()
class WholeIoUMetric(IoUMetric):
    """MMSegmentation's IoUMetric, without means over the classes that happen to be there.

    Where a class has no pixel in the masks, the means over classes (mIoU, mAcc, …) are NaN, which
    chooses no best checkpoint; a line names the classes and says the mean over the others.
    """

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """The metrics in percent, from the areas of each image."""
        with warnings.catch_warnings():  # numpy's on a mean over nothing
            warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
            metrics = super().compute_metrics(results)
        if not metrics:  # results are only written
            return metrics
        names = self.dataset_meta["classes"]
        intersect, union, _, truth = (sum(areas) for areas in zip(*results, strict=True))
        there = truth > 0
        if there.all():
            return metrics
        absent = [name for name, seen in zip(names, there, strict=True) if not seen]
        line = (
            f"mIoU is not defined: {len(absent)} of {len(names)} classes have no pixel in these "
            f"masks ({some(absent, 20)})"
        )
        if there.sum() > 1:
            mean = (intersect[there] / union[there]).mean().item() * 100
            line += f"; the mean over the other {int(there.sum())} is {mean:.2f}"
        print_log(line, logger="current", level=logging.WARNING)
        return {name: v if name == "aAcc" else np.nan for name, v in metrics.items()}
