"""Semantic segmentation: ConvMAE in MMSegmentation. Importing this registers its parts there."""

import contextlib
import warnings

from util.errors import require_for_programs

require_for_programs("mmseg", "requirements-seg.txt", runs=["SEG.train"])

# mmcv and mmseg complain, as they are imported, about compiled operators and a data service that
# nothing here uses; later, about a setting of the loss that is the recipe's.
warnings.filterwarnings("ignore", "Fail to import ``MultiScaleDeformableAttention``")
warnings.filterwarnings("ignore", "Default ``avg_non_ignore`` is False")
with contextlib.redirect_stdout(None):
    import mmseg.datasets
    import mmseg.models  # noqa: F401

from SEG import backbone, data, hooks, layer_decay, metrics, resume, stop  # noqa: E402

__all__ = ["backbone", "data", "hooks", "layer_decay", "metrics", "resume", "stop"]
