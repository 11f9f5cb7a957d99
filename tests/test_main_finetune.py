"""Fine-tuning, probing and evaluation from their command lines."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import ConvViT, convvit_from_checkpoint
from tests.checks import (
    assert_close_end,
    assert_ok,
    assert_one_line,
    assert_same_end,
    command_line,
    curve,
    load,
    log_lines,
    same,
    weights,
)
from tests.pictures import picture
from tests.runs import code_of
from util.demo.digits import write_digits
from util.weights.read import read_weights

FINETUNE, PROBE = "main_finetune.py", "main_linprobe.py"
MAINS = pytest.mark.parametrize("program", [FINETUNE, PROBE], ids=["finetune", "probe"])
CLASSES = ["ant", "bee", "cat"]
# A tiny model on 24 images of 3 classes: 3 epochs of 6 steps take a second or two.
DEFAULTS = {
    "device": "cpu", "num_workers": 0, "batch_size": 4, "epochs": 3, "warmup_epochs": 1,
    "lr": 1e-3, "print_freq": 1, "save_freq": 2, "save_steps": 2,
}  # fmt: skip
# What makes a step depend on how the batch is split.
PLAIN = {"mixup": 0, "cutmix": 0, "drop_path": 0}
# An epoch that leaves the weights where they begin.
BARELY = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-12, "min_lr": 0}


def write_classes(folder: Path, counts: dict[str, dict[str, int]]) -> Path:
    """`folder/split/class/*.png`, so many of each."""
    for split, classes in counts.items():
        for label, (name, count) in enumerate(classes.items()):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                seed = 1000 * label + 100 * (split == "val") + i
                picture(seed, 40, 48).save(folder / split / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """24 training and 17 validation images."""
    train, val = dict.fromkeys(CLASSES, 8), dict(zip(CLASSES, (6, 6, 5), strict=True))
    return write_classes(tmp_path_factory.mktemp("classes"), {"train": train, "val": val})


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A pretraining checkpoint of 32-pixel images in 4-pixel patches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    model = convmae_convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 1))
    args = {"model": "convmae_convvit_tiny_patch16", "input_size": [32, 32]}
    torch.save({"model": model.state_dict(), "args": args, "epoch": 3}, path)
    return path


@pytest.fixture(scope="session")
def flags(data, pretrained):
    """A command line: `DEFAULTS` on `data` from `pretrained`, overridden."""

    def line(output: Path, *more: object, **values: object) -> list[object]:
        paths = {"data_path": data, "finetune": pretrained, "output_dir": output}
        return command_line(DEFAULTS | paths | values, *more)

    return line


@pytest.fixture(scope="session")
def finished(flags, launcher, tmp_path_factory):
    """The folder of a run of a main that was never stopped."""
    folders = {}

    def of(program: str) -> Path:
        if program not in folders:
            folders[program] = tmp_path_factory.mktemp("finished")
            result = launcher.run(*flags(folders[program]), program=program)
            assert_ok(result)
            (folders[program] / "out.txt").write_text(result.out)
        return folders[program]

    return of


# --- what a run does -----------------------------------------------------------------------------


@MAINS
def test_a_run_prints_a_line_of_accuracy_an_epoch(program, finished):
    out = (finished(program) / "out.txt").read_text()
    lines = [line for line in out.splitlines() if "Acc" in line]
    best = [line["test_acc1"] for line in log_lines(finished(program))]
    assert [float(line.rpartition(" best ")[2]) for line in lines] == [
        pytest.approx(max(best[: i + 1]), abs=1e-3) for i in range(3)
    ]
    assert all("* Acc@1 " in line and "on the 17 test images" in line for line in lines)
    assert "Acc@5" not in out  # there are three classes


@MAINS
def test_the_log_has_maes_keys(program, finished):
    for epoch, line in enumerate(log_lines(finished(program))):
        assert line["epoch"] == epoch
        expected = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "n_parameters"}
        assert expected <= line.keys()


@MAINS
def test_tensorboard_has_the_accuracy_of_each_epoch(program, finished):
    steps, values = zip(*curve(finished(program), "test/acc1"), strict=True)
    assert steps == (1000, 2000, 3000)
    assert values == pytest.approx([line["test_acc1"] for line in log_lines(finished(program))])


@MAINS
def test_the_best_checkpoint_is_the_one_of_the_highest_accuracy(program, finished):
    lines = log_lines(finished(program))
    best = load(finished(program) / "best_checkpoint.pth")
    highest = max(line["test_acc1"] for line in lines)
    first = next(line["epoch"] for line in lines if line["test_acc1"] == highest)
    assert best["epoch"] == first + 1
    assert best["best"] == {"acc1": highest}


@MAINS
def test_checkpoints_carry_class_names(program, finished):
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        assert load(finished(program) / name)["classes"] == CLASSES


def test_fine_tuning_starts_from_the_pretrained_encoder(pretrained, flags, launcher, tmp_path):
    result = launcher.run(*flags(tmp_path, **BARELY), program=FINETUNE)
    assert_ok(result)
    assert "missing there, begin anew: fc_norm (2), head (2)" in result.out
    before, after = load(pretrained)["model"], weights(tmp_path)
    for name in after.keys() & before.keys():
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    assert after["head.weight"].abs().max() < 2e-4  # drawn with a deviation of 2e-5


def test_fine_tuning_trains_every_parameter(pretrained, finished):
    before, after = load(pretrained)["model"], weights(finished(FINETUNE))
    for name, tensor in after.items():
        if name in before and not name.startswith("norm"):
            assert not torch.equal(tensor, before[name]), name


def test_a_probe_trains_its_head_alone(pretrained, finished):
    before, after = load(pretrained)["model"], weights(finished(PROBE))
    encoder = [name for name in after if name in before]
    assert len(encoder) > 80
    for name in encoder:
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(after["fc_norm.weight"], torch.ones(128))
    trained = {name for name in after if name.startswith("head.")}
    assert trained == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked",
        "head.1.weight", "head.1.bias",
    }  # fmt: skip
    assert after["head.1.bias"].abs().max() > 0


def test_a_probes_optimizer_holds_the_head_alone(finished):
    (group,) = load(finished(PROBE) / "checkpoint.pth")["optimizer"]["param_groups"]
    assert len(group["params"]) == 2 and group["weight_decay"] == 0


def test_averaged_weights_are_kept_evaluated_and_preferred(data, flags, launcher, tmp_path):
    result = launcher.run(
        *flags(tmp_path, "--model_ema", model_ema_decay=0.5, lr=1e-2), program=FINETUNE
    )
    assert_ok(result)
    assert result.out.count(", of the weights that are not averaged") == 3
    assert result.out.count("* Acc@1 ") == 6
    content, last = load(tmp_path / "checkpoint.pth"), log_lines(tmp_path)[-1]
    assert not same(content["model"], content["model_ema"])
    path = tmp_path / "checkpoint.pth"
    result = launcher.run(*evaluation(data, path), program=FINETUNE)
    assert f"* Acc@1 {last['test_ema_acc1']:.3f}" in result.out
    assert f"loss {last['test_ema_loss']:.3f}" in result.out


def test_an_input_of_another_size_gets_resized_positions(flags, launcher, tmp_path):
    result = launcher.run(
        *flags(tmp_path, epochs=1, warmup_epochs=0, input_size=(48, 32)), program=FINETUNE
    )
    assert_ok(result)
    assert "resized: pos_embed (8x8 to 12x8)" in result.out
    assert weights(tmp_path)["pos_embed"].shape == (1, 96, 128)


@MAINS
def test_the_first_tokens_mode_of_the_original(program, flags, launcher, tmp_path, data):
    command = flags(tmp_path, "--cls_token", epochs=1, warmup_epochs=0)
    assert_ok(launcher.run(*command, program=program))
    assert "norm.weight" in weights(tmp_path) and "fc_norm.weight" not in weights(tmp_path)
    assert convvit_from_checkpoint(tmp_path / "checkpoint.pth").global_pool == "token"
    result = launcher.run(*evaluation(data, tmp_path / "checkpoint.pth"), program=program)
    assert f"* Acc@1 {log_lines(tmp_path)[-1]['test_acc1']:.3f}" in result.out


def test_random_weights_are_probed_when_a_model_is_named(flags, launcher, tmp_path):
    model = {"model": "convvit_tiny_patch16", "patch_size": (2, 2, 1), "input_size": 32}
    command = flags(tmp_path, finetune=None, epochs=1, warmup_epochs=0, **model)
    result = launcher.run(*command, program=PROBE)
    assert_ok(result)
    assert "weights of" not in result.out


def test_a_classifier_of_the_same_classes_goes_on_with_its_head(
    finished, flags, launcher, tmp_path
):
    source = finished(FINETUNE) / "checkpoint.pth"
    settings = BARELY | {"finetune": source}
    result = launcher.run(*flags(tmp_path, **settings), program=FINETUNE)
    assert_ok(result)
    assert "begin anew" not in result.out
    torch.testing.assert_close(
        weights(tmp_path)["head.weight"], weights(finished(FINETUNE))["head.weight"]
    )


def test_a_classifier_of_other_classes_begins_its_head_anew(finished, flags, launcher, tmp_path):
    names = {"dog": 2, "elk": 2, "fox": 2}  # as many as before
    folder = write_classes(tmp_path / "other", {"train": names, "val": names})
    source = finished(FINETUNE) / "checkpoint.pth"
    settings = {"finetune": source, "data_path": folder, "batch_size": 2, "epochs": 1}
    result = launcher.run(*flags(tmp_path, warmup_epochs=0, **settings), program=FINETUNE)
    assert_ok(result)
    assert "begin anew: head (2)" in result.out


def test_accuracy_rises_on_what_can_be_learned(launcher, tmp_path):
    """Digits 0 and 1 from random weights, in four epochs."""
    digits = write_digits(tmp_path / "all")
    for split in ("train", "val"):
        for name in "01":
            shutil.copytree(digits / split / name, tmp_path / "two" / split / name)
    values = {
        **DEFAULTS, "data_path": tmp_path / "two", "output_dir": tmp_path / "run",
        "model": "convvit_tiny_patch16", "patch_size": (2, 2, 1), "input_size": 32, "in_chans": 1,
        "batch_size": 16, "epochs": 4, "aa": "none", "reprob": 0, **PLAIN, "print_freq": 100,
    }  # fmt: skip
    result = launcher.run(*command_line(values, "--no_hflip"), program=FINETUNE)
    assert_ok(result)
    assert log_lines(tmp_path / "run")[-1]["test_acc1"] > 90


# --- the same step, however the batch is split ---------------------------------------------------


@pytest.mark.parametrize(("processes", "batch", "accum"), [(2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_a_split_batch_of_fine_tuning_takes_the_same_steps(
    flags, launcher, tmp_path, one_process, processes, batch, accum
):
    settings = PLAIN | {"batch_size": batch, "accum_iter": accum}
    results = launcher.run_ranks(
        *flags(tmp_path, **settings), program=FINETUNE, processes=processes
    )
    assert_ok(*results)
    assert_close_end(tmp_path, one_process(FINETUNE))


def test_two_processes_probe_as_one(flags, launcher, tmp_path, one_process):
    assert_ok(*launcher.run_ranks(*flags(tmp_path, batch_size=4), program=PROBE))
    assert_close_end(tmp_path, one_process(PROBE))


@pytest.fixture(scope="session")
def one_process(flags, launcher, tmp_path_factory):
    """A run of one process with a batch of 8."""
    folders = {}

    def of(program: str) -> Path:
        if program not in folders:
            folders[program] = tmp_path_factory.mktemp("one")
            settings = PLAIN if program == FINETUNE else {}
            command = flags(folders[program], batch_size=8, **settings)
            assert_ok(launcher.run(*command, program=program))
        return folders[program]

    return of


# --- going on ------------------------------------------------------------------------------------


@MAINS
def test_a_killed_run_goes_on_in_mid_epoch_to_the_same_weights(
    program, finished, flags, launcher, tmp_path
):
    kills = 0
    for mark in ("Epoch 1/3  [3/6]", "Epoch 2/3  [5/6]", "Epoch 3/3  [1/6]"):
        process = launcher.start(*flags(tmp_path), program=program)
        process.wait_for(mark)
        process.signal(signal.SIGKILL)
        kills += process.wait().code == -signal.SIGKILL
    assert kills == 3
    assert_ok(launcher.run(*flags(tmp_path), program=program))
    assert_same_end(tmp_path, finished(program))


def signal_in_evaluation(number: int, batch: int) -> None:
    """Get a signal while a batch is evaluated, counted over all evaluations."""
    import os

    import engine_evaluate

    judge, calls = engine_evaluate.judge, []

    def judge_and_signal(*args):
        calls.append(args)
        if len(calls) == batch:
            os.kill(os.getpid(), number)
        return judge(*args)

    engine_evaluate.judge = judge_and_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_epoch_that_is_trained_is_not_lost_in_its_evaluation(
    number, finished, flags, launcher, tmp_path
):
    fault = code_of(signal_in_evaluation, number=int(number), batch=3)
    result = launcher.run(*flags(tmp_path, save_steps=0), program=FINETUNE, before=fault)
    if number == signal.SIGTERM:
        assert result.code == 0
        assert "stopped by a signal at the evaluation of epoch" in result.out
    else:
        assert result.code == -number
    saved = load(tmp_path / "checkpoint.pth")
    epoch, step = saved["epoch"], saved["step"]
    assert step == 6
    result = launcher.run(*flags(tmp_path, save_steps=0), program=FINETUNE)
    assert_ok(result)
    assert f"Epoch {epoch + 1}/3" not in result.out
    assert_same_end(tmp_path, finished(FINETUNE))


def test_averaged_weights_go_on_to_the_same_end(flags, launcher, tmp_path):
    command = ["--model_ema", "--model_ema_decay", 0.9]
    assert_ok(launcher.run(*flags(tmp_path / "never", *command), program=FINETUNE))
    process = launcher.start(*flags(tmp_path / "run", *command, save_steps=0), program=FINETUNE)
    process.wait_for("Epoch 2/3  [2/6]")
    process.signal(signal.SIGTERM)
    assert "stopped by a signal" in process.wait().out
    assert_ok(launcher.run(*flags(tmp_path / "run", *command, save_steps=0), program=FINETUNE))
    assert_same_end(tmp_path / "run", tmp_path / "never")


def test_the_average_of_a_short_run_is_of_trained_weights(flags, launcher, tmp_path):
    assert_ok(launcher.run(*flags(tmp_path, "--model_ema"), program=FINETUNE))
    content = load(tmp_path / "checkpoint.pth")
    trained, averaged = content["model"], content["model_ema"]
    # With timm's decay of 0.9999 alone it would be the weights that the run began with, whose
    # biases of the blocks are 0.
    bias = "blocks3.0.mlp.fc1.bias"
    assert torch.cosine_similarity(trained[bias], averaged[bias], dim=0) > 0.9
    assert 0.5 < averaged[bias].norm() / trained[bias].norm() < 1


def test_a_probe_of_one_image_a_step_is_refused(flags, launcher, tmp_path):
    result = launcher.run(*flags(tmp_path, batch_size=1), program=PROBE)
    assert_one_line(result, 2, "--batch_size 1: a probe's batch norm needs at least two images")


@MAINS
def test_a_finished_run_started_again_changes_nothing(program, finished, flags, launcher, tmp_path):
    output = shutil.copytree(finished(program), tmp_path / "run")
    result = launcher.run(*flags(output), program=program)
    assert_ok(result)
    assert "nothing to train" in result.out
    assert_same_end(output, finished(program))


def test_a_run_with_other_classes_is_not_resumed(finished, flags, launcher, data, tmp_path):
    output = shutil.copytree(finished(FINETUNE), tmp_path / "run")
    other = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (other / split / "cat").rename(other / split / "cow")
    result = launcher.run(*flags(output, data_path=other), program=FINETUNE)
    assert_one_line(
        result, 2, "the run to resume", "it lacks cat", "it has cow, which are not there"
    )


def test_a_pretraining_run_is_not_resumed_as_fine_tuning(
    flags, launcher, data, tmp_path, pretrained
):
    names = {"model": "convmae_convvit_tiny_patch16", "patch_size": (2, 2, 1), "input_size": 32}
    paths = {"data_path": data, "output_dir": tmp_path, "batch_size": 24, "epochs": 2}
    assert_ok(launcher.run(*command_line(DEFAULTS | paths | names)))
    result = launcher.run(*flags(tmp_path), program=FINETUNE)
    assert_one_line(result, 2, "belongs to a pretraining run", "--output_dir", "--finetune")


# --- evaluation ----------------------------------------------------------------------------------


def evaluation(data: Path, checkpoint: Path, *more: object, **values: object) -> list[object]:
    """The command line of an evaluation."""
    defaults = {"device": "cpu", "num_workers": 0, "batch_size": 4}
    paths = {"data_path": data, "resume": checkpoint}
    return command_line(defaults | paths | values, "--eval", *more)


def read_predictions(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_evaluates_each_image_once(
    finished, launcher, data, tmp_path, processes
):
    path = finished(FINETUNE) / "checkpoint.pth"
    command = evaluation(data, path, predictions=tmp_path / "predictions.csv")
    results = launcher.run_ranks(*command, program=FINETUNE, processes=processes)
    assert_ok(*results)
    last = log_lines(finished(FINETUNE))[-1]
    assert f"* Acc@1 {last['test_acc1']:.3f} loss {last['test_loss']:.3f}" in (results[0].out)
    assert "on the 17 test images" in results[0].out
    rows = read_predictions(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == sorted(map(str, (data / "val").rglob("*.png")))


def test_predictions_say_what_the_model_says(finished, launcher, data, tmp_path):
    path, file = finished(FINETUNE) / "checkpoint.pth", tmp_path / "predictions.csv"
    assert_ok(launcher.run(*evaluation(data, path, predictions=file), program=FINETUNE))
    rows = read_predictions(file)
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert 100 * right / 17 == pytest.approx(log_lines(finished(FINETUNE))[-1]["test_acc1"])
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.parametrize("more", [["--eval"], []], ids=["eval", "train"])
def test_predictions_that_cannot_be_written_are_found_at_the_start(more, flags, launcher, tmp_path):
    file = tmp_path / "no" / "predictions.csv"
    result = launcher.run(*flags(tmp_path, *more, predictions=file), program=FINETUNE)
    assert_one_line(result, 2, f"the folder of --predictions {file} does not exist")
    assert not (tmp_path / "log.txt").exists()


def test_a_class_without_an_image_to_evaluate_on_is_named(finished, launcher, data, tmp_path):
    shutil.copytree(data / "val", tmp_path / "val")
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    command = evaluation(tmp_path, finished(FINETUNE) / "checkpoint.pth")
    result = launcher.run(*command, program=FINETUNE)
    assert_one_line(result, 0, "1 of 3 classes", "(bee)")


def test_the_first_process_alone_evaluates_without_dist_eval(finished, launcher, data):
    command = evaluation(data, finished(FINETUNE) / "checkpoint.pth", "--no_dist_eval")
    results = launcher.run_ranks(*command, program=FINETUNE)
    assert_ok(*results)
    assert "on the 17 test images" in results[0].out


def test_eval_without_a_file_takes_the_best_checkpoint_of_the_run(finished, launcher, data):
    output = finished(FINETUNE)
    command = evaluation(data, None, output_dir=output)
    result = launcher.run(*command, program=FINETUNE)
    assert_ok(result)
    assert "best_checkpoint.pth" in result.out
    assert f"* Acc@1 {load(output / 'best_checkpoint.pth')['best']['acc1']:.3f}" in result.out


def test_a_folder_of_class_folders_can_be_evaluated_as_it_is(finished, launcher, data):
    path = finished(FINETUNE) / "checkpoint.pth"
    result = launcher.run(*evaluation(data / "val", path), program=FINETUNE)
    assert_ok(result)
    assert "on the 17 test images" in result.out


def test_a_file_that_cannot_be_decoded_is_named_and_left_out(finished, launcher, data, tmp_path):
    damaged = shutil.copytree(data / "val", tmp_path / "val")
    (damaged / "bee" / "02.png").write_bytes(b"no picture")
    path = finished(FINETUNE) / "checkpoint.pth"
    result = launcher.run(*evaluation(damaged, path, max_bad_images=0.1), program=FINETUNE)
    assert result.code == 0
    assert "bee/02.png cannot be decoded: skipped" in result.err
    assert "on the 16 test images" in result.out
    result = launcher.run(*evaluation(damaged, path), program=FINETUNE)
    assert result.code == 1
    assert "1 of 17 images cannot be decoded, more than --max_bad_images" in result.err


def test_a_checkpoint_of_the_originals_form_is_evaluated_with_a_note(launcher, data, tmp_path):
    """No class names, an argparse.Namespace, a probe's head."""
    import argparse

    torch.manual_seed(1)
    model = ConvViT(embed_dim=(8, 16, 64), depth=(1, 1, 1), num_heads=1, num_classes=3, img_size=32)
    model.add_probe_norm()
    model.head[0].running_mean.normal_()
    args = argparse.Namespace(model="convvit_base_patch16", input_size=32, nb_classes=3)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 89}, tmp_path / "x.pth")
    result = launcher.run(*evaluation(data, tmp_path / "x.pth"), program=PROBE)
    assert_ok(result)
    assert "does not name its classes" in result.out
    assert "on the 17 test images" in result.out


