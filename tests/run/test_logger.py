import json
import math
from types import SimpleNamespace

import pytest
import torch

from util.run import logger
from util.run.logger import Meters, Progress, clock

NAN = float("nan")


def meters(*steps):
    """Meters after steps given as (taken, loss, grad_norm)."""
    result = Meters(("loss", "grad_norm"), torch.device("cpu"))
    update(result, *steps)
    return result


def update(into, *steps):
    for taken, loss, grad_norm in torch.tensor(steps, dtype=torch.float32):
        into.update(taken, loss=loss, grad_norm=grad_norm)


# ---- Meters --------------------------------------------------------------------------------------


def test_meters_tell_means():
    assert meters((1, 1, 4), (1, 2, 5), (1, 6, 9)).read() == {"loss": 3, "grad_norm": 6}


@pytest.mark.parametrize("bad", [NAN, float("inf"), 100.0])
def test_skipped_steps_do_not_count(bad):
    one = meters((1, 1, 4), (0, bad, 7), (0, 8, bad), (1, 3, 6))
    assert one.read() == one.read_epoch() == {"loss": 2, "grad_norm": 5}


def test_mean_of_skipped_steps_alone_is_nan():
    one = meters((0, 1, NAN))
    assert all(math.isnan(value) for value in [*one.read().values(), *one.read_epoch().values()])


def test_a_window_begins_at_each_reading_and_the_epoch_does_not():
    one = meters((1, 1, 1))
    assert one.read()["loss"] == 1
    update(one, (1, 3, 1), (1, 5, 1))
    assert one.read_epoch()["loss"] == 3
    assert one.read()["loss"] == 4
    assert one.read_epoch()["loss"] == 3


def test_a_new_epoch_forgets_all():
    one = meters((1, 1, 1))
    one.start_epoch()
    update(one, (1, 3, 2))
    assert one.read() == one.read_epoch() == {"loss": 3, "grad_norm": 2}


def test_the_epoch_goes_through_a_checkpoint():
    one, other = meters((1, 1, 3), (0, NAN, NAN)), meters((1, 50, 50))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for each in (one, other):
        update(each, (1, 3, 4))
        assert each.read_epoch() == {"loss": 2, "grad_norm": 3.5}
    assert other.read() == {"loss": 3, "grad_norm": 4}


def test_many_small_values_add_up_without_loss():
    one = meters((1, 2.0**24, 1))
    for _ in range(100):
        update(one, (1, 1, 1))
    assert one.read()["loss"] == (2**24 + 100) / 101


# ---- Console -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (3599.9, "1:00:00"),
        (3661, "1:01:01"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_clock_shows_hours_minutes_and_seconds(seconds, text):
    assert clock(seconds) == text


def fixed_clock(monkeypatch, *readings):
    monkeypatch.setattr(logger, "time", SimpleNamespace(perf_counter=iter(readings).__next__))


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    fixed_clock(monkeypatch, 100.0, 110.0, 120.0)
    progress = Progress("Epoch 2/3", steps=200, start=0, remaining=200)
    for step in (10, 20):
        for _ in range(10):
            progress.advance()
        progress.show(step, {"lr": 0.00012345678, "loss": 0.5, "note": "text"})
    progress.close()
    assert capsys.readouterr() == (
        "Epoch 2/3  [ 10/200]  lr 0.0001235  loss 0.5  note text  left 0:06:30\n"
        "Epoch 2/3  [ 20/200]  lr 0.0001235  loss 0.5  note text  left 0:06:20\n",
        "",
    )


def test_time_left_counts_only_the_steps_taken_since_a_resume(capsys, monkeypatch):
    fixed_clock(monkeypatch, 0.0, 4.0)
    Progress("Epoch 1/1", steps=10, start=6, remaining=0).show(8, {})
    assert "left 0:00:04\n" in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logger.sys.stderr, "isatty", lambda: True)
    progress = Progress("Epoch 1/1", steps=4, start=1, remaining=0)
    progress.advance()
    progress.show(2, {"loss": 0.5})
    progress.close()
    output, bar = capsys.readouterr()
    assert output == "" and "Epoch 1/1:" in bar and "loss 0.5" in bar


def test_the_bar_fits_a_hundred_columns_and_a_narrower_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logger.sys.stderr, "isatty", lambda: True)
    names = ("lr", "loss", "grad_norm", "memory_mb", "images_per_s", "data_wait")
    for columns in (300, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        progress = Progress("Epoch 1599/1600", steps=12345, start=12000, remaining=10**6)
        progress.advance()
        progress.show(12001, dict.fromkeys(names, 0.00012345678))
        progress.close()
        bars = capsys.readouterr().err.split("\r")
        assert "lr 0.0001" in "".join(bars) or columns == 60
        assert 40 < max(map(len, bars)) <= min(columns, 100)


def test_a_finished_epoch_leaves_a_line_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logger.sys.stderr, "isatty", lambda: True)
    progress = Progress("Epoch 1/2", steps=4, start=0, remaining=4)
    progress.finish({"loss": 0.5, "time": "0:01:00"})
    assert capsys.readouterr().out == "Epoch 1/2  loss 0.5  time 0:01:00\n"


def test_only_the_main_process_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(logger, "is_main_process", lambda: False)
    progress = Progress("Epoch 1/1", steps=4, start=0, remaining=0)
    progress.advance()
    progress.show(1, {"loss": 0.5})
    assert capsys.readouterr() == ("", "")
