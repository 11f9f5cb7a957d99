import json
from pathlib import Path

import pytest
import torch

from util.run.lr_sched import adjust_learning_rate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedule.json").read_text())
SCHEDULE = ("lr", "min_lr", "warmup_epochs", "epochs")
ROWS = [
    pytest.param({name: config[name] for name in SCHEDULE}, *row, id=f"{config['epochs']}-{row[0]}")
    for config in GOLDEN
    for row in config["rows_epoch_lr_lrAtScaleQuarter"]
]


def two_groups():
    """An optimizer with a plain group and one at a quarter of the rate."""
    plain, scaled = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [plain]}, {"params": [scaled], "lr_scale": 0.25}], lr=1.0)


@pytest.mark.parametrize(("schedule", "epoch", "rate", "quarter"), ROWS)
def test_rates_are_those_of_the_original(schedule, epoch, rate, quarter):
    optimizer = two_groups()
    returned = adjust_learning_rate(optimizer, epoch, **schedule)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [returned, *rates] == pytest.approx([rate, rate, quarter], rel=1e-12, abs=0)


def test_golden_numbers_hold_two_schedules():
    assert len({tuple(config[name] for name in SCHEDULE) for config in GOLDEN}) == 2


@pytest.mark.parametrize("warmup", [0, 0.0])
def test_without_warmup_the_first_step_has_the_peak_rate(warmup):
    schedule = dict(lr=3.0, min_lr=1.0, warmup_epochs=warmup, epochs=4)
    rates = [adjust_learning_rate(two_groups(), epoch, **schedule) for epoch in (0, 2, 4)]
    assert rates == pytest.approx([3, 2, 1], rel=1e-12)
