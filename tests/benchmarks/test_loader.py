import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loader
from benchmarks.loader import TASKS, Files, main, write_photos


@pytest.mark.parametrize("task", TASKS)
def test_every_form_reads_the_same_files(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "CALLS", 1)
    file, few = tmp_path / "results.json", ["--num_images", "4", "--rounds", "2"]
    main(["--task", task, *few, "--input_size", "64", "--json", str(file)])
    results = json.loads(file.read_text())
    seconds = results["seconds_per_image"]
    assert tuple(seconds) == TASKS[task]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    printed = capsys.readouterr().out
    assert "files: 4, " in printed and "times MAE's" in printed
    assert ("| Rotate " in printed) == (task == "finetune")


def test_the_shares_of_the_operations_are_those_of_two_draws_each_done_half_the_time():
    printed = loader.operations_table({"Rotate": 0.003, "Invert": 0.001}, image=0.004)
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in printed.splitlines()[2:]]
    assert rows == [
        ["Rotate", "3.00", "37.5%"],
        ["Invert", "1.00", "12.5%"],
        ["all, as drawn", "2.00", "50.0%"],
    ]


def test_own_files_can_be_read(tmp_path, capsys):
    write_photos(tmp_path, 3, (60, 80))
    (tmp_path / "notes.txt").write_text("no picture")
    few = ["--num_images", "2", "--rounds", "1", "--input_size", "32"]
    main(["--data_path", str(tmp_path), *few])
    printed = capsys.readouterr().out
    assert "files: 2 of 3, " in printed and "left out" in printed and "1 of .txt" in printed


def test_a_damaged_file_stops_the_comparison_in_one_line(tmp_path, capsys):
    write_photos(tmp_path, 2, (60, 80))
    (tmp_path / "0001.jpg").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as refusal:
        main(["--data_path", str(tmp_path), "--rounds", "1", "--input_size", "32"])
    assert refusal.value.code == 2
    assert "0001.jpg cannot be decoded" in capsys.readouterr().err


def test_the_made_files_are_like_imagenet_s(tmp_path):
    write_photos(tmp_path, 8, (375, 500))
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert len(set(sizes)) >= 6
    assert all(356 <= min(size) <= 394 and 475 <= max(size) <= 525 for size in sizes)
    assert sum(height > width for width, height in sizes) == 2
    assert 50_000 < Files.of(tmp_path, 8).mean_bytes < 120_000


def test_a_folder_without_images_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--data_path", str(Path(tmp_path) / "none")])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
