"""DET.train_net and DET.predict as processes; what they do within is tested elsewhere."""

import importlib
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from DET.predict import target_names
from DET.train_net import parse_args
from tests.det import small
from tests.runs import code_of
from util.errors import UsageError


def is_importable() -> bool:
    try:
        importlib.import_module("detectron2.engine")
    except ModuleNotFoundError:
        return False
    return True


needs_detectron2 = pytest.mark.skipif(not is_importable(), reason="needs Detectron2")


def hide(package):
    import sys

    sys.modules[package] = None


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return small.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("DET.train_net", ["--config-file", small.CONFIG]),
        ("DET.predict", ["--config-file", "a", "--checkpoint", "b", "c", "--out", "d"]),
    ],
)
def test_without_detectron2_a_program_says_how_to_install_it(launcher, program, arguments):
    done = launcher.run(*arguments, program=program, before=code_of(hide, package="detectron2"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "Detectron2 is not installed: pip install" in done.err


@needs_detectron2
def test_without_what_detectron2_needs_a_program_says_how_to_install_it(launcher):
    before = code_of(hide, package="fvcore")
    done = launcher.run("--config-file", small.CONFIG, program="DET.train_net", before=before)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "Detectron2 needs fvcore: pip install -r requirements-det.txt" in done.err


def test_help_needs_no_detectron2_and_shows_the_flags(launcher):
    done = launcher.run(
        "--help", program="DET.train_net", before=code_of(hide, package="detectron2")
    )
    flags = ("--config-file", "--eval-only", "--resume", "--num-gpus", "--num-machines")
    assert done.code == 0 and all(flag in done.out for flag in flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-fil", small.CONFIG], "--config-file"),
        (["--config-file", small.CONFIG, "--num-gpus", 3], "0 are visible; 0 is the CPU"),
        (["--config-file", small.CONFIG, "--num-machines", 2], "--num-machines needs GPUs"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(launcher, arguments, message):
    done = launcher.run(*arguments, program="DET.train_net")
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err


@needs_detectron2
def test_a_bad_override_is_one_line_and_exit_code_2_before_anything_is_made(launcher, tmp_path):
    settings = [f"train.output_dir={tmp_path}/run", "train.epoch=3"]
    done = launcher.run("--config-file", small.CONFIG, *settings, program="DET.train_net")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "there is no epoch: did you mean epochs?" in done.err
    assert not (tmp_path / "run").exists()


@needs_detectron2
def test_a_signal_saves_and_the_same_command_goes_on_and_predicts(launcher, scenes, tmp_path):
    """With workers that are at work, in one of the first iterations."""
    more = ("train.epochs=100", "train.log_period=1", "data.val.json=null")
    settings = small.overrides(scenes, tmp_path / "run", *more, "dataloader.train.num_workers=1")
    command = ["--config-file", small.CONFIG, "--resume", *settings]
    run = launcher.start(*command, program="DET.train_net")
    run.wait_for("iter: 0")
    run.signal(signal.SIGTERM)
    stopped = run.wait()
    assert stopped.code == 0 and "stopped by a signal after" in stopped.out, stopped.err
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_stopped.pth"

    run = launcher.start(*command, program="DET.train_net")
    run.wait_for("Going on from")
    run.wait_for("iter: ")
    run.signal(signal.SIGUSR1)
    assert run.wait().code == 0

    done = launcher.run(
        "--config-file", tmp_path / "run" / "config.yaml",
        "--checkpoint", tmp_path / "run" / "model_stopped.pth",
        scenes / "val", "--out", tmp_path / "drawn", "--threshold", 0.01,
        program="DET.predict",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.count(" found, drawn in ") == small.IMAGES["val"]
    for path in (scenes / "val").iterdir():
        with Image.open(path) as scene, Image.open(tmp_path / "drawn" / path.name) as drawn:
            assert min(drawn.size) == 480
            plain = np.asarray(scene.resize(drawn.size)).astype(int)
            assert (np.abs(np.asarray(drawn) - plain).max(axis=-1) > 60).any(), "nothing drawn"


def train_in_two_processes(settings):
    import sys

    from detectron2.engine import launch

    from DET.train_net import pass_on_signals, work
    from tests.det import small

    pass_on_signals()
    launch(work, 2, dist_url="auto", args=(small.arguments(settings),))
    sys.exit(0)


@needs_detectron2
def test_two_processes_train_and_evaluate_together(launcher, scenes, tmp_path):
    settings = small.overrides(scenes, tmp_path / "run")
    code = code_of(train_in_two_processes, settings=settings)
    done = launcher.run("unused", before=code)
    assert done.code == 0, done.err
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "A step is 2 processes x 1 micro-batches x 1 images" in text
    assert "Evaluation results for segm" in text
    assert {path.name for path in (tmp_path / "run").glob("*.pth")} >= {"model_final.pth"}


@needs_detectron2
def test_a_signal_reaches_both_processes_and_is_saved_once(launcher, scenes, tmp_path):
    more = ("train.epochs=100", "train.log_period=5", "data.val.json=null")
    settings = small.overrides(scenes, tmp_path / "run", *more)
    run = launcher.start("unused", before=code_of(train_in_two_processes, settings=settings))
    run.wait_for("iter: 4")
    run.signal(signal.SIGTERM)
    stopped = run.wait()
    assert stopped.code == 0, stopped.err
    assert stopped.out.count("stopped by a signal after") == 1
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_stopped.pth"


def normalise_in_two_processes(path):
    import sys

    import torch
    from detectron2.engine import launch

    from tests.det.small import save_normalised

    torch.manual_seed(0)
    launch(save_normalised, 2, dist_url="auto", args=(path,))
    sys.exit(0)


@needs_detectron2
def test_the_heads_norm_in_two_processes_is_that_of_one_in_bfloat16(launcher, tmp_path):
    """The second process has no objects, and the values are far from 0 beside their spread."""
    path = str(tmp_path / "normalised.pt")
    code = code_of(normalise_in_two_processes, path=path)
    done = launcher.run("unused", before=code, timeout=250)
    assert done.code == 0, done.err
    x, y = torch.load(path, weights_only=True)
    expected = torch.nn.BatchNorm2d(x.shape[1])(x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("files", "pictures"),
    [
        ("a/x.png b/x.jpg b/y.jpg", "x x-2 y"),
        ("a.png a.jpg a-2.png", "a a-3 a-2"),
        ("a-2.png a.png a.jpg a-2.jpg", "a-2 a a-3 a-2-2"),
        ("a.png A.jpg", "a A-2"),
    ],
)
def test_pictures_of_files_with_the_same_name_do_not_replace_each_other(files, pictures, tmp_path):
    names = target_names(files.split(), tmp_path)
    assert [path.stem for path in names] == pictures.split()


def test_a_picture_is_not_written_over_an_image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"x\.png is one of the images: give another folder"):
        target_names([tmp_path / "x.png"], tmp_path)


@pytest.mark.parametrize(
    ("line", "resume", "settings"),
    [
        ([], "none", []),
        (["--resume"], "auto", []),
        (["--resume", "auto", "train.epochs=2"], "auto", ["train.epochs=2"]),
        (["--resume", "train.epochs=2"], "auto", ["train.epochs=2"]),
        (["train.epochs=2", "--resume", "a/b.pth"], "a/b.pth", ["train.epochs=2"]),
        (["--output_dir", "o/it's"], "none", [r"train.output_dir='o/it\'s'"]),
    ],
)
def test_resume_and_output_dir_are_those_of_the_other_programs(line, resume, settings):
    args = parse_args(["--config-file", small.CONFIG, *line])
    assert (args.resume, args.overrides) == (resume, settings)


@needs_detectron2
def test_output_dir_sets_the_recipes_with_quotes_and_commas_too():
    from DET.config import load_config

    args = parse_args(["--config-file", small.CONFIG, "--output_dir", "o/it's=x, a"])
    assert load_config(args.config_file, args.overrides).train.output_dir == "o/it's=x, a"
