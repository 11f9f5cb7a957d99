"""The programs from their command lines: what they train, find, refuse and write."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from SEG import options, train
from SEG.options import SPLITS
from SEG.predict import name_outputs
from SEG.resume import check_resumable
from tests.pictures import picture
from tests.runs import code_of
from tests.seg.small import CONFIG, CROP, OPTIONS, STATS
from util.errors import UsageError
from util.run.lock import FolderLock
from util.weights.read import read_weights

TINY = "SEG/configs/upernet_convmae_tiny_240.py"


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def miou(text: str) -> float:
    """The last mIoU in a program's output."""
    return float(re.findall(r"mIoU:? ([\d.]+)", text)[-1])


def refused(result) -> str:
    """The one line of a program that refused its input."""
    assert result.code == 2, result.out + result.err
    (line,) = result.err.strip().splitlines()
    return line


def test_a_run_loads_the_encoder_trains_validates_and_saves(trained):
    work, result = trained
    assert "patch_embed1.proj.weight (1 to 3 channels), pos_embed (4x4 to 12x12)" in result.out
    assert re.search(r"Iter\(train\) \[6/6\].* loss: \d", result.out)
    assert "mIoU" in result.out
    assert len(result.out.splitlines()) < 60, "environment and config are in the log's file"
    (log,) = work.glob("*/*.log")
    assert f"environment and config: {log}" in result.out
    assert "System environment" in log.read_text() and "Config:" in log.read_text()
    assert sorted(path.name for path in work.glob("*.pth")) == [
        "best_mIoU_iter_6.pth", "iter_2.pth", "iter_4.pth", "iter_6.pth"
    ]  # fmt: skip
    assert not list(work.glob("*.tmp"))


def test_a_checkpoint_holds_plain_values_and_tensors_only(trained):
    content = torch.load(trained[0] / "iter_6.pth", weights_only=True)
    assert {"state_dict", "optimizer", "param_schedulers", "message_hub", "meta"} <= content.keys()
    assert content["meta"]["dataset_meta"]["classes"] == [*"0123456789", "background"]
    assert content["meta"]["iter"] == 6


def test_images_are_normalised_as_in_the_pretraining_and_checkpoints_keep_it(trained):
    work, result = trained
    assert "images are normalised by --mean 0.3 0.3 0.3 --std 0.25 0.25 0.25" in result.out
    mean, std = read_weights(work / "iter_6.pth").stats
    assert mean == pytest.approx([STATS[0]] * 3) and std == pytest.approx([STATS[1]] * 3)
    config = options.read_config(train.parse_args([CONFIG]))
    options.use_stats(config, read_weights(work / "iter_6.pth"))
    assert config.model.data_preprocessor.mean == pytest.approx([255 * STATS[0]] * 3)


def test_a_run_is_not_resumed_with_another_normalisation(trained, tmp_path):
    chosen = ["--cfg-options", "model.data_preprocessor.mean=[9,9,9]"]
    config = options.read_config(train.parse_args([CONFIG, *chosen]))
    config.work_dir = str(tmp_path)
    with pytest.raises(
        UsageError, match=r"is of another run: images are normalised by --mean 0\.035"
    ):
        train.begin_from(config, None, str(trained[0] / "iter_4.pth"))


