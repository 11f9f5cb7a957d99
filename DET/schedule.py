"""Epochs to iterations: how long a run is depends on the images and on the batch."""

import math
from dataclasses import dataclass

# COCO's train2017 has 118,287 images; the originals' recipes take them for 118,000.
COUNTED_AS = {118_287: 118_000}


@dataclass(frozen=True)
class Schedule:
    """The length of a run.

    Attributes:
        epochs: passes over the images.
        images: how many there are, those without objects included.
        batch_size: images of one step, over all GPUs and micro-batches.
    """

    epochs: float
    images: int
    batch_size: int

    @property
    def iterations(self) -> int:
        """Steps of the run."""
        return self.iterations_of(self.epochs)

    def iterations_of(self, epochs: float) -> int:
        """The whole steps that so many epochs take, one at least."""
        images = epochs * COUNTED_AS.get(self.images, self.images)
        return max(1, math.floor(round(images / self.batch_size, 6)))

    def __str__(self) -> str:
        counted = COUNTED_AS.get(self.images)
        return (
            f"{self.epochs:g} epochs = {self.iterations:,} iterations of {self.batch_size:,} "
            f"images on {self.images:,}"
            f"{f', counted as {counted:,} as in the original recipes' if counted else ''}"
        )
