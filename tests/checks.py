"""What the tests of the mains look at: command lines, what a run left, how it ended."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import Result


def command_line(values: Mapping[str, object], *more: object) -> list[object]:
    """Flags of a main from their names and values; those that are None are left out."""
    given = {name: value for name, value in values.items() if value is not None}
    parts = ((f"--{k}", *v) if isinstance(v, tuple) else (f"--{k}", v) for k, v in given.items())
    return [part for flag in parts for part in flag] + list(more)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load(output / "checkpoint.pth")["model"]


def log_lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


TIMES = ("data_wait", "epoch_seconds", "teacher_seconds")


def outcomes(output: Path) -> list[dict]:
    """The lines of log.txt without what differs from run to run, the times."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in log_lines(output)
    ]


def curve(output: Path, tag: str) -> list[tuple[int, float]]:
    """A TensorBoard curve as TensorBoard shows it: (step, value)."""
    return [(event.step, event.value) for event in events(output).Scalars(tag)]


def events(output: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0}
    return EventAccumulator(str(output), size_guidance=everything).Reload()


def same(a: object, b: object) -> bool:
    """Equal down to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same_end(output: Path, expected: Path) -> None:
    """Two runs ended in the same state and with the same log, bit for bit."""
    got, want = load(output / "checkpoint.pth"), load(expected / "checkpoint.pth")
    for part in want.keys() - {"args"}:
        assert same(got[part], want[part]), part
    assert outcomes(output) == outcomes(expected)


def assert_close_end(output: Path, expected: Path) -> None:
    """Two runs did the same but for rounding."""
    for got, want in zip(outcomes(output), outcomes(expected), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    got = weights(output)
    for name, want in weights(expected).items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-4, msg=name)


def assert_finite(output: Path) -> None:
    assert all(tensor.isfinite().all() for tensor in weights(output).values())


def assert_ok(*results: Result) -> None:
    for result in results:
        assert result.code == 0, result.err
        assert "Traceback" not in result.err


def assert_one_line(result: Result, code: int, *phrases: str) -> None:
    """It failed with an exit code and one line on stderr that has certain phrases in it."""
    assert result.code == code, result
    assert len(result.err.splitlines()) == 1, result.err
    for phrase in phrases:
        assert phrase in result.err
