import json

import pytest
import torch

from benchmarks.scaling import efficiency, main

SMALL = ["--model", "tiny", "--input_size", "32", "--batch_size", "2", "--steps", "1"]


def test_efficiency_is_the_share_of_what_more_processes_could_do():
    results = {1: [10.0, 8.0], 2: [18.0, 16.0], 4: [20.0, 32.0]}
    assert efficiency(results, 1) == [1, 1]
    assert efficiency(results, 2) == [0.9, 1.0]
    assert efficiency(results, 4) == [0.5, 1.0]


def test_two_processes_are_measured_beside_one(tmp_path, capsys):
    file = tmp_path / "results.json"
    main([*SMALL, "--processes", "1", "2", "--rounds", "1", "--device", "cpu", "--json", str(file)])
    results = json.loads(file.read_text())
    one, two = results["images_per_s"]["1"][0], results["images_per_s"]["2"][0]
    assert one > 0 and two > 0
    assert results["efficiency"] == {"1": 1, "2": pytest.approx(two / one / 2)}
    assert "| processes |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--device", "cuda"])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