# --- what is refused -----------------------------------------------------------------------------


def changed_classes(data: Path, folder: Path, *names: str) -> Path:
    """A copy of `val/` whose class folders have other names; fewer names, fewer folders."""
    for old, new in zip(CLASSES, names, strict=False):
        shutil.copytree(data / "val" / old, folder / new)
    return folder


CLASS_MISTAKES = {
    "fewer": (("ant", "bee"), ["2 here, 3 there", "it lacks cat", "an empty folder stands for"]),
    "other names": (("ant", "bee", "cow"), ["it lacks cat", "it has cow, which are not there"]),
}


@pytest.mark.parametrize("kind", CLASS_MISTAKES)
def test_eval_on_other_classes_is_refused(kind, finished, launcher, data, tmp_path):
    names, phrases = CLASS_MISTAKES[kind]
    folder = changed_classes(data, tmp_path / "val", *names)
    result = launcher.run(
        *evaluation(folder, finished(FINETUNE) / "checkpoint.pth"), program=FINETUNE
    )
    assert_one_line(result, 2, str(folder), *phrases)


def test_eval_in_another_order_of_labels_is_refused(finished, launcher, data, tmp_path):
    content = load(finished(FINETUNE) / "checkpoint.pth")
    torch.save(content | {"classes": ["bee", "ant", "cat"]}, tmp_path / "x.pth")
    result = launcher.run(*evaluation(data, tmp_path / "x.pth"), program=FINETUNE)
    assert_one_line(result, 2, "same names in another order", "output 0 is bee there, ant here")


