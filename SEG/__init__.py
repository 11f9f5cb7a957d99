"""Semantic segmentation: ConvMAE in MMSegmentation. Importing this registers its parts."""

from SEG import backbone

__all__ = ["backbone"]