def test_a_resumed_run_goes_on_where_it_was_stopped(trained, programs, data, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(trained[0] / "iter_4.pth", work)
    (work / "iter_10.pth.tmp").write_bytes(b"half a checkpoint")
    result = programs.run("train", "--data-path", data, "--work-dir", work, "--resume")
    assert result.code == 0, result.err
    assert f"going on from {work / 'iter_4.pth'}" in result.out
    assert "[5/6]" in result.out and "[4/6]" not in result.out
    straight, resumed = (
        torch.load(folder / "iter_6.pth", weights_only=True) for folder in (trained[0], work)
    )
    first, second = (c["optimizer"]["param_groups"] for c in (straight, resumed))
    assert [group["lr"] for group in first] == [group["lr"] for group in second]
    assert {state["step"].item() for state in resumed["optimizer"]["state"].values()} == {6}


def signal_at(path: str, number: int) -> None:
    """SIGTERM comes at a method's call of that number."""
    import os
    import pkgutil
    import signal

    owner, name = path.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    method, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    setattr(owner, name, call)


def test_a_signal_in_a_validation_leaves_at_once_and_the_validation_is_made_up_for(
    programs, data, tmp_path
):
    command = ["train", "--data-path", data, "--work-dir", tmp_path, "--pretrained", "none"]
    options = ("train_cfg.val_interval=3", "default_hooks.checkpoint.interval=100")
    second = code_of(signal_at, path="mmseg.evaluation.IoUMetric.process", number=2)
    stopped = programs.run(*command, options=options, before=second)
    assert (stopped.code, stopped.err) == (0, ""), stopped.err
    assert "stopped by a signal in the validation after iteration 3 of 6" in stopped.out
    assert "mIoU: " not in stopped.out
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_3.pth"]
    resumed = programs.run(*command, "--resume", options=options)
    assert resumed.code == 0, resumed.err
    first, rest = resumed.out.split("Iter(train) [4/6]")
    assert "mIoU: " in first and "[6/6]" in rest and "mIoU: " in rest


def test_a_signal_before_training_is_one_line(programs, data, tmp_path):
    """As the model is built, by mmengine, which catches exceptions there."""
    command = ["train", "--data-path", data, "--work-dir", tmp_path, "--pretrained", "none"]
    first = code_of(signal_at, path="mmseg.models.UPerHead.__init__", number=1)
    stopped = programs.run(*command, before=first)
    assert (stopped.code, stopped.err) == (0, "")
    assert stopped.out.splitlines()[-1] == "stopped by a signal: there was nothing to save yet"


def test_a_signal_in_training_saves_at_the_end_of_a_step(programs, data, tmp_path):
    command = ["train", "--data-path", data, "--work-dir", tmp_path, "--pretrained", "none"]
    third = code_of(signal_at, path="mmseg.models.EncoderDecoder.loss", number=3)
    stopped = programs.run(*command, "--accum-iter", 2, before=third)
    assert stopped.code == 0, stopped.err
    assert "stopped by a signal after iteration 4 of 12" in stopped.out
    assert torch.load(tmp_path / "iter_4.pth", weights_only=True)["meta"]["iter"] == 4


def test_a_run_is_not_resumed_with_another_accumulation(trained, programs, data, tmp_path):
    last = trained[0] / "iter_4.pth"
    command = ["--data-path", data, "--output_dir", tmp_path, "--resume", last, "--accum_iter", 2]
    error = refused(programs.run("train", *command))
    assert "is of a run with --accum-iter 1" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["meta"]["dataset_meta"]["classes"].reverse(), "in another order"),
        (
            lambda c: c["meta"]["dataset_meta"].update(reduce_zero_label=False),
            "of a run without --ignore",
        ),
        (lambda c: c.pop("optimizer"), "its optimizer is missing"),
        (lambda c: c.update(meta=3), "its meta is damaged"),
        (lambda c: c["meta"].update(iter="4"), "does not say how far the run was"),
    ],
)
def test_a_checkpoint_that_is_not_of_this_run_is_not_gone_on_from(trained, data, change, words):
    content = torch.load(trained[0] / "iter_4.pth", weights_only=True)
    config = options.read_config(train.parse_args([CONFIG]))
    check_resumable(Path("iter_4.pth"), content, config)
    change(content)
    with pytest.raises(UsageError) as error:
        check_resumable(Path("iter_4.pth"), content, config)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["state_dict"].popitem(), "its model lacks auxiliary_head"),
        (lambda c: c["optimizer"]["state"].popitem(), "its optimizer lacks exp_avg"),
    ],
)
def test_a_state_of_another_form_is_not_gone_on_from(
    trained, programs, data, tmp_path, change, words
):
    content = torch.load(trained[0] / "iter_4.pth", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "iter_4.pth")
    result = programs.run("train", "--data-path", data, "--work-dir", tmp_path, "--resume")
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert words in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "resume"),
    [([], "none"), (["--resume"], "auto"), (["--resume", "a.pth"], "a.pth")],
)
def test_resume_and_output_dir_are_those_of_the_other_programs(line, resume):
    for command in ([CONFIG, *line, "--output_dir", "o"], ["--work-dir", "o", *line, CONFIG]):
        args = train.parse_args(command)
        assert (args.resume, args.work_dir, str(args.config)) == (resume, Path("o"), CONFIG)


