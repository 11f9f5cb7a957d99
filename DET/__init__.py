"""Object detection and instance segmentation with ConvViT backbones, on Detectron2."""

import logging
import warnings

# What Detectron2's use of torch makes torch say, and no user can act on.
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
