"""From the loader to the device: copies beside the computation, and how long it waits for data."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from util.data.transforms import Stats, normalize
from util.run.distributed import all_reduce_max


class DeviceFeed:
    """Brings batches to a device, images normalised there, and measures the waiting.

    On CUDA the copies run in a stream of their own, beside the steps that are still queued, and
    what counts as waiting is the time in which the device has nothing to do: the process itself
    is ahead of it and may wait for the loader as it likes. Elsewhere it is the time until the next
    batch is there.

    Args:
        device: where the model is.
        stats: by which 8-bit images are normalised; ImageNet's by default.
    """

    def __init__(self, device: torch.device, stats: Stats | None = None) -> None:
        self.device, self.stats = device, stats
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waited = 0.0
        # Events around each wait that the device has not reached yet.
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self, batches: Iterable[Sequence]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of each batch on the device; 8-bit images become the model's input."""
        batches = iter(batches)
        fetch = self._fetch if self.stream is None else self._fetch_beside
        while (batch := fetch(batches)) is not None:
            yield tuple(normalize(x, 1, self.stats) for x in batch)

    def waited(self) -> float:
        """Seconds of waiting since the last call, as far as the device has come."""
        while self._queued and self._queued[0][1].query():
            idle, ready = self._queued.popleft()
            self._waited += idle.elapsed_time(ready) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def _fetch(self, batches: Iterator[Sequence]) -> list[Tensor] | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self._waited += time.perf_counter() - start
        return batch and [x.to(self.device, non_blocking=True) for x in batch]

    def _fetch_beside(self, batches: Iterator[Sequence]) -> list[Tensor] | None:
        compute = torch.cuda.current_stream(self.device)
        idle, ready = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        idle.record(compute)  # reached when all steps so far are done
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(self.stream):
            copies = [x.to(self.device, non_blocking=True) for x in batch]
        compute.wait_stream(self.stream)
        for copy in copies:
            copy.record_stream(compute)  # else its memory could be used again too early
        ready.record(compute)
        self._queued.append((idle, ready))
        return copies


class Pace:
    """Speed of an epoch: images/s, and the share of time spent waiting for data.

    Of several processes the one that waits most counts, as the others wait for it.

    Args:
        feed: of this process's batches.
        step: steps of the epoch that are done already.
        batch_size: images of a step, over all processes.
    """

    def __init__(self, feed: DeviceFeed, step: int, batch_size: int) -> None:
        self.feed = feed
        self.batch_size = batch_size
        self.start = self.last = (time.perf_counter(), step)
        self.waited = 0.0
        self.settled: tuple[float, float] | None = None  # time and waiting at the first reading
        feed.waited()  # forget what was before

    def read(self, step: int) -> dict[str, float]:
        """Numbers since the last call: "images_per_s" and "data_wait" (a collective)."""
        now, waited = time.perf_counter(), self._most(self.feed.waited())
        seconds, steps = now - self.last[0], step - self.last[1]
        self.last = (now, step)
        self.waited += waited
        self.settled = self.settled or (now, self.waited)
        return {"images_per_s": steps * self.batch_size / seconds, "data_wait": waited / seconds}

    @property
    def data_wait(self) -> float:
        """The share of waiting in all the time that `read` has covered."""
        seconds = self.last[0] - self.start[0]
        return self.waited / seconds if seconds else 0.0

    def settled_wait(self) -> tuple[float, float]:
        """The share of waiting since the first reading, and the seconds since then."""
        since, waited = self.settled
        seconds = self.last[0] - since
        return ((self.waited - waited) / seconds if seconds else 0.0), seconds

    def _most(self, seconds: float) -> float:
        value = torch.tensor(seconds, device=self.feed.device)
        return all_reduce_max(value).item()
