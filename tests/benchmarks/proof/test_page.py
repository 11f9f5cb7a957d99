import numpy as np
import pytest

from benchmarks.proof.measures import verdict_of
from benchmarks.proof.page import (
    accuracy_table,
    bits,
    claims_table,
    difference,
    headline,
    not_done,
    position_table,
    verdict,
)


def results(measure="regression_last", **pictures):
    """Of each arm what its seeds judge right, 0 or 1 for each picture, by one measure."""
    return {
        arm: {
            seed: {
                "pretrain": {"epochs": 5, "seconds_an_epoch": 2.0, "mflops": 140.2},
                "probe": {measure: verdict_of(np.array(right))},
            }
            for seed, right in enumerate(seeds)
        }
        for arm, seeds in pictures.items()
    }


def change(found):
    """The difference of ConvMAE and the plain MAE, and its error."""
    return difference(found, ("convmae", "regression_last"), ("mae", "regression_last"))


def first(right, pictures=100):
    """Of so many pictures the first ones are right."""
    return [1] * right + [0] * (pictures - right)


def test_accuracies_stand_with_mean_and_standard_deviation():
    found = results(convmae=[first(50), first(52), first(54)])
    row = accuracy_table(found, []).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("ConvMAE", "3", "5", "140", "–", "–", "52.0 ± 2.0", "–", "2.0 ± 0.0")
    ]


def test_a_measure_of_fewer_seeds_than_the_row_says_so():
    found = results(leaky=[first(50), first(52)], convmae=[first(60), first(60)])
    found["leaky"][1]["finetune-10"] = verdict_of(np.array(first(40)))
    for seed in range(2):
        found["convmae"][seed]["finetune-10"] = verdict_of(np.array(first(45)))
    found["leaky"][1]["pretrain"]["seconds_an_epoch"] = None
    row = accuracy_table(found, [10.0]).splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        *("2", "5", "140", "–", "–", "51.0 ± 1.4", "–", "40.0 (1)", "2.0 (1)")
    ]
    cells = claims_table(found, [10.0]).splitlines()[2].split("|")
    assert "(" not in cells[3] and cells[5].strip().endswith("**as the paper** (1)")


def test_arms_and_seeds_that_are_missing_are_named():
    found = results(convmae=[first(50), first(52)], leaky=[first(50)])
    missing = "without masked convolution (1 of 2 seeds), 3×3 convolutions (2 of 2 seeds)"
    assert not_done(found, {"asked": {"convmae": 2, "leaky": 2, "kernel3": 2}}, []) == missing


def test_a_difference_is_paired_by_seed_and_picture():
    # In each seed the plain MAE is right where ConvMAE is, but for one picture of a hundred.
    found = results(convmae=[first(50), first(60)], mae=[first(49), first(59), first(99)])
    value, error = change(found)
    assert value == pytest.approx(1)
    # Two pictures of a hundred differ in half of the seeds each.
    assert error == pytest.approx(100 * (0.005 - 0.01**2) ** 0.5 / 10)


def test_what_differs_between_seeds_adds_to_the_error():
    alike = results(convmae=[first(52), first(52)], mae=[first(50), first(50)])
    other = results(convmae=[first(50), first(54)], mae=[first(50), first(50)])
    assert change(alike)[0] == change(other)[0] == pytest.approx(2)
    assert change(other)[1] > 2 > change(alike)[1]


def test_pictures_that_both_judge_alike_are_no_doubt():
    assert change(results(convmae=[first(50)], mae=[first(50)])) == (0, 0)


def test_bits_of_a_number_that_fills_no_byte_come_back():
    right = [True, False, True]
    assert bits(verdict_of(right)).tolist() == right


def test_the_headline_has_a_line_for_each_of_its_arms_that_is_there():
    found = results("regression_scales", convmae=[first(50)], random=[first(30)], leaky=[first(1)])
    lines = headline(found, [10]).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["ConvViT, random weights", "–", "30.0"],
        ["ConvMAE", "–", "50.0"],
    ]


def test_features_without_the_position_table_stand_in_a_sentence():
    found = results(convmae=[first(50)])
    found["convmae"][0]["probe"]["regression_last_bare"] = verdict_of(first(55))
    assert "ConvMAE 55.0 % instead of 50.0 % (+5.0 ± 2.2)" in position_table(found)


@pytest.mark.parametrize(
    "change, words",
    [(2.1, "**as the paper**"), (1.9, "no difference"), (-2.1, "**the other way**")],
)
def test_a_difference_counts_beyond_two_errors(change, words):
    assert verdict(change, 1.0) == words


def test_only_what_has_both_arms_is_compared():
    table = claims_table(results(convmae=[first(50)], random=[first(30)]), [])
    assert len(table.splitlines()) == 3
    assert "+20.0 ± 4.0: **as the paper**" in table
