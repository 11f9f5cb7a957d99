import argparse
import re

import pytest

from util.run.parser import (
    mask_ratio,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    share,
)


@pytest.mark.parametrize(
    ("type_of", "good", "bad"),
    [
        (positive_int, {"1": 1, "64": 64}, "0 -1 1.0 1e3 nan x"),
        (non_negative_int, {"0": 0, "7": 7}, "-1 0.0 x"),
        (seed, {"0": 0, "4294967295": 2**32 - 1}, "-1 4294967296 0.5 x"),
        (positive_float, {"1": 1.0, "1e-4": 1e-4}, "0 -1 nan inf x"),
        (non_negative_float, {"0": 0.0, "2.5": 2.5}, "-1e-9 nan inf -inf x"),
        (share, {"0": 0.0, "0.25": 0.25, "1": 1.0}, "-0.1 1.1 nan inf x"),
        (mask_ratio, {"0.75": 0.75}, "0 1 -0.1 1.1 nan x"),
    ],
)
def test_number_types_take_their_range_alone(type_of, good, bad):
    for text, value in good.items():
        assert type_of(text) == value and type(type_of(text)) is type(value)
    for text in bad.split():
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
            type_of(text)
