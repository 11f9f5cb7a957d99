import pytest
import torch

from benchmarks import flops
from benchmarks.flops import Model, measure, parse_args, table


def test_a_multiply_add_counts_as_two():
    model = Model("", "", 8, lambda: torch.nn.Conv2d(3, 5, 1, bias=False), lambda m, x: m(x))
    assert measure(model) == (15, 2 * 15 * 64)


@pytest.mark.parametrize("task", ["classify", "pretrain"])
def test_every_size_has_a_row(task, monkeypatch):
    monkeypatch.setattr(flops, "SIZES", {name: flops.SIZES[name] for name in ("tiny", "base")})
    rows = [line.split("|") for line in table([task]).splitlines()]
    assert [row[2].strip() for row in rows[2:]] == ["tiny", "base"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[4:7])


def test_encoding_a_quarter_costs_less_than_everything():
    whole, part = (
        next(m for m in flops.TASKS[task]() if m.size == "base")
        for task in ("classify", "pretrain")
    )
    assert 0 < measure(part)[1] < measure(whole)[1]


def test_a_task_whose_libraries_are_not_installed_is_left_out(monkeypatch, capsys):
    def absent():
        raise ModuleNotFoundError("no", name="mmseg")

    monkeypatch.setitem(flops.TASKS, "segment", absent)
    assert "UperNet" not in table(["segment"])
    assert capsys.readouterr().err == "segment: left out, mmseg is not installed\n"


def test_an_unknown_task_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["sing"])
    assert stopped.value.code == 2
    assert "unknown task sing: one of classify" in capsys.readouterr().err
