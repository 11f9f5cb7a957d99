import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs Detectron2")

from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from DET import engine
from DET.evaluation import Evaluator
from DET.trainer import ShuffledStream, Trainer
from tests.det import small
from tests.pictures import picture
from util.errors import TrainingError, UsageError
from util.run.optim_step import OptimStep
from util.run.program import Stopped
from util.weights.read import read_weights


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return small.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return small.write_encoder(tmp_path_factory.mktemp("encoder") / "checkpoint.pth")


@pytest.fixture(autouse=True)
def signals():
    """What a run does with signals ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(scenes, encoder, tmp_path_factory):
    """The folder of a run of three iterations from the encoder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    run(scenes, folder, f"train.init_checkpoint={encoder}", "train.checkpoint_epochs=0.3")
    return folder


def run(scenes, folder, *more, **options):
    return engine.run(small.arguments(small.overrides(scenes, folder, *more), **options))


def log(folder):
    return (folder / "log.txt").read_text()


def lines(folder):
    """What was written at each report, without evaluation's lines."""
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [row for row in rows if "total_loss" in row]


def weights(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def copy_of(scenes, folder):
    return Path(shutil.copytree(scenes, folder / "scenes"))


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_says_at_the_start_how_long_it_is(trained):
    text = log(trained)
    assert "1 epochs = 3 iterations of 2 images on 6" in text
    assert "Learning rate 0.001 (0.001 for 2 images, scaled with the batch)" in text
    assert "warm-up 1 iterations" in text


def test_a_pretrained_encoder_is_loaded_with_nothing_of_it_missing(trained):
    text = log(trained)
    report = text[text.index("weights of") :].splitlines()[:4]
    assert "patch_embed1.proj.weight (1 to 3 channels), pos_embed (8x8 to 16x16)" in report[1]
    assert "begin anew: global_rel_pos_bias, windowed_rel_pos_bias" in report[2]
    assert "unexpected" not in report[3]


def test_losses_are_written_at_every_report(trained):
    rows = lines(trained)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    parts = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    for row in rows:
        assert row["total_loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-4)
        assert row["grad_norm"] > 0 and row["lr"] > 0


def test_boxes_and_masks_are_evaluated_at_the_end(trained):
    text = log(trained)
    assert "Evaluation results for bbox" in text and "Evaluation results for segm" in text
    assert "with official COCO API" in text


def test_a_checkpoint_holds_the_classes_and_what_the_run_was(trained):
    found = read_weights(trained / "model_final.pth")
    assert found.kind == "detector" and found.num_classes == 10
    assert found.classes == list("0123456789")
    expected = {"epochs": 1, "images": 6, "batch_size": 2, "lr": 0.001, "input_size": 64}
    assert expected.items() <= found.args.items()


def test_images_are_normalised_as_in_the_pretraining_and_checkpoints_keep_it(trained):
    assert "normalised by --mean 0.3 0.3 0.3 --std 0.25 0.25 0.25, as those of" in log(trained)
    mean, std = read_weights(trained / "model_final.pth").stats
    assert mean == pytest.approx([0.3] * 3) and std == pytest.approx([0.25] * 3)


def test_another_normalisation_in_the_same_folder_is_refused(scenes, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"another run: images are normalised by --mean 0\.0392"):
        run(scenes, folder, "model.pixel_mean=[10,10,10]", resume="auto")


def test_a_run_that_goes_on_reaches_the_weights_of_one_that_was_never_stopped(
    scenes, trained, tmp_path
):
    for name in ("model_0000000.pth", "last_checkpoint"):
        shutil.copy(trained / name, tmp_path / name)
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    run(scenes, tmp_path, "train.checkpoint_epochs=0.3", resume="auto")
    assert [row["iteration"] for row in lines(tmp_path)] == [1, 2]
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=0, atol=0, msg=name)


def signal_in_evaluation(monkeypatch, number):
    """SIGTERM comes as a scene is evaluated, the `number`th of all; how many were, as a list."""
    seen, process = [], Evaluator.process

    def judge(*arguments):
        process(*arguments)
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "process", judge)
    return seen