def test_a_file_to_resume_from_counts_until_the_run_has_its_own(trained, tmp_path, capsys):
    config = options.read_config(train.parse_args([CONFIG]))
    config.work_dir = str(tmp_path)
    file = str(trained[0] / "iter_4.pth")
    assert train.begin_from(config, None, file) == 4 and config.load_from == file
    shutil.copy(trained[0] / "iter_6.pth", tmp_path)
    assert train.begin_from(config, None, file) == 6
    assert config.load_from == str(tmp_path / "iter_6.pth")
    assert "which the run began with" in capsys.readouterr().out


def test_resume_without_a_checkpoint_begins(programs, data, pretrained, tmp_path):
    arguments = ("--data-path", data, "--pretrained", pretrained, "--work-dir", tmp_path)
    result = programs.run("train", *arguments, "--resume", options=("train_cfg.max_iters=1",))
    assert result.code == 0, result.err
    assert "no checkpoint" in result.out and (tmp_path / "iter_1.pth").exists()


def test_testing_a_checkpoint_gives_the_validations_number_and_pictures(
    trained, programs, data, tmp_path
):
    work, training = trained
    shown = tmp_path / "shown"
    arguments = ("--data-path", data, "--show-dir", shown, "--work-dir", tmp_path)
    result = programs.run("test", work / "iter_6.pth", *arguments)
    assert result.code == 0, result.err
    assert miou(result.out) == pytest.approx(miou(training.out), abs=0.01)
    assert re.search(r"aAcc [\d.]+  mIoU [\d.]+  mAcc [\d.]+$", result.out.strip())
    for path in (data / "images" / "validation").iterdir():
        width, height = Image.open(path).size
        assert Image.open(shown / path.name).size == (3 * width, height)


def test_whole_images_larger_than_the_crop_and_of_odd_size(trained, programs, data, tmp_path):
    odd = tmp_path / "odd"
    for path in data.rglob("*.png"):
        image = Image.open(path)
        target = odd / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.crop((0, 0, image.width - 1, image.height - 3)).save(target)
    arguments = (trained[0] / "iter_6.pth", "--data-path", odd, "--work-dir", tmp_path)
    result = programs.run("test", *arguments, options=("model.test_cfg.mode=whole",))
    assert result.code == 0, result.err
    assert 0 <= miou(result.out) <= 100


def test_augmented_testing(trained, programs, data, tmp_path):
    arguments = (trained[0] / "iter_6.pth", "--data-path", data, "--work-dir", tmp_path)
    first = ("test_dataloader.dataset.indices=1",)
    result = programs.run("test", *arguments, "--tta", options=first)
    assert result.code == 0, result.err
    # One scene has not all the classes.
    assert 0 <= float(re.search(r"aAcc ([\d.]+)  mIoU nan", result.out)[1]) <= 100


def note_draws(folder: str) -> None:
    """Write a random number and the images of each training batch to a file for each process."""
    import os

    import torch
    from mmseg.models import EncoderDecoder

    loss, name = EncoderDecoder.loss, f"{folder}/{os.environ['RANK']}.txt"

    def noting(self, inputs, samples):
        with open(name, "a") as file:
            for sample in samples:
                print(torch.rand(()).item(), os.path.basename(sample.img_path), file=file)
        return loss(self, inputs, samples)

    EncoderDecoder.loss = noting


def test_two_processes_train_together_on_other_images_with_other_random_numbers(
    programs, data, tmp_path
):
    """Three images for each of them are one pass over the six; dropout draws for itself."""
    command = [CONFIG, "--data-path", data, "--pretrained", "none", "--work-dir", tmp_path]
    command += [*CROP, "--cfg-options", *OPTIONS, "train_cfg.max_iters=2"]
    noting = code_of(note_draws, folder=str(tmp_path))
    results = programs.launcher.run_ranks(*command, program="SEG.train", before=noting)
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    assert "note: 4 images a step" in results[0].out
    content = torch.load(tmp_path / "iter_2.pth", weights_only=True)
    assert all(t.isfinite().all() for t in content["state_dict"].values())
    first, second = ((tmp_path / f"{rank}.txt").read_text().split() for rank in (0, 1))
    images = {path.name for path in (data / "images" / "training").iterdir()}
    assert len(images) == 6 and {*first[1:6:2], *second[1:6:2]} == images
    assert not {*first[::2]} & {*second[::2]}


