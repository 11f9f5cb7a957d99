"""Object detection and instance segmentation with ConvViT backbones, on Detectron2."""
