import pytest

from DET.schedule import Schedule


def test_the_line_says_epochs_iterations_batch_and_images():
    expected = "25 epochs = 92,188 iterations of 32 images on 118,000"
    assert str(Schedule(25, 118_000, 32)) == expected


@pytest.mark.parametrize(
    ("epochs", "batch_size", "iterations"),
    [(100, 32, 368_750), (50, 32, 184_375), (25, 16, 184_375), (25, 64, 46_094), (0.5, 32, 1844)],
)
def test_iterations_follow_from_epochs_images_and_batch(epochs, batch_size, iterations):
    assert Schedule(epochs, 118_000, batch_size).iterations == iterations


def test_a_run_on_few_images_has_one_iteration_at_least():
    schedule = Schedule(epochs=1, images=3, batch_size=32)
    assert schedule.iterations == 1 and schedule.iterations_of(0.001) == 1