def test_prediction_writes_class_maps_and_overlays_of_any_pictures(trained, programs, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    picture(0, 48, 64).save(folder / "a.jpg")
    picture(1, 40, 56).convert("CMYK").save(folder / "deep" / "b.tiff")
    picture(2, 96, 72).convert("P").save(folder / "c.gif")
    alone = tmp_path / "alone.png"
    picture(3, 72, 48).convert("RGBA").save(alone)
    out = tmp_path / "out"
    result = programs.run("predict", trained[0] / "iter_6.pth", folder, alone, "--out", out)
    assert result.code == 0, result.err
    for name, size in (("a", (64, 48)), ("deep/b", (56, 40)), ("alone", (48, 72))):
        classes = Image.open(out / "classes" / f"{name}.png")
        assert classes.size == size and classes.mode == "P"
        assert np.asarray(classes).max() < 11
        overlay = Image.open(out / "overlays" / f"{name}.png")
        assert overlay.size == size and overlay.mode == "RGB"
        assert re.search(rf"^{name}: .*\d %", result.out.replace("%", " %"), re.MULTILINE)
    assert "3 images" in result.out


def test_a_class_map_is_not_written_over_a_picture(tmp_path):
    image = tmp_path / "classes" / "x.png"
    image.parent.mkdir()
    Image.new("RGB", (4, 4)).save(image)
    assert name_outputs([image], tmp_path / "out") == {"x": image}
    with pytest.raises(UsageError, match="is one of the images: give another folder"):
        name_outputs([image], tmp_path)


def test_prediction_skips_and_names_what_is_no_picture(trained, programs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    picture(0, 48, 64).save(tmp_path / "good.png")
    arguments = (tmp_path / "bad.png", tmp_path / "good.png", "--out", tmp_path / "out")
    result = programs.run("predict", trained[0] / "iter_6.pth", *arguments)
    assert result.code == 0 and "1 images" in result.out
    assert result.err.startswith(f"skipped: {tmp_path / 'bad.png'} cannot be decoded")
    result = programs.run(
        "predict", trained[0] / "iter_6.pth", tmp_path / "bad.png", "--out", tmp_path
    )
    assert result.code == 2 and "none of the images" in result.err


def test_a_hostile_checkpoint_runs_nothing(trained, programs, data, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "iter_4.pth"
    content = torch.load(trained[0] / "iter_4.pth", weights_only=True)
    torch.save(content | {"more": Hostile(trap)}, path, pickle_module=pickle)
    common = ("--data-path", data, "--work-dir", tmp_path)
    for name, arguments in (
        ("test", (path, *common)),
        ("predict", (path, data / "images", "--out", tmp_path / "out")),
        ("train", (*common, "--resume")),
        ("train", (*common, "--pretrained", path)),
    ):
        result = programs.run(name, *arguments)
        assert result.code in (0, 2), result.out + result.err
        assert not trap.exists(), name


def test_the_config_in_a_checkpoint_is_not_run(trained, programs, data, tmp_path):
    trap = tmp_path / "trap"
    content = torch.load(trained[0] / "iter_4.pth", weights_only=True)
    content["meta"]["config"] = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n"
    torch.save(content, tmp_path / "iter_4.pth")
    result = programs.run("train", "--data-path", data, "--work-dir", tmp_path, "--resume")
    assert result.code == 0, result.err
    assert not trap.exists()


def test_a_checkpoint_of_pretraining_cannot_be_tested(programs, pretrained, data):
    line = refused(programs.run("test", pretrained, "--data-path", data))
    assert "from pretraining, no trained segmentation model" in line
    assert f"SEG.train CONFIG --pretrained {pretrained}" in line


def test_other_classes_than_the_checkpoints_are_refused(trained, programs, data, tmp_path):
    arguments = ("--data-path", data, "--work-dir", tmp_path, "--classes")
    checkpoint = trained[0] / "iter_6.pth"
    line = refused(programs.run("test", checkpoint, *arguments, 12, "--ignore-zero"))
    assert line.startswith("error: --classes does not hold the classes of") and "12 here" in line
    assert "was trained with --ignore 0:" in refused(
        programs.run("test", checkpoint, *arguments, 11)
    )


def test_a_missing_checkpoint_to_begin_from_is_named(programs, data, tmp_path):
    arguments = ("--data-path", data, "--pretrained", "nowhere.pth", "--work-dir", tmp_path)
    line = refused(programs.run("train", *arguments))
    assert "nowhere.pth, does not exist" in line and "--pretrained none" in line


def test_a_missing_or_broken_config_is_one_line(programs, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    for path, words in ((tmp_path / "no.py", "does not exist"), (broken, "cannot be read")):
        line = refused(programs.launcher.run(path, program="SEG.train"))
        assert words in line and str(path) in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.decode_head.type=UperHead", "no model UperHead: did you mean UPerHead?"),
        ("train_dataloader.batch_size=abc", "batch_size"),
        ("train_dataloader.dataset.pipeline.2.type=Resice", "no transform Resice: did you mean R"),
        ("train_dataloader.dataset.pipeline.3.cat_max_ratio=abc", "(TypeError; "),
    ],
)
def test_what_mmengine_has_to_say_on_a_setting_is_one_line(
    programs, data, tmp_path, setting, words
):
    common = ("--data-path", data, "--work-dir", tmp_path, "--pretrained", "none")
    result = programs.run("train", *common, options=(setting,))
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert words in result.err.splitlines()[-1]


def test_mixed_precision_on_a_cpu_is_refused(programs, data, tmp_path):
    common = ("--data-path", data, "--work-dir", tmp_path)
    assert "GPUs only" in refused(programs.run("train", *common, "--amp", "bf16"))
    assert "GPUs only" in refused(programs.run("train", *common, "--amp", "fp16"))


# --- your own data -----------------------------------------------------------------------------


def own_data(root: Path, values=(0, 1, 2)) -> Path:
    """Two JPEG pictures a split with masks that hold these numbers; deep in folders."""
    for split in ("training", "validation"):
        for i in range(2):
            for kind in ("images", "annotations"):
                (root / kind / split / "x").mkdir(parents=True, exist_ok=True)
            picture(i, 48, 64).save(root / "images" / split / "x" / f"{i}.jpg")
            mask = np.resize(np.array(values), (48, 64)).astype(np.uint8)
            Image.fromarray(mask).save(root / "annotations" / split / "x" / f"{i}.png")
    return root


def train_on(programs, root: Path, *arguments: object):
    common = ("--pretrained", "none", "--work-dir", root / "work", "--data-path", root)
    return programs.run("train", *common, *arguments, options=("train_cfg.max_iters=1",))


def test_any_number_of_classes_by_the_command_line_alone(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 1, 2, 255))
    result = train_on(programs, root, "--classes", 3)
    assert result.code == 0, result.err
    content = torch.load(root / "work" / "iter_1.pth", weights_only=True)
    assert len(content["state_dict"]["decode_head.conv_seg.weight"]) == 3
    assert len(content["state_dict"]["auxiliary_head.conv_seg.weight"]) == 3


def test_camvids_folders_and_its_void_of_11_need_no_copy(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 1, 2, 11))
    for split in ("training", "validation"):
        (root / "images" / split).rename(root / split)
        (root / "annotations" / split).rename(root / f"{split}annot")
    folders = ("--val-data", "validation", "validationannot")
    folders += ("--data-path", root, "--crop-size", 64, "--work-dir", root / "work")
    folders += ("--cfg-options", *(f"{split}_dataloader.num_workers=0" for split in SPLITS))
    folders += tuple(f"{split}_dataloader.persistent_workers=False" for split in SPLITS)
    given = ("--train-data", "training", "trainingannot", "--classes", 3, "--ignore", 11)
    given += ("--pretrained", "none", "--iterations", 1)
    result = programs.launcher.run(TINY, *given, *folders, program="SEG.train")
    assert result.code == 0, result.err
    assert "masks for training: 3 of 3 classes, 25% of the pixels ignored" in result.out
    test = (TINY, root / "work" / "iter_1.pth", *folders)
    result = programs.launcher.run(*test, program="SEG.test")
    assert "masks for testing: 3 of 3 classes, 25% of the pixels ignored" in result.out
    line = refused(programs.launcher.run("--classes", 3, *test, program="SEG.test"))
    assert "was trained with --ignore 11: test it so" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, None), ({"train_cfg.val_interval": 7}, None), ({"train_cfg.max_iters": 9}, "say the sa")],
)
def test_another_length_keeps_the_shares_of_the_recipe(options, words):
    config = Config.fromfile("SEG/configs/upernet_convmae_base_512_slide_160k_ade20k.py")
    config.merge_from_dict(options)
    if words:
        with pytest.raises(UsageError, match=words):
            train.set_length(config, 16_000, options)
        return
    train.set_length(config, 16_000, options)
    warmup, decay = config.param_scheduler
    assert (warmup.begin, warmup.end, decay.begin, decay.end) == (0, 150, 150, 16_000)
    assert config.train_cfg.max_iters == 16_000
    assert config.train_cfg.val_interval == options.get("train_cfg.val_interval", 1600)
    assert config.default_hooks.checkpoint.interval == 400


