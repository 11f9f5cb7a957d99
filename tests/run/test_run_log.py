import json
import time

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.api_pb2 import STATUS_UNKNOWN, ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

import util.run.run_log as run_log_module
from util.run.events import EventFile
from util.run.run_log import RunLog, read_log


def run_log(folder, epoch=0.0, epochs=()):
    position = int(epoch), epoch % 1
    log = RunLog(folder, folder / "events", *position)
    for number in epochs:
        log.epoch({"train_loss": number / 2, "epoch": number})
        log.scalars(number + 1, "train", {"loss": number / 2})
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
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1000, 0.0),
        (2000, 0.5),
        (3000, 1.0),
    ]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log_module, "is_main_process", lambda: False)
    run_log(tmp_path, epochs=[0]).picture(0, "picture", torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_log_of_an_earlier_run_is_kept_under_another_name(tmp_path, capsys):
    run_log(tmp_path, epochs=[0, 1])
    run_log(tmp_path, epochs=[0])
    run_log(tmp_path, epochs=[0])
    assert [len(read_log(tmp_path / f"log-{i}.txt")[0]) for i in (1, 2)] == [2, 1]
    assert "an earlier run: kept as log-1.txt" in capsys.readouterr().err


ODD = {
    "zeros": b"\0" * 500,
    "half": b"{",
    "list": b"[1]",
    "text": b'{"epoch": "1"}',
    "bytes": b"\xff\xfe",
    "deep": b"[" * 99_999,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_lines_are_kept_out_of_the_log_and_said(odd, tmp_path, capsys):
    run_log(tmp_path, epochs=[0])
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(odd + b"\n")
    run_log(tmp_path, 1.0, epochs=[1])
    assert logged_epochs(tmp_path) == [0, 1]
    assert odd in (tmp_path / "log-1.txt").read_bytes()
    assert "1 lines that are not an epoch's: kept as log-1.txt" in capsys.readouterr().err


# --- files that cannot be written ----------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    run_log(tmp_path, epochs=[0, 1, 2])
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}/log.txt cannot be written (No space left on device): "
        "the run goes on without it"
    ]


def test_events_that_cannot_be_written_are_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "events").touch()  # a file where the folder should be
    run_log(tmp_path, epochs=[0, 1, 2])
    (warning,) = capsys.readouterr().err.splitlines()
    assert "events.out.tfevents" in warning and "the run goes on without it" in warning
    assert logged_epochs(tmp_path) == [0, 1, 2]


# --- TensorBoard's files -------------------------------------------------------------------------


def points(folder, name="loss"):
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_half_a_record_does_not_hide_what_follows(tmp_path):
    events = EventFile(tmp_path, purge_step=1)
    events.scalar("loss", 1.0, 1)
    events.flush()
    with open(events.path, "ab") as file:
        file.write(b"half a record")
    events.scalar("loss", 2.0, 2)
    events.flush()
    assert points(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_events_go_on_in_a_folder_that_was_deleted(tmp_path):
    events = EventFile(tmp_path / "events", purge_step=1)
    events.flush()
    events.path.unlink()
    events.path.parent.rmdir()
    events.scalar("loss", 2.0, 2)
    events.flush()
    assert points(tmp_path / "events") == [(2, 2.0)]


def test_a_clock_that_went_back_loses_no_points(tmp_path, monkeypatch):
    first = EventFile(tmp_path, purge_step=1)
    for step in (1, 2, 3):
        first.scalar("loss", 1.0, step)
    first.flush()
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    second = EventFile(tmp_path, purge_step=3)
    for step in (3, 4):
        second.scalar("loss", 2.0, step)
    second.flush()
    assert points(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_pictures_are_read_back(tmp_path):
    events = EventFile(tmp_path, purge_step=1)
    events.image("picture", torch.rand(3, 4, 5), 7)
    events.flush()
    (picture,) = EventAccumulator(str(tmp_path)).Reload().Images("picture")
    assert (picture.step, picture.height, picture.width) == (7, 4, 5)


def table_of_runs(folder):
    """TensorBoard's page HPARAMS: each run's values, and the last points of its curves."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(folder))))
    request = ListSessionGroupsRequest(slice_size=9, allowed_statuses=[STATUS_UNKNOWN])
    return {
        group.name: (
            {
                name: value.number_value or value.string_value
                for name, value in group.hparams.items()
            },
            {metric.name.tag: metric.value for metric in group.metric_values},
        )
        for group in Handler(RequestContext(), context, "", request).run().session_groups
    }


def test_tensorboards_table_shows_each_runs_hyperparameters_beside_its_curves(tmp_path):
    given = {"a": {"lr": 0.5, "hflip": True, "size": "32 64", "clip": None}, "b": {"clip": 2}}
    for run, values in given.items():
        (tmp_path / run).mkdir()
        for epoch in (0, 1):  # begun, and gone on with
            log = RunLog(tmp_path / run, tmp_path / run, epoch)
            log.hyperparameters(values)
            log.scalars(epoch + 1, "train", {"loss": epoch + 2})
    assert table_of_runs(tmp_path) == {
        "a": ({"lr": 0.5, "hflip": 1, "size": "32 64"}, {"train/loss": 3}),
        "b": ({"clip": 2}, {"train/loss": 3}),
    }
