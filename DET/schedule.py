"""Epochs to iterations: how long a run is depends on the images and on the batch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The length of a run.

    Attributes:
        epochs: passes over the images.
        images: how many there are to train on.
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
        """The steps that so many epochs take, one at least."""
        return max(1, math.ceil(epochs * self.images / self.batch_size))

    def __str__(self) -> str:
        return (
            f"{self.epochs:g} epochs = {self.iterations:,} iterations of {self.batch_size:,} "
            f"images on {self.images:,}"
        )