def test_a_schedule_that_does_not_end_with_the_run_is_noted(capsys):
    config = Config.fromfile("SEG/configs/upernet_convmae_base_512_slide_160k_ade20k.py")
    train.set_length(config, None)
    assert capsys.readouterr().out == ""
    config.train_cfg.max_iters = 600
    train.set_length(config, None)
    assert "ends after 160,000 iterations, the run after 600" in capsys.readouterr().out


def test_names_of_classes_from_a_file_reach_the_prediction(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 1, 2))
    (root / "names.txt").write_text("road\nrail\n")
    result = train_on(programs, root, "--classes", root / "names.txt", "--ignore-zero")
    assert result.code == 0, result.err
    images = root / "images" / "validation"
    result = programs.run(
        "predict", root / "work" / "iter_1.pth", images, "--out", tmp_path / "out"
    )
    assert result.code == 0, result.err
    assert re.search(r"x/0: (road|rail) \d", result.out)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_number_that_is_no_class_is_one_clear_line(programs, tmp_path, workers):
    root = own_data(tmp_path, values=(0, 1, 7))
    workers = (f"train_dataloader.num_workers={workers}", "train_cfg.max_iters=1")
    arguments = ("--pretrained", "none", "--work-dir", root / "work", "--data-path", root)
    result = programs.run("train", *arguments, "--classes", 3, options=workers)
    assert result.code == 2, result.err
    line = result.err.strip().splitlines()[-1]
    assert line == (
        f"error: mask {root}/annotations/training/x/0.png holds 7 at row 0, column 2: 3 classes "
        f"are 0 … 2, 255 is ignored (and 1 more, which python -m SEG.check names)"
    )


