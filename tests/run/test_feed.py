import time

import pytest
import torch

from util.data.transforms import normalize
from util.run.feed import DeviceFeed, Pace

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def slow(batches, seconds: float):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_pictures_become_the_model_s_input_and_labels_stay():
    labels, floats = torch.tensor([3, 1]), torch.rand(2, 3, 4, 4)
    [(images, same_labels)] = DeviceFeed(CPU)([(PIXELS, labels)])
    assert torch.equal(images, normalize(PIXELS)) and torch.equal(same_labels, labels)
    [(same_floats,)] = DeviceFeed(CPU)([(floats,)])
    assert torch.equal(same_floats, floats)


def test_own_statistics_take_the_place_of_imagenets():
    [(images,)] = DeviceFeed(CPU, ((0.0, 0.5, 1.0), (1.0, 0.5, 0.25)))([(PIXELS,)])
    expected = torch.stack([PIXELS[:, i] / 255 * (1, 2, 4)[i] - (0, 1, 4)[i] for i in range(3)], 1)
    torch.testing.assert_close(images, expected)


def test_batches_come_in_order_and_none_is_lost():
    batches = [(torch.tensor([i]),) for i in range(5)]
    assert [value.item() for (value,) in DeviceFeed(CPU)(batches)] == [0, 1, 2, 3, 4]


def test_waiting_for_the_loader_counts_and_the_step_does_not():
    feed = DeviceFeed(CPU)
    for _ in feed(slow([(PIXELS,)] * 3, 0.05)):
        time.sleep(0.2)
    assert 0.15 <= feed.waited() < 0.55
    assert feed.waited() == 0


def test_pace_gives_images_a_second_and_the_share_of_waiting(monkeypatch):
    feed, now = DeviceFeed(CPU), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace(feed, 4, batch_size=8)
    now[0], feed.waiting.seconds = 110.0, 2.0
    assert pace.read(9) == {"images_per_s": 4.0, "data_wait": pytest.approx(0.2)}
    now[0], feed.waiting.seconds = 115.0, 4.0
    assert pace.read(10) == {"images_per_s": 1.6, "data_wait": pytest.approx(0.8)}
    assert pace.data_wait == pytest.approx(6 / 15)


def test_pace_forgets_what_was_before_it():
    feed = DeviceFeed(CPU)
    list(feed(slow([(PIXELS,)], 0.05)))
    pace = Pace(feed, 0, batch_size=1)
    time.sleep(0.01)
    assert pace.read(1)["data_wait"] == 0


@needs_cuda
def test_on_a_gpu_batches_are_those_of_the_cpu():
    device = torch.device("cuda", 0)
    batches = [(torch.full((2, 3, 8, 8), i, dtype=torch.uint8).pin_memory(),) for i in range(20)]
    for (got,), (expected,) in zip(
        DeviceFeed(device)(batches), DeviceFeed(CPU)(batches), strict=True
    ):
        torch.testing.assert_close(got.cpu(), expected)


@needs_cuda
def test_on_a_gpu_only_the_time_without_work_counts():
    feed, work = DeviceFeed(torch.device("cuda", 0)), torch.rand(4096, 4096, device="cuda")
    for _ in feed(slow([(PIXELS,)] * 4, 0.02)):
        for _ in range(200):  # far more than the loader takes
            work @ work
    torch.cuda.synchronize()
    assert feed.waited() < 0.06  # the first batch alone
    for _ in feed(slow([(PIXELS,)] * 4, 0.05)):
        pass
    torch.cuda.synchronize()
    assert feed.waited() > 0.15
