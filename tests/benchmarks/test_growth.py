import argparse
import json
import os

import pytest

from benchmarks import growth

FEW = ["--sample", "128", "--shard_size", "500"]


def test_a_thousand_files_and_more_are_links_to_one(tmp_path):
    growth.make_images(tmp_path / "folder", 1001)
    folders = sorted(os.listdir(tmp_path / "folder"))
    assert [len(os.listdir(tmp_path / "folder" / name)) for name in folders] == [1000, 1]
    assert os.stat(next((tmp_path / "sources").iterdir())).st_nlink == 1002


def test_every_layout_has_a_row_and_nothing_is_left_behind(tmp_path, capsys, monkeypatch):
    def in_this_process(row: str, folder: os.PathLike, args: argparse.Namespace) -> dict:
        return {"write": growth.write_row, "read": growth.read_row}[row](folder, args)

    monkeypatch.setattr(growth, "measure_afresh", in_this_process)
    monkeypatch.setattr(growth, "peak_from_here", lambda: 0)  # not of the tests' process
    (tmp_path / "images").mkdir()
    file, place = tmp_path / "rows.json", ["--folder", str(tmp_path / "images")]
    growth.main(["--counts", "1200", *FEW, *place, "--json", str(file)])
    folder, shards = json.loads(file.read_text())["rows"]
    assert folder[:2] == [1200, "folder"] and shards[:2] == [1200, "shards"]
    assert set(shards[2]) == set(growth.COLUMNS) and min(shards[2].values()) > 0
    assert set(growth.COLUMNS) - set(folder[2]) == {"make_s", "make_mib"}
    assert not list((tmp_path / "images").iterdir())
    assert "| 1,200  | shards |" in capsys.readouterr().out


def test_an_epoch_is_reckoned_from_the_images_read():
    row = dict.fromkeys(growth.COLUMNS, 1.0) | {"first_s": 2.0, "image_ms": 3.0}
    cells = growth.table([(1000, "folder", row)]).splitlines()[-1].split("|")
    assert cells[-2].strip() == "5"


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        growth.main(["--folder", str(tmp_path / "none")])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
