import json
import re
import shutil
import signal
import time

import pytest
import torch

from benchmarks.proof import jobs
from benchmarks.proof.__main__ import main, parse_args, setting_of, shown
from benchmarks.proof.arms import ARMS
from benchmarks.proof.book import Book
from benchmarks.proof.jobs import all_jobs, epochs_of, flops_of
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
        *("--data_path", data, "--output_dir", output, "--arms", "random", "convmae", "mimic"),
        *("--epochs", 4, "--seeds", 1, "--input_size", 16, "--num_workers", 0, "--device", "cpu"),
        *("--shares", 10, 100, "--finetune_epochs", 2, 1, "--curve_points", 2, *more),
    ]


def run(data, output, *more):
    main(parse_args([str(word) for word in command(data, output, *more)]))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output of an experiment that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(data, output)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return output


def found(output):
    """The findings of all jobs, without what depends on the machine."""
    text = (output / "results.json").read_text()
    return json.loads(re.sub(r'"seconds\w*": [^,\n]*,?', "", text))["results"]


def wait_until(happened, seconds=1200):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def tables(output):
    """The tables of a page that do not depend on the machine."""
    return re.search(r"## Beside the paper.*?\n\n!", (output / "PROOF.md").read_text(), re.DOTALL)[
        0
    ]


def test_every_job_of_an_arm_is_done_and_stands_on_the_page(whole):
    names = ["curve", "finetune-10", "finetune-100", "pretrain", "probe"]
    assert {arm: sorted(seeds["0"]) for arm, seeds in found(whole).items()} == {
        "random": [name for name in names if name not in ("curve", "pretrain")],
        "convmae": sorted([*names, "picture"]),
        "mimic": ["finetune-10", "pretrain", "probe"],
    }
    page = (whole / "PROOF.md").read_text()
    assert "Without the position table" in page and "not done" not in page
    for name in ("proof.png", "proof_reconstruction.png"):
        assert (whole / name).stat().st_size > 1000
        assert f"({name})" in page


def test_stopped_among_several_jobs_it_goes_on_to_the_same_numbers(launcher, data, whole, tmp_path):
    beside = ("--jobs", 2, "--arms", "convmae", "random", "mimic")
    process = launcher.start(*command(data, tmp_path, *beside), program=PROGRAM)
    process.wait_for("ConvMAE, seed 0: pretrain")
    log = tmp_path / "runs/convmae-0/pretrain/log.txt"
    wait_until(lambda: log.exists() and log.read_text())
    process.signal(signal.SIGTERM)
    assert process.wait().code == 0
    assert "pretrain" not in found(tmp_path).get("convmae", {}).get("0", {})
    assert launcher.run(*command(data, tmp_path), program=PROGRAM).code == 0
    assert found(tmp_path) == found(whole)


def test_the_page_is_made_from_the_results_and_the_picture_alone(whole, tmp_path):
    for name in ("results.json", "reconstruction.png"):
        shutil.copy(whole / name, tmp_path)
    main(parse_args(["--publish", "--output_dir", str(tmp_path)]))
    assert tables(tmp_path) == tables(whole)
    assert (tmp_path / "proof_reconstruction.png").exists()


def test_publishing_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="holds no results"):
        main(parse_args(["--publish", "--output_dir", str(tmp_path)]))


def test_a_plain_mae_of_a_third_of_the_flops_gets_three_times_the_epochs(monkeypatch, data):
    flops = {"convmae": 3, "mae_cost": 1}
    monkeypatch.setattr(jobs, "flops_of", lambda args, arm: flops[arm.name])
    args = parse_args([str(word) for word in command(data, "out")])
    assert epochs_of(args, ARMS["mae_cost"]) == 3 * args.epochs
    assert epochs_of(args, ARMS["mae"]) == args.epochs


def test_complementary_masks_cost_the_flops_of_as_many_pictures(data):
    args = parse_args([str(word) for word in command(data, "out")])
    fast, one = (flops_of(args, ARMS[name]) for name in ("fast_cost", "convmae"))
    assert fast == pytest.approx(4 * one, rel=0.02)


def test_the_main_arms_come_first_with_all_their_seeds(data, tmp_path):
    more = ("--arms", "leaky", "convmae", "--seeds", 2)
    args = parse_args([str(word) for word in command(data, tmp_path, *more)])
    args.counts = {"all": 60, "test": 10, "labels-10": 6, "labels-100": 60}
    order = [(job.arm.name, job.seed) for job in all_jobs(args, torch.device("cpu"))]
    assert list(dict.fromkeys(order)) == [
        *(("convmae", 0), ("convmae", 1), ("leaky", 0), ("leaky", 1))
    ]


def test_seeds_that_an_earlier_command_asked_for_stay_asked_for(data, tmp_path):
    args = parse_args([str(word) for word in command(data, tmp_path)])
    args.counts, args.classes, book = {}, 2, Book(tmp_path)
    book.setting = {"asked": {"convmae": 3, "leaky": 2}}
    book.begin({}, setting_of(args, torch.device("cpu"), book))
    assert book.setting["asked"] == {"convmae": 3, "leaky": 2, "random": 1, "mimic": 1}


def test_a_student_without_its_teacher_is_one_line(data, tmp_path):
    with pytest.raises(UsageError, match="--arms mimic needs random"):
        run(data, tmp_path, "--arms", "mimic")


def test_the_page_shows_no_folders_of_the_machine():
    assert list(map(shown, ["--data_path", "/mnt/disk/cifar10", "docs/PROOF.md"])) == [
        *("--data_path", "/path/to/cifar10", "docs/PROOF.md")
    ]


def test_a_folder_of_another_experiment_is_refused(data, tmp_path):
    book = Book(tmp_path)
    book.begin({"data_path": "elsewhere"}, {})
    with pytest.raises(UsageError, match="an experiment with other settings"):
        run(data, tmp_path)


def test_sizes_that_do_not_fit_are_one_line(data, tmp_path):
    with pytest.raises(UsageError, match="--input_size, --patch_size: img_size 17x17"):
        run(data, tmp_path, "--input_size", 17, "--arms", "fast_cost")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shares", 1], "--finetune_epochs: 2 numbers for 1 --shares"),
        (["--shares", 1, 101], "--shares are percent"),
        (["--arms", "mea"], "did you mean mae?"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(data, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path, *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