def test_eval_with_a_head_of_another_width_is_refused(finished, launcher, data, tmp_path):
    content = load(finished(FINETUNE) / "checkpoint.pth")
    del content["classes"]
    torch.save(content, tmp_path / "x.pth")
    folder = changed_classes(data, tmp_path / "val", "ant", "bee")
    result = launcher.run(*evaluation(folder, tmp_path / "x.pth"), program=FINETUNE)
    assert_one_line(result, 2, "tells 3 classes apart", "has 2 classes")


@MAINS
def test_eval_of_a_pretraining_checkpoint_is_refused(program, pretrained, launcher, data):
    result = launcher.run(*evaluation(data, pretrained), program=program)
    assert_one_line(result, 2, "--eval", "from pretraining", "no trained head")


def test_no_image_is_read_before_a_refusal(pretrained, launcher, tmp_path):
    result = launcher.run(*evaluation(tmp_path / "nowhere", pretrained), program=FINETUNE)
    assert_one_line(result, 2, "no trained head")


BAD_USE = {
    "nothing to start from": ({"finetune": None}, ["--finetune FILE", "--model NAME"]),
    "another size": (
        {"model": "convvit_base_patch16"}, ["--model convvit_base_patch16", "tiny (widths 32-64-"]
    ),
    "another patch": ({"patch_size": (4, 2, 2)}, ["--patch_size 4 2 2", "2 2 1"]),
    "other channels": ({"in_chans": 1}, ["--in_chans 1", "holds: 3"]),
    "a size that does not divide": ({"input_size": 30}, ["30x30", "4x4"]),
    "no such file": ({"finetune": "nowhere.pth"}, ["nowhere.pth", "does not exist"]),
    "no data": ({"data_path": "nowhere"}, ["nowhere has no train/"]),
    "no data path": ({"data_path": None}, ["--data_path is missing"]),
    "odd batch with mixup": ({"batch_size": 3}, ["--batch_size 3 must be even", "--mixup 0"]),
    "odd batch with cutmix by its sides": (
        {"batch_size": 3, "mixup": 0, "cutmix": 0, "cutmix_minmax": (0.2, 0.8)},
        ["--batch_size 3 must be even"],
    ),
    "no choice of sides": ({"cutmix_minmax": (0.5, 0.51)}, ["--cutmix_minmax 0.5 0.51", "32x32"]),
    "other number of classes": ({"nb_classes": 1000}, ["--nb_classes 1000", "has 3 classes"]),
    "end above the peak": ({"lr": None, "min_lr": 0.1}, ["--min_lr 0.1", "--blr 0.0005"]),
    "unknown policy": ({"aa": "rnd-m9"}, ["--aa rnd-m9 is no policy", "rand-m9"]),
    "too much drop path": ({"drop_path": 2}, ["--drop_path", "between 0 and 1"]),
    "an unknown flag": ({"nb_class": 3}, ["unknown argument --nb_class"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_USE)
def test_bad_use_of_fine_tuning_is_one_line(kind, flags, launcher, tmp_path):
    values, phrases = BAD_USE[kind]
    result = launcher.run(*flags(tmp_path / "run", **values), program=FINETUNE)
    assert_one_line(result, 2, *phrases)
    assert not list(tmp_path.rglob("*.pth"))


def test_a_segmentors_checkpoint_is_refused_with_what_it_is(flags, launcher, tmp_path):
    model = nn.ModuleDict({"backbone": convmae_convvit_tiny_patch16(img_size=32)})
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    result = launcher.run(*flags(tmp_path, finetune=tmp_path / "x.pth"), program=FINETUNE)
    assert_one_line(result, 2, "is a segmentation model")


@pytest.mark.parametrize("values", [{"resume": None}, {"resume": "nowhere.pth"}])
def test_eval_without_a_checkpoint_is_refused(values, launcher, data, tmp_path):
    command = evaluation(data, None, output_dir=tmp_path / "empty", **values)
    result = launcher.run(*command, program=FINETUNE)
    assert_one_line(result, 2, "--resume FILE" if values["resume"] is None else "nowhere.pth")


@MAINS
@pytest.mark.parametrize(("classes", "code"), [(3, 0), (4, 2)])
def test_eval_checks_the_number_of_classes(program, classes, code, finished, launcher, data):
    command = evaluation(data, finished(program) / "checkpoint.pth", nb_classes=classes)
    result = launcher.run(*command, program=program)
    assert result.code == code
    assert ("--nb_classes 4: " in result.err) == (code == 2)


def test_timms_settings_of_mixing_and_erasing_train(flags, launcher, tmp_path):
    settings = {"mixup_mode": "elem", "cutmix_minmax": (0.2, 0.8), "remode": "const", "recount": 3}
    result = launcher.run(*flags(tmp_path, epochs=1, warmup_epochs=0, **settings), program=FINETUNE)
    assert_ok(result)
    assert load(tmp_path / "checkpoint.pth")["args"]["cutmix_minmax"] == [0.2, 0.8]


def test_eval_with_finetune_is_refused(pretrained, launcher, data):
    command = evaluation(data, None, finetune=pretrained)
    assert_one_line(launcher.run(*command, program=FINETUNE), 2, "--resume FILE", "--finetune")


FOLDER_MISTAKES = {
    "no val": (lambda d: shutil.rmtree(d / "val"), "has no val/"),
    "no class folders": (
        lambda d: (
            [p.rename(d / "train" / f"{i}.png") for i, p in enumerate(d.glob("train/*/*"))]
            + [p.rmdir() for p in (d / "train").iterdir() if p.is_dir()]
        ),
        "has no class folders",
    ),
    "an image outside": (
        lambda d: shutil.copy(d / "train/ant/00.png", d / "train/stray.png"),
        "1 images of",
    ),
    "an empty class": (lambda d: (d / "train" / "dog").mkdir(), "no image in dog"),
    "other classes": (lambda d: (d / "val" / "cat").rename(d / "val" / "cow"), "it lacks cat"),
}


@pytest.mark.parametrize("kind", FOLDER_MISTAKES)
def test_a_folder_of_another_layout_is_refused(kind, data, flags, launcher, tmp_path):
    spoil, phrase = FOLDER_MISTAKES[kind]
    folder = shutil.copytree(data, tmp_path / "data")
    spoil(folder)
    result = launcher.run(*flags(tmp_path / "run", data_path=folder), program=FINETUNE)
    assert_one_line(result, 2, phrase)


# --- help, export, compare -----------------------------------------------------------------------


@MAINS
def test_help_is_grouped(launcher, program):
    result = launcher.run("--help", program=program)
    assert result.code == 0
    for group in ("data:", "augmentation:", "model:", "optimization:", "evaluation:", "run:"):
        assert f"\n{group}\n" in result.out


def test_an_exported_classifier_has_the_same_accuracy(finished, launcher, data, tmp_path):
    path, exported = finished(FINETUNE) / "checkpoint.pth", tmp_path / "model.safetensors"
    assert_ok(launcher.run("export", path, "--to", exported, program="tools.checkpoint"))
    assert read_weights(exported).classes == CLASSES
    outs = [
        launcher.run(*evaluation(data, file), program=FINETUNE).out for file in (path, exported)
    ]
    assert outs[0].splitlines()[-1] == outs[1].splitlines()[-1]


def test_runs_are_compared_in_a_table(finished, launcher, tmp_path):
    last = log_lines(finished(PROBE))[-1]
    result = launcher.run(finished(PROBE), finished(FINETUNE), program="tools.compare")
    assert_ok(result)
    head, _, probe, finetune = result.out.splitlines()
    assert "best acc@1" in head
    assert f"{last['test_acc1']:.2f}" in probe and finished(FINETUNE).name in finetune


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_a_log_cannot_be_compared(content, launcher, tmp_path):
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    assert_one_line(launcher.run(tmp_path, program="tools.compare"), 2, "log.txt")


def test_the_table_of_a_pretraining_has_no_accuracy(launcher, tmp_path):
    (tmp_path / "log.txt").write_text(json.dumps({"train_loss": 0.5, "epoch": 0}) + "\n")
    result = launcher.run(tmp_path, program="tools.compare")
    assert "0.5000" in result.out and "–" in result.out
