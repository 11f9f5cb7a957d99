import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import main_finetune
import main_pretrain
from util.errors import UsageError
from util.run import args as arguments
from util.run.args import check_file_writable, check_writable, derive_args
from util.run.parser import ChoiceOf, Parser
from util.run.record import write_record
from util.run.same_run import MAY_CHANGE, changed_data, check_same_run, plain
from util.run.setup import complete_run
from VideoConvMAE import main_finetune as main_finetune_video
from VideoConvMAE import main_pretrain as main_pretrain_video


def parser():
    """All groups that the mains share, a switch and a list of names."""
    result = Parser(prog="main.py")
    arguments.add_data_args(result, data="folder of images")
    arguments.add_augmentation_args(result, (0.2, 1.0))
    recipe = dict(batch_size=64, epochs=400, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
    arguments.add_optim_args(result, **recipe)
    arguments.add_run_args(result)
    arguments.add_eval_args(result)
    names = ["convmae_base", "convmae_large", "convmae_tiny"]
    result.add_argument("--model", type=ChoiceOf(names), default=names[0], help="which one")
    return result


def parse(line=""):
    return parser().parse_args(line.split())


def completed(line="", device="cpu", processes=1):
    args = parse(line)
    derive_args(args, device, processes)
    return args


def error_of(arguments_given, capsys):
    """The one line of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments_given)
    output, error = capsys.readouterr()
    assert stop.value.code == 2 and output == ""
    assert error.startswith("main.py: error: ") and error.endswith("\n") and error.count("\n") == 1
    return error


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--blrr 1", "unknown argument --blrr: did you mean --blr?"),
        ("--batchsize=8", "unknown argument --batchsize: did you mean --batch_size?"),
        ("--weight-decay 0.1", "unknown argument --weight-decay: did you mean --weight_decay?"),
        ("--no_flip", "unknown argument --no_flip: did you mean --no_hflip?"),
        ("--epoch 3", "unknown argument --epoch: did you mean --epochs?"),
        ("--xyzzy", "unknown argument --xyzzy (--help"),
        ("stray", "unknown argument stray (--help"),
        ("--model convmae_bas", "'convmae_bas', did you mean convmae_base? Known: convmae_base, "),
        ("--model ?", "unknown name '?', did you mean convmae_"),
        ("--batch_size 0", "--batch_size: 0 must be at least 1"),
        ("--batch_size 1.5", "--batch_size: '1.5' is not a whole number"),
        ("--num_workers -1", "--num_workers: -1 must not be negative"),
        ("--blr 0", "--blr: 0 must be above 0"),
        ("--blr nan", "--blr: nan must be a finite number, not negative"),
        ("--lr ten", "--lr: 'ten' is not a number"),
        ("--max_bad_images 2", "--max_bad_images: 2 must lie between 0 and 1"),
        ("--device tpu", "--device: 'tpu' is no device: auto, cuda, cuda:N"),
        ("--in_chans 2", "--in_chans: invalid choice: 2"),
        ("--epochs", "--epochs: expected one argument"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(line, message, capsys):
    assert message in error_of(line.split(), capsys)


def test_an_empty_argument_is_refused(capsys):
    error_of(["--epochs", "100", ""], capsys)  # of an unset variable in quotes, say


@pytest.mark.parametrize("name", ["hflip", "pin_mem", "compile"])
def test_a_switch_has_a_flag_for_on_and_one_for_off_and_the_last_counts(name):
    assert getattr(parse(f"--{name}"), name) is True
    assert getattr(parse(f"--no_{name}"), name) is False
    assert getattr(parse(f"--no_{name} --{name}"), name) is True
    assert getattr(parse(), name) is {"hflip": True}.get(name)


def test_help_states_each_default_once():
    help_text = " ".join(parser().format_help().split())
    assert "(default: 0.00015)" in help_text
    assert not re.findall(r"\(default: None\)|\(default[^)]*\) \(default[^)]*\)", help_text)


# ---- Completion ----------------------------------------------------------------------------------


def test_the_learning_rate_is_the_base_rate_times_the_effective_batch_over_256():
    args = completed("--batch_size 32 --accum_iter 2 --blr 1e-3", processes=8)
    assert args.effective_batch_size == 512
    assert args.lr == pytest.approx(2e-3, rel=1e-12)


def test_an_absolute_learning_rate_wins():
    assert completed("--lr 0.3 --blr 1e-3", processes=8).lr == 0.3


@pytest.mark.parametrize(
    ("line", "size"),
    [("", (224, 224)), ("--input_size 96", (96, 96)), ("--input_size 96 160", (96, 160))],
)
def test_one_input_size_is_a_square(line, size):
    assert completed(line).input_size == size


def test_three_input_sizes_are_refused():
    with pytest.raises(UsageError, match="--input_size takes one or two numbers, not 3"):
        completed("--input_size 1 2 3")


@pytest.mark.parametrize("warmup", ["10", "10.5", "40"])
def test_warmup_that_fills_the_run_is_refused_with_both_numbers(warmup):
    with pytest.raises(UsageError, match=f"--warmup_epochs {warmup} .* less than --epochs 10"):
        completed(f"--epochs 10 --warmup_epochs {warmup}")


def test_warmup_may_be_zero_or_a_fraction():
    completed("--epochs 1 --warmup_epochs 0")
    completed("--epochs 1 --warmup_epochs 0.9")


@pytest.mark.parametrize("name", ["compile", "pin_mem"])
def test_switches_that_were_not_given_are_on_with_cuda_alone(name):
    assert [getattr(completed(device=d), name) for d in ("cuda", "cpu", "mps")] == [True] + 2 * [
        False
    ]
    assert getattr(completed(f"--no_{name}", device="cuda"), name) is False
    assert getattr(completed(f"--{name}", device="cpu"), name) is True


@pytest.mark.parametrize(("local", "cores", "workers"), [(1, 64, 10), (8, 64, 8), (8, 4, 1)])
def test_processes_of_a_node_share_its_cores(local, cores, workers, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert completed().num_workers == workers
    assert completed("--num_workers 0").num_workers == 0


def test_a_task_of_slurm_has_the_cores_that_it_was_given(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert completed().num_workers == 6


def test_tensorboard_events_go_to_the_output_unless_told_otherwise():
    assert completed("--output_dir a").log_dir == Path("a")
    assert completed("--output_dir a --log_dir b").log_dir == Path("b")


# ---- The same run --------------------------------------------------------------------------------


def test_plain_arguments_are_values_that_json_keeps():
    values = plain(completed("--output_dir a/b --input_size 96 160"))
    assert json.loads(json.dumps(values)) == values
    assert values["output_dir"] == "a/b" and values["input_size"] == [96, 160]
    assert values["data_path"] is None and values["hflip"] is True


def test_the_same_flags_are_the_same_run():
    line = "--input_size 96 160 --blr 1e-3 --data_path a"
    check_same_run(completed(line), plain(completed(line)))


def test_other_flags_are_another_run_and_each_is_named_with_both_values():
    saved = plain(completed("--input_size 96 160 --epochs 300 --lr 0.1"))
    with pytest.raises(UsageError) as error:
        check_same_run(completed("--no_hflip --lr 0.1 --seed 1"), saved)
    for difference in (
        "--input_size 96 160 there, 224 224 here",
        "--epochs 300 there, 400 here",
        "--hflip True there, False here",
        "--seed 0 there, 1 here",
    ):
        assert difference in str(error.value)
    assert str(error.value).count(" there, ") == 4


def test_a_run_may_go_on_on_another_machine():
    saved = plain(completed("--data_path a --batch_size 64 --amp bf16 --save_freq 3", "cuda", 8))
    moved = (
        "--clip_grad 1 --data_path b --batch_size 128 --accum_iter 4 --num_workers 0 --print_freq 1"
    )
    check_same_run(completed(moved + " --output_dir c --device cpu", "cpu", 1), saved)


def test_another_effective_batch_is_another_run():
    saved = plain(completed("--batch_size 64", processes=8))
    with pytest.raises(
        UsageError, match=r"\(batch_size x accum_iter x processes 512 there, 256 here\)"
    ):
        check_same_run(completed("--batch_size 64", processes=4), saved)


@pytest.mark.parametrize(("digest", "same"), [("ab", True), ("cd", False)])
def test_a_teachers_file_may_move_and_its_weights_may_not_change(digest, same):
    runs = [completed(), completed()]
    vars(runs[0]).update(teacher="there.pth", teacher_digest="ab")
    vars(runs[1]).update(teacher="here.pth", teacher_digest=digest)
    with nullcontext() if same else pytest.raises(UsageError, match="weights of the teacher ab"):
        check_same_run(runs[1], plain(runs[0]))


def test_other_data_are_named_and_another_way_to_write_a_path_is_not():
    saved = plain(completed("--data_path a")) | {"val_path": "b"}
    moved = completed("--data_path c")
    moved.val_path = Path("./b/../b")
    assert changed_data(moved, saved) == "--data_path a there, c here"


def test_only_existing_flags_may_change():
    mains = (main_pretrain, main_finetune, main_pretrain_video, main_finetune_video)
    flags = set().union(*(vars(main.parse_args(["--data_path", "x"])) for main in mains))
    assert flags >= MAY_CHANGE


# ---- The output folder ---------------------------------------------------------------------------


def test_the_output_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        check_writable(tmp_path / "a" / "b", "--output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"--output_dir {folder} cannot be written"):
            check_writable(folder, "--output_dir")


# ---- A file that is to come ----------------------------------------------------------------------


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "there.csv").write_text("path,older")
    os.mkfifo(tmp_path / "fifo")  # which would wait for a reader
    for name in ("there.csv", "new.csv", "fifo"):
        check_file_writable(tmp_path / name, "--predictions", "path,")
    assert (tmp_path / "there.csv").read_text() == "path,older"
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("flag", ["--data_path", "--output_dir", "--resume", "--log_dir"])
def test_a_path_with_a_name_that_no_file_has_is_one_line(flag, capsys):
    with pytest.raises(SystemExit) as end:
        main_pretrain.parse_args(["--data_path", "x", flag, "ok/" + "é" * 128])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {flag}: no file has a name as long" in line


@pytest.mark.parametrize("name", ["", "no/folder.csv", "dangling/x.csv", "a" * 300])
def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--predictions"):
        check_file_writable(tmp_path / name, "--predictions", "path,")


def test_a_file_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="holds something else"):
        check_file_writable(tmp_path / "a.png", "--predictions", "path,")


# ---- Flags of the original's command lines -------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--world_size 8", "--dist_url env://", "--dist_backend nccl", "--dist_on_itp",
        "--start_epoch 3", "--local_rank 1", "--local-rank=1",
    ],
)  # fmt: skip
def test_flags_of_the_launcher_change_no_argument(line):
    assert vars(parse(line)) == vars(parse())


def test_flags_without_effect_are_named_in_a_line_for_each_reason(capsys):
    parse("--world_size 8 --dist_url env:// --dist_on_itp --start_epoch 0 --local-rank 0")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("note: --world_size, --dist_url, --dist_on_itp: of no effect")
    assert second.startswith("note: --start_epoch: of no effect")


def test_a_line_that_is_said_is_said_by_the_first_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse("--world_size 8")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("output_dir", "its default, output"), ("resume", "its default, auto"),
        ("log_dir", "not given"), ("data_path", "not given"), ("predictions", "not given"),
    ],
)  # fmt: skip
def test_an_empty_path_is_the_default_and_that_is_said(flag, meant, capsys):
    args = parser().parse_args([f"--{flag}", ""])
    assert vars(args) == vars(parse())
    assert capsys.readouterr().out == f"note: --{flag}: empty, taken as {meant}\n"


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:11"])
def test_devices_go_by_torchs_names(name):
    assert parse(f"--device {name}").device == name


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "gpu", "cuda:-1", "cpu:0", "cuda:0:0"])
def test_other_devices_are_refused(name, capsys):
    assert f"--device: {name!r} is no device" in error_of(["--device", name], capsys)


def test_a_last_learning_rate_above_the_peak_is_refused_with_where_the_peak_comes_from():
    with pytest.raises(UsageError, match=r"--min_lr 0.001 .* 3.75e-05 = --blr 0.00015 x .* 64"):
        completed("--min_lr 1e-3")


# ---- Output and data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "output", "refused"),
    [
        (["a"], "out", True),
        (["a"], "a/out", True),
        (["train/a"], "train/out", True),
        (["train/a", "val/a"], "val/a/out", True),
        (["train/a"], "out", False),
        (["a"], "../out", False),
    ],
)
def test_an_output_folder_within_what_is_read_is_refused_before_it_is_made(
    data, output, refused, tmp_path
):
    root = tmp_path / "data"
    for name in data:
        (root / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    line = f"--data_path {root} --output_dir {root / output} --num_workers 0"
    if refused:
        with pytest.raises(UsageError, match="lies within the data"):
            complete_run(parse(line), torch.device("cpu"))
        assert sorted(tmp_path.rglob("*")) == before
    else:
        complete_run(parse(line), torch.device("cpu"))
        assert (root / output).is_dir()


def test_an_output_folder_beside_shards_is_allowed(tmp_path):
    (tmp_path / "index.npz").touch()
    line = f"--data_path {tmp_path} --output_dir {tmp_path / 'out'} --num_workers 0"
    complete_run(parse(line), torch.device("cpu"))


# --- configurations and recipes ------------------------------------------------------------------


def test_a_warmup_that_was_not_given_is_a_tenth_of_a_short_run_and_that_is_said(capsys):
    assert [completed(f"--epochs {n}").warmup_epochs for n in (400, 200, 30)] == [40, 40, 3]
    assert completed("--epochs 60 --warmup_epochs 40").warmup_epochs == 40
    assert capsys.readouterr().out == (
        "note: --warmup_epochs 3, a tenth of --epochs 30; the recipe's 40 are for longer runs\n"
    )


@pytest.mark.parametrize("name", ["flags.json", "flags.yaml"])
def test_a_configuration_is_as_if_typed_and_flags_count_more(name, tmp_path):
    texts = {
        "flags.json": '{"args": {"blr": 1e-3, "hflip": false, "crop_scale": [0.5, 1], "lr": null}}',
        "flags.yaml": "blr: 1e-3\nhflip: no\ncrop_scale: [0.5, 1]\nlr:\n",
    }
    (tmp_path / name).write_text(texts[name])
    assert parse(f"--config {tmp_path / name}") == parse("--blr 1e-3 --no_hflip --crop_scale 0.5 1")
    assert parse(f"--blr 1 --hflip --config {tmp_path / name}") == parse(
        "--blr 1 --crop_scale 0.5 1"
    )


def test_arguments_come_back_from_the_file_that_a_run_writes(tmp_path):
    args = parse("--data_path a --crop_scale 0.3 0.9 --no_hflip --no_pin_mem --amp bf16")
    write_record(tmp_path, plain(args))
    assert plain(parse(f"--config {tmp_path / 'args.json'}")) == plain(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown argument --epoch: did you mean --epochs?"),
        ("epoch:", "unknown argument --epoch: did you mean --epochs?"),
        ("epochs: yes", "--epochs: 'True' is not a whole number"),
        ("crop_scale: 0.5", "--crop_scale: expected 2 arguments"),
        ("- 1", "must hold names of flags and their values"),
        ("a: [", "is neither JSON nor YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "flags.yaml"
    if text is not None:
        path.write_text(text)
    assert message in error_of(["--config", str(path)], capsys)


def test_the_names_of_models_can_be_listed(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--model list")
    assert not end.value.code
    assert capsys.readouterr().out.split() == ["convmae_base", "convmae_large", "convmae_tiny"]


def test_help_shows_lists_as_one_types_them_and_which_switch_is_on():
    text = " ".join(parser().format_help().split())
    assert "as a share of the image (default: 0.2 1.0)" in text
    assert "flip half of the images (default)" in text and "never flip (default)" not in text
