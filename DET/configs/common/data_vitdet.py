"""The data as ViTDet reads them: flipped first, and padded by the model, with the images' mean."""

from .data import data, dataloader

_resize, _crop, _flip = dataloader.train.mapper.augmentations
_crop.pad = False
dataloader.train.mapper.augmentations = [_flip, _resize, _crop]
dataloader.test.mapper.augmentations = dataloader.test.mapper.augmentations[:1]
