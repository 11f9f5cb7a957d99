import json
import math
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run import logger
from util.run.logger import Meters, Progress, RunLog, clock

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


# ---- Files ---------------------------------------------------------------------------------------


def run_log(folder, epoch=0.0, epochs=()):
    position = int(epoch), epoch % 1
    log = RunLog(folder, folder / "events", *position)
    for number in epochs:
        log.epoch({"train_loss": number / 2, "epoch": number})
        log.scalars(number + 1, {"loss": number / 2})
    log.close()
    return log


def logged_epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_log_has_a_json_line_an_epoch(tmp_path):
    run_log(tmp_path, epochs=[0, 1])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"train_loss": 0.0, "epoch": 0},
        {"train_loss": 0.5, "epoch": 1},
    ]


@pytest.mark.parametrize(
    ("position", "kept"), [(3.0, [0, 1, 2]), (2.0, [0, 1]), (1.75, [0]), (0.5, []), (0.0, [])]
)
def test_lines_of_epochs_that_run_again_are_dropped(position, kept, tmp_path):
    run_log(tmp_path, epochs=[0, 1, 2])
    run_log(tmp_path, position, epochs=[])
    assert logged_epochs(tmp_path) == kept
    run_log(tmp_path, position, epochs=[7])
    assert logged_epochs(tmp_path) == [*kept, 7]


def test_a_line_that_was_not_written_whole_is_dropped(tmp_path):
    run_log(tmp_path, epochs=[0, 1])
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-7])
    run_log(tmp_path, 1.0, epochs=[1])
    assert logged_epochs(tmp_path) == [0, 1]


def test_scalars_stand_at_a_thousand_a_epoch_and_those_that_run_again_are_dropped(tmp_path):
    run_log(tmp_path, epochs=[0, 1, 2])
    run_log(tmp_path, 2.0, epochs=[2])
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1000, 0.0),
        (2000, 0.5),
        (3000, 1.0),
    ]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "is_main_process", lambda: False)
    run_log(tmp_path, epochs=[0]).image(0, "picture", torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == []


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


def test_only_the_main_process_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(logger, "is_main_process", lambda: False)
    progress = Progress("Epoch 1/1", steps=4, start=0, remaining=0)
    progress.advance()
    progress.show(1, {"loss": 0.5})
    assert capsys.readouterr() == ("", "")