def test_crops_of_any_shape_by_the_command_line_alone(programs, data, tmp_path):
    arguments = (CONFIG, "--data-path", data, "--pretrained", "none", "--work-dir", tmp_path)
    common = ("--crop-size", 32, 64, "--cfg-options", *OPTIONS, "train_cfg.max_iters=1")
    result = programs.launcher.run(*arguments, *common, program="SEG.train")
    assert result.code == 0, result.err
    state = torch.load(tmp_path / "iter_1.pth", weights_only=True)["state_dict"]
    table = state["backbone.blocks3.0.attn.relative_position_bias_table"]
    assert len(table) == (2 * 8 - 1) * (2 * 16 - 1)


def test_a_crop_that_the_patch_does_not_divide_is_one_clear_line(programs, data, tmp_path):
    arguments = (CONFIG, "--data-path", data, "--pretrained", "none", "--work-dir", tmp_path)
    result = programs.launcher.run(*arguments, "--crop-size", 34, program="SEG.train")
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("error: img_size 34x34 is not divisible by the patch of 4x4 pixels")


def test_a_missing_mask_is_one_clear_line(programs, tmp_path):
    root = own_data(tmp_path)
    (root / "annotations" / "training" / "x" / "1.png").unlink()
    result = train_on(programs, root, "--classes", 3)
    assert result.code == 2
    assert result.err.strip().splitlines()[-1] == (
        f"error: 1 of 2 images have no mask: {root}/images/training/x/1.jpg needs "
        f"{root}/annotations/training/x/1.png"
    )


