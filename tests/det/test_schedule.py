import pytest

from DET.schedule import Schedule


def test_the_line_says_epochs_iterations_batch_and_images():
    assert str(Schedule(25, 500, 8)) == "25 epochs = 1,562 iterations of 8 images on 500"


def test_coco_counts_as_the_118_000_images_of_the_original_recipes():
    expected = "25 epochs = 92,187 iterations of 32 images on 118,287, counted as 118,000"
    assert str(Schedule(25, 118_287, 32)).startswith(expected)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "iterations"),
    [(100, 32, 368_750), (50, 32, 184_375), (25, 16, 184_375), (25, 64, 46_093), (0.5, 32, 1843)],
)
def test_iterations_follow_from_epochs_images_and_batch(epochs, batch_size, iterations):
    assert Schedule(epochs, 118_000, batch_size).iterations == iterations


def test_a_share_of_an_epoch_is_not_lost_to_rounding():
    assert Schedule(0.7, 10, 1).iterations == 7 and Schedule(0.29, 100, 1).iterations == 29


def test_a_run_on_few_images_has_one_iteration_at_least():
    schedule = Schedule(epochs=1, images=3, batch_size=32)
    assert schedule.iterations == 1 and schedule.iterations_of(0.001) == 1
