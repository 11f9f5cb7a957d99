"""Mask R-CNN on Detectron2: squares in, objects without masks, norms in float32."""

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor, nn


class SquareRCNN(GeneralizedRCNN):
    """Takes images that are padded to a square, and finds objects in what is not padding."""

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """The objects of each image, in its own `height` and `width` if `do_postprocess`."""
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        return [
            {"instances": unsquare(found, image["height"], image["width"])}
            for found, image in zip(results, batched_inputs, strict=True)
        ]


def unsquare(found: Instances, height: int, width: int) -> Instances:
    """The objects of a square, found in the image at its top left.

    Args:
        found: objects of a square in which the longer side of the image takes the whole side.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The same, scaled by one factor for both axes and cut at the image's borders; what lies in
        the padding alone is left out.
    """
    scale = max(height, width) / max(found.image_size)
    seen = Instances((height / scale, width / scale), **found.get_fields())
    return detector_postprocess(seen, height, width)


class MaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head; it learns nothing from objects whose `gt_has_mask` is false."""

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Losses of features `[objects, C, h, w]` in training, instances with masks else."""
        if self.training:
            known = [_has_mask(i, x.device) for i in instances]
            instances = [i[k] for i, k in zip(instances, known, strict=True)]
            x = x[torch.cat(known)]
        return super().forward(x, instances)


def _has_mask(objects: Instances, device: torch.device) -> Tensor:
    """Objects that have a mask, `[objects]`: all, where nothing says otherwise."""
    if objects.has("gt_has_mask"):
        return objects.gt_has_mask
    return torch.ones(len(objects), dtype=torch.bool, device=device)


def norms_in_float32(model: nn.Module) -> None:
    """Compute `naiveSyncBN` in float32 under autocast.

    Its variance is a difference of means, of which bfloat16 leaves little or makes it negative;
    Detectron2 itself casts float16 alone.
    """
    for module in model.modules():
        if isinstance(module, NaiveSyncBatchNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