def test_sizes_that_differ_are_one_clear_line(programs, tmp_path):
    root = own_data(tmp_path)
    for i in range(2):
        picture(i, 48, 56).save(root / "images" / "training" / "x" / f"{i}.jpg")
    result = train_on(programs, root, "--classes", 3)
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert "has 64x48 pixels, its image" in line and "has 56x48 (and 1 more" in line


def test_a_folder_without_images_is_one_clear_line(programs, tmp_path):
    result = train_on(programs, tmp_path, "--classes", 3)
    assert result.code == 2
    assert result.err.strip().splitlines()[-1] == (
        f"error: the data path {tmp_path}/images/training does not exist: give a folder of images"
    )


def test_a_picture_that_cannot_be_decoded_is_skipped_in_training(programs, tmp_path):
    root = own_data(tmp_path)
    (root / "images" / "training" / "x" / "0.jpg").write_bytes(b"no picture")
    result = train_on(programs, root, "--classes", 3)
    assert result.code == 0, result.err
    assert f"skipped: {root}/images/training/x/0.jpg cannot be decoded" in result.err


def test_a_test_takes_the_classes_and_their_numbers_from_the_checkpoint(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 1, 2))  # the config's classes begin at 1
    assert train_on(programs, root, "--classes", 3).code == 0
    command = (root / "work" / "iter_1.pth", "--data-path", root, "--work-dir", tmp_path / "test")
    alone, given = (programs.run("test", *command, *c) for c in ((), ("--classes", 3)))
    assert (alone.code, given.code) == (0, 0), alone.err + given.err
    assert alone.out.splitlines()[-1] == given.out.splitlines()[-1]
    assert "3 of 3 classes" in alone.out


def test_a_run_is_not_resumed_with_other_classes(programs, tmp_path):
    root = own_data(tmp_path, values=(1, 2))
    assert train_on(programs, root, "--classes", 3).code == 0
    assert "3 there" in refused(train_on(programs, root, "--classes", 4, "--resume"))
    line = refused(train_on(programs, root, "--classes", 3, "--ignore-zero", "--resume"))
    assert "is of a run without --ignore:" in line


def test_classes_without_a_pixel_are_named_and_choose_no_best_checkpoint(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 2, 255))
    result = train_on(programs, root, "--classes", 4)
    assert result.code == 0, result.err
    for what in ("training", "validation"):
        note = f"note: 2 of 4 classes have no pixel in the masks for {what} (class 1, class 3)"
        assert result.out.count(note) == 1
    assert "mIoU is not defined: 2 of 4 classes have no pixel" in result.out
    assert not list((root / "work").glob("best*"))


def test_masks_of_0_and_255_get_a_hint(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 255))
    line = refused(train_on(programs, root, "--classes", 2))
    assert "hold no class but class 0; 255 is ignored: if 255 means a class, write" in line


def test_masks_of_ignored_pixels_alone_are_refused_or_counted(programs, tmp_path):
    root = own_data(tmp_path, values=(255,))
    line = refused(train_on(programs, root, "--classes", 3))
    assert line == "error: the masks for training hold ignored pixels alone"
    mask = root / "annotations" / "training" / "x" / "0.png"
    Image.fromarray(np.resize(np.uint8([0, 1, 2]), (48, 64))).save(mask)
    result = train_on(programs, root, "--classes", 3)
    assert "1 masks for training have ignored pixels alone, such as" in result.out


