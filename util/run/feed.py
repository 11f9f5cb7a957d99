"""From the loader to the device: copies beside the computation, and how long it waits for data."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from util.data.transforms import Stats, normalize
from util.run.distributed import all_reduce_max


class Stopwatch:
    """The time that a device spends within `with` blocks; nothing waits for it.

    On CUDA it is what lies between two events in the device's queue; elsewhere the time of this
    process.

    Args:
        device: what to measure.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        # Events around each block that the device has not reached yet.
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if self.device.type == "cuda":
            self._queued.append((self._begin, end))
        else:
            self.seconds += end - self._begin

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self) -> float:
        """Seconds since the last call, as far as the device has come."""
        while self._queued and self._queued[0][1].query():
            begin, end = self._queued.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
        seconds, self.seconds = self.seconds, 0.0
        return seconds


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
        self.waiting = Stopwatch(device)

    def __call__(self, batches: Iterable[Sequence]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of each batch on the device; 8-bit images become the model's input."""
        batches = iter(batches)
        fetch = self._fetch if self.stream is None else self._fetch_beside
        while (batch := fetch(batches)) is not None:
            yield tuple(normalize(x, 1, self.stats) for x in batch)

    def waited(self) -> float:
        """Seconds of waiting since the last call, as far as the device has come."""
        return self.waiting.read()

    def _fetch(self, batches: Iterator[Sequence]) -> list[Tensor] | None:
        with self.waiting:
            batch = next(batches, None)
        return batch and [x.to(self.device, non_blocking=True) for x in batch]

    def _fetch_beside(self, batches: Iterator[Sequence]) -> list[Tensor] | None:
        compute = torch.cuda.current_stream(self.device)
        with self.waiting:
            batch = next(batches, None)
            if batch is None:
                return None
            with torch.cuda.stream(self.stream):
                copies = [x.to(self.device, non_blocking=True) for x in batch]
            compute.wait_stream(self.stream)
            for copy in copies:
                copy.record_stream(compute)  # else its memory could be used again too early
        return copies


class Pace:
    """Speed of an epoch: images/s, the share of time spent waiting for data, and what parts take.

    Of several processes the one that waits most counts, as the others wait for it.

    Args:
        feed: of this process's batches.
        step: steps of the epoch that are done already.
        batch_size: images of a step, over all processes.
        watches: of parts of the steps, by the names of what they measure.
    """

    def __init__(
        self,
        feed: DeviceFeed,
        step: int,
        batch_size: int,
        watches: Mapping[str, Stopwatch] | None = None,
    ) -> None:
        self.feed = feed
        self.batch_size = batch_size
        self.watches = watches or {}
        self.taken = dict.fromkeys(self.watches, 0.0)
        self.start = self.last = (time.perf_counter(), step)
        self.waited = 0.0
        self.settled: tuple[float, float] | None = None  # time and waiting at the first reading
        feed.waited()  # forget what was before

    def read(self, step: int) -> dict[str, float]:
        """Numbers since the last call (a collective).

        They are "images_per_s", "data_wait", and the seconds a step of each watch.
        """
        now, waited = time.perf_counter(), self._most(self.feed.waited())
        seconds, steps = now - self.last[0], step - self.last[1]
        self.last = (now, step)
        self.waited += waited
        self.settled = self.settled or (now, self.waited)
        taken = {name: self._most(watch.read()) for name, watch in self.watches.items()}
        for name, part in taken.items():
            self.taken[name] += part
        speed = {"images_per_s": steps * self.batch_size / seconds, "data_wait": waited / seconds}
        return speed | {name: part / steps for name, part in taken.items()}

    @property
    def data_wait(self) -> float:
        """The share of waiting in all the time that `read` has covered."""
        seconds = self.last[0] - self.start[0]
        return self.waited / seconds if seconds else 0.0

    def seconds_a_step(self) -> dict[str, float]:
        """The means of the watches over all the steps that `read` has covered."""
        steps = self.last[1] - self.start[1]
        return {name: part / steps if steps else 0.0 for name, part in self.taken.items()}

    def settled_wait(self) -> tuple[float, float]:
        """The share of waiting since the first reading, and the seconds since then."""
        since, waited = self.settled
        seconds = self.last[0] - since
        return ((self.waited - waited) / seconds if seconds else 0.0), seconds

    def _most(self, seconds: float) -> float:
        value = torch.tensor(seconds, device=self.feed.device)
        return all_reduce_max(value).item()
