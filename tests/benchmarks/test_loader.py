import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.loader import FORMS, Files, main, write_photos


def test_every_form_reads_the_same_files(tmp_path, capsys):
    file = tmp_path / "results.json"
    main(["--num_images", "4", "--rounds", "2", "--input_size", "64", "--json", str(file)])
    results = json.loads(file.read_text())
    seconds = results["seconds_per_image"]
    assert tuple(seconds) == FORMS
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    printed = capsys.readouterr().out
    assert "files: 4, " in printed and "times MAE's" in printed


def test_own_files_can_be_read(tmp_path, capsys):
    write_photos(tmp_path, 3, (60, 80))
    main(["--data_path", str(tmp_path), "--rounds", "1", "--input_size", "32"])
    assert "files: 3, " in capsys.readouterr().out


def test_the_made_files_are_like_imagenet_s(tmp_path):
    write_photos(tmp_path, 8, (375, 500))
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert len(set(sizes)) >= 6
    assert all(356 <= min(size) <= 394 and 475 <= max(size) <= 525 for size in sizes)
    assert sum(height > width for width, height in sizes) == 2
    assert 50_000 < Files.of(tmp_path).mean_bytes < 120_000


def test_a_folder_without_images_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--data_path", str(Path(tmp_path) / "none")])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
