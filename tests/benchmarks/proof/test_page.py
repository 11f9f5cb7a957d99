import pytest

from benchmarks.proof.page import (
    accuracy_table,
    claims_table,
    difference,
    verdict,
)


def results(**accuracies):
    """Of each arm the accuracies of its seeds, by one measure."""
    return {
        arm: {
            seed: {
                "pretrain": {"epochs": 5, "seconds_an_epoch": 2.0},
                "probe": {"regression_last": accuracy},
            }
            for seed, accuracy in enumerate(seeds)
        }
        for arm, seeds in accuracies.items()
    }


def test_accuracies_stand_with_mean_and_standard_deviation():
    row = accuracy_table(results(convmae=[50.0, 52.0, 54.0]), []).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("ConvMAE", "3", "5", "–", "–", "52.0 ± 2.0", "–", "2.0 ± 0.0")
    ]


def test_a_difference_is_paired_by_seed():
    found = results(convmae=[50.0, 60.0, 70.0], mae=[49.0, 58.0, 67.0, 1.0])
    change, error = difference(found, "convmae", "mae", "regression_last", tests=10**9)
    assert change == pytest.approx(2)
    assert error == pytest.approx(1 / 3**0.5)


def test_the_error_of_one_seed_is_that_of_the_test_pictures():
    found = results(convmae=[50.0], mae=[50.0])
    error = difference(found, "convmae", "mae", "regression_last", tests=5000)[1]
    assert error == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change, words",
    [(2.1, "**as the paper**"), (1.9, "no difference"), (-2.1, "**the other way**")],
)
def test_a_difference_counts_beyond_two_errors(change, words):
    assert verdict(change, 1.0) == words


def test_only_what_has_both_arms_is_compared():
    table = claims_table(results(convmae=[50.0], random=[30.0]), [], tests=1000)
    assert len(table.splitlines()) == 3
    assert "+20.0 ± 2.1: **as the paper**" in table