def test_a_check_names_every_bad_file_and_counts_the_classes(programs, tmp_path):
    root = own_data(tmp_path, values=(0, 1))
    masks = root / "annotations" / "training" / "x"
    Image.new("L", (64, 48), 9).save(masks / "0.png")
    Image.new("L", (32, 48), 1).save(masks / "1.png")
    (root / "images" / "validation" / "x" / "1.jpg").write_bytes(b"no picture")
    command = (CONFIG, "--data-path", root, "--classes", 2)
    result = programs.launcher.run(*command, program="SEG.check")
    assert result.code == 2
    assert result.err.strip() == "error: 3 files cannot be used: those named above"
    for phrase in ("0.png holds 9 at row 0", "1.png has 32x48 pixels", "1.jpg cannot be decoded"):
        assert phrase in result.out
    assert re.search(r"^ +0 class 0 .* 50\.000%       1$", result.out, re.MULTILINE)


def test_a_damaged_picture_to_validate_on_is_told_before_training(programs, tmp_path):
    root = own_data(tmp_path)
    (root / "images" / "validation" / "x" / "0.jpg").write_bytes(b"no picture")
    result = train_on(programs, root, "--classes", 3)
    assert "validation/x/0.jpg cannot be decoded" in refused(result)
    assert "Iter(train)" not in result.out


def test_files_left_out_are_counted(programs, tmp_path):
    root = own_data(tmp_path)
    (root / "images" / "training" / "x" / "notes.txt").touch()
    Image.new("L", (4, 4)).save(root / "annotations" / "training" / "x" / "more.png")
    result = train_on(programs, root, "--classes", 3)
    assert f"{root}/images/training are left out: 1 of .txt" in result.out
    assert f"{root}/annotations/training are left out: 1 without an image" in result.out


def test_a_second_run_in_a_folder_is_refused(programs, data, tmp_path):
    with FolderLock(tmp_path):
        command = ("--data-path", data, "--pretrained", "none", "--work-dir", tmp_path)
        assert f"--work-dir {tmp_path}" in refused(programs.run("train", *command))


def test_ignore_zero_needs_classes(programs, data):
    line = refused(programs.run("train", "--data-path", data, "--ignore-zero"))
    assert "--ignore-zero go with --classes" in line


# --- the published recipes -----------------------------------------------------------------------

SHRUNK = (
    "model.backbone.embed_dim=(16,24,32)", "model.backbone.depth=(1,1,2)",
    "model.backbone.num_heads=2", "model.backbone.mlp_ratio=(2,2,2)",
    "model.decode_head.in_channels=[16,24,32,32]", "model.decode_head.channels=8",
    "model.auxiliary_head.in_channels=32", "model.auxiliary_head.channels=8",
    "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False",
    "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.logger.interval=1",
)  # fmt: skip


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_a_published_recipe_takes_real_steps(size, programs, data, tmp_path):
    config = f"SEG/configs/upernet_convmae_{size}_512_slide_160k_ade20k.py"
    command = [config, "--data-path", data, "--classes", 11, "--ignore-zero"]
    command += [
        "--pretrained",
        "none",
        "--work-dir",
        tmp_path,
        "--crop-size",
        96,
        "--accum-iter",
        2,
        "--cfg-options",
    ]
    result = programs.launcher.run(*command, *SHRUNK, program="SEG.train")
    assert result.code == 0, result.err
    (saved,) = tmp_path.glob("iter_*.pth")
    assert saved.name == "iter_4.pth"  # two steps of two micro-batches
    assert "mIoU" in result.out


def rates(folder):
    """The learning rates that a run logged, by iteration."""
    (log,) = folder.glob("*/vis_data/scalars.json")
    rows = map(json.loads, log.read_text().splitlines())
    return {row["iter"]: row["base_lr"] for row in rows if "base_lr" in row}


def test_steps_over_micro_batches_have_the_learning_rates_of_whole_steps(programs, data, tmp_path):
    for count in (1, 3):
        command = ["--data-path", data, "--pretrained", "none", "--accum-iter", count]
        result = programs.run("train", *command, "--work-dir", tmp_path / str(count))
        assert result.code == 0, result.err
    whole, parts = rates(tmp_path / "1"), rates(tmp_path / "3")
    assert list(whole) == [1, 2, 3, 4, 5, 6] and list(parts) == [3, 6, 9, 12, 15, 18]
    assert list(parts.values()) == pytest.approx(list(whole.values()))