def test_a_signal_in_an_evaluation_leaves_at_once_and_loses_nothing(scenes, tmp_path, monkeypatch):
    """Stopped in the second scene of the first evaluation and of the last one."""
    often = ("train.eval_epochs=0.3",)
    run(scenes, tmp_path / "whole", *often)
    for number, done in ((2, 1), (8, 3)):
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
            seen = signal_in_evaluation(patch, number)
            run(scenes, tmp_path / "parts", *often, resume="auto")
        assert f"in the evaluation after {done} of 3 iterations" in str(stop.value)
        assert len(seen) == number, "no further scene is evaluated"
    run(scenes, tmp_path / "parts", *often, resume="auto")
    assert [row["iteration"] for row in lines(tmp_path / "parts")] == [0, 1, 2]
    assert log(tmp_path / "parts").count("results for segm") == 3, "each evaluation is made up for"
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], tensor), name


def test_a_finished_run_in_another_folder_only_evaluates(scenes, trained, tmp_path):
    run(scenes, tmp_path, resume=str(trained / "model_final.pth"))
    assert "Nothing to train" in log(tmp_path) and "results for segm" in log(tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_another_schedule_in_the_same_folder_is_refused(scenes, trained, tmp_path):
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(trained / name, tmp_path / name)
    with pytest.raises(UsageError, match=r"another run .epochs 1 there, 2 here") as error:
        run(scenes, tmp_path, "train.epochs=2", resume="auto")
    advice = "a longer or another schedule is a new run, with another train.output_dir and"
    assert f"{advice} train.init_checkpoint={tmp_path}/model_final.pth" in str(error.value)


def test_other_classes_in_the_same_folder_are_refused(scenes, trained, tmp_path):
    some = copy_of(scenes, tmp_path)
    for split in small.IMAGES:
        small.change_json(
            some / f"{split}.json", lambda content: content["categories"][0].update(name="zero")
        )
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(trained / name, tmp_path / name)
    with pytest.raises(UsageError, match=r"another run .classes \['0', .* there, \['zero', "):
        run(some, tmp_path, resume="auto")


def other_moments(whole):
    """An optimizer's state of another shape, which torch would take."""
    whole["trainer"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    return whole


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole["model"],
        lambda whole: {**whole, "iteration": "2"},
        lambda whole: {**whole, "args": 5},
        lambda whole: {k: v for k, v in whole.items() if k != "trainer"},
        lambda whole: {**whole, "trainer": {}},
        lambda whole: {**whole, "random": {"torch": 3}},
        lambda whole: {**whole, "model": 3},
        lambda whole: {**whole, "trainer": {**whole["trainer"], "optimizer": {}}},
        other_moments,
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_one_line(scenes, trained, tmp_path, content):
    whole = torch.load(trained / "model_final.pth", weights_only=True)
    torch.save(content(whole), tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(UsageError) as error:
        run(scenes, tmp_path, resume="auto")
    assert "model_final.pth" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("note", [b"none.pth", b"", b"\xff\xfe", b"\0", b"x" * 5000])
def test_a_note_of_the_last_checkpoint_that_names_none_is_one_line(scenes, tmp_path, note):
    (tmp_path / "last_checkpoint").write_bytes(note)
    with pytest.raises(UsageError, match="last_checkpoint names no checkpoint of its folder"):
        run(scenes, tmp_path, resume="auto")


def test_another_model_in_the_same_folder_is_refused(scenes, trained, tmp_path):
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(trained / name, tmp_path / name)
    with pytest.raises(UsageError, match="holds another model than the recipe describes"):
        run(scenes, tmp_path, "model.backbone.bottom_up.depth=[1,1,3]", resume="auto")


def test_only_so_many_checkpoints_are_kept(scenes, tmp_path):
    more = ("train.checkpoint_epochs=0.3", "train.checkpoints_kept=1", "data.val.json=null")
    run(scenes, tmp_path, *more)
    kept = {path.name for path in tmp_path.glob("*.pth")}
    assert "model_0000000.pth" not in kept and "model_final.pth" in kept
    assert "results for" not in log(tmp_path)


def test_a_trained_detector_is_evaluated_to_the_numbers_of_its_run(scenes, trained, tmp_path):
    checkpoint = f"train.init_checkpoint={trained}/model_final.pth"
    run(scenes, tmp_path, checkpoint, eval_only=True)
    assert "tensors loaded" in log(tmp_path)

    def numbers(folder):
        return [
            line.split("copypaste: ")[1] for line in log(folder).splitlines() if "copypaste" in line
        ]

    assert len(numbers(tmp_path)) == 6 and numbers(tmp_path) == numbers(trained)[:6]


def test_gradients_are_accumulated_over_micro_batches_and_bfloat16_trains(scenes, tmp_path):
    more = ("train.accum_iter=2", "train.amp=bf16", "data.val.json=null")
    run(scenes, tmp_path, *more)
    assert "A step is 1 processes x 2 micro-batches x 1 images" in log(tmp_path)
    assert "bfloat16 on cpu" in log(tmp_path)
    assert [np.isfinite(row["total_loss"]) for row in lines(tmp_path)] == [True] * 3


def test_a_detector_begins_a_run_on_other_classes(scenes, trained, tmp_path):
    some = copy_of(scenes, tmp_path)

    def join(content):
        content["categories"] = [{"id": 1, "name": "digit"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1

    for split in small.IMAGES:
        small.change_json(some / f"{split}.json", join)
    begin = f"train.init_checkpoint={trained}/model_final.pth"
    run(some, tmp_path / "run", begin, "train.epochs=0.4", "train.warmup_epochs=0")
    assert "begin anew: roi_heads (6)" in log(tmp_path / "run")
    assert read_weights(tmp_path / "run" / "model_final.pth").classes == ["digit"]


# --- your own data -------------------------------------------------------------------------------


def test_without_masks_boxes_alone_are_trained_and_it_is_said(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)
    for split in small.IMAGES:
        small.change_json(
            some / f"{split}.json",
            lambda content: [a.pop("segmentation") for a in content["annotations"]],
        )
    run(some, tmp_path / "run")
    text = log(tmp_path / "run")
    assert "train.json has no masks: training boxes only" in text
    assert "results for bbox" in text and "results for segm" not in text
    assert all("loss_mask" not in row for row in lines(tmp_path / "run"))
    run(
        some,
        tmp_path / "eval",
        f"train.init_checkpoint={tmp_path}/run/model_final.pth",
        eval_only=True,
    )
    assert "results for bbox" in log(tmp_path / "eval")


def test_run_length_masks_are_trained(scenes, tmp_path):
    from pycocotools import mask as masks

    some = copy_of(scenes, tmp_path)

    def encode(content):
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for a in content["annotations"]:
            size = sizes[a["image_id"]]
            rle = masks.merge(masks.frPyObjects(a["segmentation"], *size))
            a["segmentation"] = {**rle, "counts": rle["counts"].decode()}

    small.change_json(some / "train.json", encode)
    run(some, tmp_path / "run", "data.val.json=null")
    assert all(row["loss_mask"] > 0 for row in lines(tmp_path / "run"))


def test_broken_annotations_are_counted_skipped_and_not_evaluated(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)

    def spoil(content):
        first = content["annotations"][0]
        del first["bbox"]
        for change in ({"iscrowd": 7}, {"bbox": [999, 4, 9, 9]}, {"bbox": [4, 4, 0, 9]}):
            content["annotations"].append({**first, **change, "id": 10_000})

    for split in small.IMAGES:
        small.change_json(some / f"{split}.json", spoil)
    (some / "train" / "0000.png").unlink()
    run(some, tmp_path / "run")
    text = log(tmp_path / "run")
    assert "skipped 1 annotation of zero area; skipped 1 annotation out of the image" in text
    assert "1 image whose file is missing" in text and "box taken from its mask: 1" in text
    assert "iterations of 2 images on 5" in text and "results for segm" in text


def test_boxes_without_masks_are_trained_and_evaluated_among_masks(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)

    def take_masks(content):
        for annotation in content["annotations"][::2]:
            annotation["segmentation"] = []

    for split in small.IMAGES:
        small.change_json(some / f"{split}.json", take_masks)
    run(some, tmp_path / "run")
    text = log(tmp_path / "run")
    assert text.count("without a mask count for boxes alone") == 2
    assert "results for bbox" in text and "results for segm" in text
    assert all(row["loss_mask"] > 0 for row in lines(tmp_path / "run"))


def test_images_without_objects_are_trained_on_if_wanted(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)
    small.change_json(
        some / "train.json",
        lambda content: content.update(
            annotations=[a for a in content["annotations"] if a["image_id"] == 1]
        ),
    )
    more = ("dataloader.train.dataset.filter_empty=false", "data.val.json=null", "train.epochs=2")
    run(some, tmp_path / "run", *more)
    rows = lines(tmp_path / "run")
    assert len(rows) == 6 and sorted({row["loss_mask"] > 0 for row in rows}) == [False, True]


def test_a_run_counts_the_images_without_objects(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)
    small.change_json(
        some / "train.json",
        lambda content: content.update(
            annotations=[a for a in content["annotations"] if a["image_id"] == 1]
        ),
    )
    run(some, tmp_path / "run", "data.val.json=null", "train.epochs=0.4", "train.warmup_epochs=0")
    assert "0.4 epochs = 1 iterations of 2 images on 6" in log(tmp_path / "run")


def test_a_damaged_image_is_named_and_skipped_in_training(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)
    (some / "train" / "0003.png").write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(some / "train" / "0004.png")
    run(some, tmp_path / "run", "data.val.json=null", "train.epochs=2")
    text = log(tmp_path / "run")
    assert "skipped an image" in text and "train/0003.png cannot be decoded" in text
    assert "train/0004.png" in text and len(lines(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read: it is no sound file of"),
        (lambda path: picture().save(path, "EPS"), "cannot be read: it is no sound file of"),
        (lambda path: Image.new("RGB", (5, 7)).save(path), "has 5x7 pixels, not "),
    ],
)
def test_images_that_cannot_be_evaluated_on_are_told_before_training(
    scenes, tmp_path, spoil, message
):
    some = copy_of(scenes, tmp_path)
    for name in ("0001.png", "0002.png"):
        spoil(some / "val" / name)
    with pytest.raises(UsageError) as error:
        run(some, tmp_path / "run")
    assert "cannot evaluate on 2 of the images of" in str(error.value)
    assert f"val/0001.png {message}" in str(error.value)
    assert not list((tmp_path / "run").glob("*.pth"))


def test_an_image_that_breaks_off_is_an_error_of_evaluation_that_names_it(
    scenes, trained, tmp_path
):
    some = copy_of(scenes, tmp_path)
    path = some / "val" / "0001.png"
    path.write_bytes(path.read_bytes()[:-60])
    begin = f"train.init_checkpoint={trained}/model_final.pth"
    with pytest.raises(TrainingError, match=r"cannot evaluate: .*val/0001\.png"):
        run(some, tmp_path / "run", begin, eval_only=True)


def test_a_grayscale_detector_reads_colour_files(scenes, encoder, tmp_path):
    more = (
        "model.backbone.bottom_up.in_chans=1", "model.pixel_mean=[127.5]", "model.pixel_std=[64]",
        "model.input_format=L", "dataloader.train.mapper.image_format=L",
        f"train.init_checkpoint={encoder}",
    )  # fmt: skip
    run(scenes, tmp_path, *more)
    assert "channels)" not in log(tmp_path) and "results for segm" in log(tmp_path)


# --- errors --------------------------------------------------------------------------------------


def test_classes_of_training_and_evaluation_must_be_the_same(scenes, tmp_path):
    some = copy_of(scenes, tmp_path)
    small.change_json(
        some / "val.json", lambda content: content["categories"][0].update(name="zero")
    )
    with pytest.raises(UsageError, match=r"train\.json \(0, 1.*val\.json \(zero, 1.*dif"):
        run(some, tmp_path / "run")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("''", "--eval-only needs a detector"),
        ("{encoder}", "is a whole masked autoencoder, from pretraining, no trained detector"),
        ("none.pth", "none.pth does not exist"),
    ],
)
def test_evaluation_needs_a_trained_detector(scenes, encoder, tmp_path, checkpoint, message):
    checkpoint = checkpoint.format(encoder=encoder)
    with pytest.raises(UsageError, match=message):
        run(scenes, tmp_path, f"train.init_checkpoint={checkpoint}", eval_only=True)


def test_a_detector_of_other_classes_cannot_be_evaluated(scenes, trained, tmp_path):
    some = copy_of(scenes, tmp_path)

    def add(content):
        content["categories"].append({"id": 11, "name": "ten"})

    small.change_json(some / "val.json", add)
    begin = f"train.init_checkpoint={trained}/model_final.pth"
    with pytest.raises(UsageError, match=r"detects 10 classes, .* has 11"):
        run(some, tmp_path / "run", begin, eval_only=True)


def test_a_detector_of_classes_in_another_order_cannot_be_evaluated(scenes, trained, tmp_path):
    some = copy_of(scenes, tmp_path)

    def swap(content):
        first, second = content["categories"][:2]
        first["name"], second["name"] = second["name"], first["name"]

    small.change_json(some / "val.json", swap)
    begin = f"train.init_checkpoint={trained}/model_final.pth"
    with pytest.raises(UsageError, match=r"detects 0, 1, 2.* in this order, 1, 0, 2"):
        run(some, tmp_path / "run", begin, eval_only=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataloader.train.sampller=null", "dataloader.train cannot be built with its settings: "),
        ("dataloader.train.dataset.names=none", "dataset cannot be built with its settings: "),
        ("dataloader.evaluator.max_dets_per_image=a", "max_dets_per_image a must be a whole num"),
        ("dataloader.evaluator.tasks=[boxes]", "dataloader.evaluator cannot be built with its"),
        ("optimizer.betas=[2,3]", "optimizer cannot be built with its settings: Invalid beta"),
        ("optimizer.betas=[a,b]", "optimizer cannot be built with its settings: "),
        ("lr_multiplier.warmup_method=a", "lr_multiplier cannot be built with its settings: "),
    ],
)
def test_settings_that_a_library_refuses_are_one_line(scenes, tmp_path, override, message):
    with pytest.raises(UsageError) as error:
        run(scenes, tmp_path, override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_of_another_size_is_refused(scenes, encoder, tmp_path):
    more = (f"train.init_checkpoint={encoder}", "model.backbone.bottom_up.embed_dim=[16,24,64]")
    with pytest.raises(UsageError, match="holds another size of model"):
        run(scenes, tmp_path, *more)


# --- parts ---------------------------------------------------------------------------------------


class Squares(nn.Module):
    """Two losses of a batch, means over it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch):
        x = torch.stack(batch) * self.weight
        return {"loss_a": (x[:, 0] ** 2).mean(), "loss_b": x[:, 1].mean()}


def stepped(micro_batches, accum_iter):
    """The model, the trainer and the stored numbers after one step."""
    model = Squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step = OptimStep(model, optimizer, torch.device("cpu"))
    trainer = Trainer(model, micro_batches, step, accum_iter, log_period=1)
    trainer.iter, trainer.max_iter = 0, 1
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
        latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    return model, trainer, latest


def test_two_micro_batches_take_the_step_of_one_batch():
    data = list(torch.randn(4, 2))
    whole, _, reported = stepped([data], 1)
    halves, _, same = stepped([data[:2], data[2:]], 2)
    torch.testing.assert_close(halves.weight, whole.weight)
    torch.testing.assert_close(halves.weight.grad, whole.weight.grad)
    for name in ("loss_a", "loss_b", "total_loss", "grad_norm"):
        assert same[name] == pytest.approx(reported[name])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    model, trainer, reported = stepped([[torch.tensor([float("inf"), 1.0])]], 1)
    assert model.weight.tolist() == [1.0, 2.0] and reported["skipped_steps"] == 1
    assert trainer.step.skipped.item() == 1


def test_ten_such_steps_in_a_row_end_the_run():
    model = Squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step = OptimStep(model, optimizer, torch.device("cpu"))
    batches = itertools.repeat([torch.tensor([float("nan"), 1.0])])
    trainer = Trainer(model, batches, step, accum_iter=1, log_period=1)
    with pytest.raises(TrainingError, match="in 10 steps in a row; the last checkpoint is intact"):
        trainer.train(0, 100)
    assert trainer.iter == 9 and model.weight.tolist() == [1.0, 2.0]


def test_proposals_that_are_not_finite_end_the_run_with_advice(scenes, tmp_path):
    with pytest.raises(TrainingError, match=r"predictions are not finite.*train\.clip_grad=1"):
        run(scenes, tmp_path, "optimizer.lr=1e30", "train.warmup_epochs=0", "train.epochs=3")


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    stream = iter(ShuffledStream(10, seed=0))
    epochs = [[next(stream) for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("start", [0, 3, 10, 27])
def test_a_stream_goes_on_where_it_was_stopped(start):
    whole, rest = iter(ShuffledStream(10, 0)), iter(ShuffledStream(10, 0, start))
    expected = [next(whole) for _ in range(start + 15)][start:]
    assert [next(rest) for _ in range(15)] == expected
