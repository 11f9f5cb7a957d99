import json
import re

import pytest

from benchmarks.proof import __main__ as program
from benchmarks.proof.__main__ import epochs_of, main, parse_args, shown
from benchmarks.proof.arms import ARMS
from tests.pictures import write_pictures
from util.errors import UsageError

PROGRAM = "benchmarks.proof"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 training pictures and 10 to test, of two classes."""
    root = tmp_path_factory.mktemp("data")
    for name in ("cat", "dog"):
        write_pictures(root / "train" / name, 30)
        write_pictures(root / "val" / name, 5)
    return root


def command(data, output, *more):
    return [
        *("--data_path", data, "--output_dir", output, "--arms", "mae", "convmae"),
        *("--epochs", 4, "--seeds", 1, "--input_size", 16, "--num_workers", 0, "--device", "cpu"),
        *("--shares", 50, "--finetune_epochs", 2, "--curve_points", 2, *more),
    ]


def found(output):
    """The findings of all jobs, without what depends on the machine."""
    texts = [path.read_text() for path in sorted(output.glob("runs/*/results.json"))]
    return [json.loads(re.sub(r'"seconds\w*": [^,\n]*,?', "", text)) for text in texts]


def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(launcher, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launcher.run(*command(data, whole), program=PROGRAM).code == 0
    process = launcher.start(*command(data, killed), program=PROGRAM)
    process.wait_for("[5/8] ConvMAE, seed 0: pretrain")
    process.wait_for("Epoch 2/4", timeout=60)
    process.signal(9)
    process.wait()
    assert len(found(killed)) == 1
    done = launcher.run(*command(data, killed), program=PROGRAM)
    assert done.code == 0, done.err
    assert "[5/8] ConvMAE, seed 0: pretrain; about 1 min left" in done.out
    assert found(killed) == found(whole)
    assert [sorted(jobs) for jobs in found(whole)] == 2 * [
        ["curve", "finetune-50", "pretrain", "probe"]
    ]
    pages = [(folder / "PROOF.md").read_text() for folder in (killed, whole)]
    tables = [re.search(r"\| comparison.*?\n\n", page, re.DOTALL).group() for page in pages]
    assert tables[0] == tables[1]
    for name in ("proof.png", "proof_reconstruction.png"):
        assert (whole / name).stat().st_size > 1000
        assert f"({name})" in pages[1]


def run(data, output, *more):
    main(parse_args([str(word) for word in command(data, output, *more)]))


def test_a_plain_mae_of_a_third_of_the_flops_gets_three_times_the_epochs(monkeypatch, data):
    flops = iter([3.0, 1.0])
    monkeypatch.setattr(program, "count_flops", lambda loss: next(flops))
    args = parse_args([str(word) for word in command(data, "out")])
    assert epochs_of(args, ARMS["mae_cost"]) == 12
    assert epochs_of(args, ARMS["mae"]) == 4


def test_the_page_shows_no_folders_of_the_machine():
    assert list(map(shown, ["--data_path", "/mnt/disk/cifar10", "docs/PROOF.md"])) == [
        *("--data_path", "/path/to/cifar10", "docs/PROOF.md")
    ]


def test_a_folder_of_another_experiment_is_refused(data, tmp_path):
    (tmp_path / "settings.json").write_text('{"data_path": "elsewhere"}')
    with pytest.raises(UsageError, match="an experiment with other settings"):
        run(data, tmp_path)


def test_sizes_that_do_not_fit_are_one_line(data, tmp_path):
    with pytest.raises(UsageError, match="--input_size, --patch_size: img_size 17x17"):
        run(data, tmp_path, "--input_size", 17)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shares", 1, 10], "--finetune_epochs: 1 numbers for 2 --shares"),
        (["--shares", 101], "--shares are percent"),
        (["--arms", "mea"], "did you mean mae?"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(data, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path, *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
