"""Pretraining, fine-tuning and testing on videos from their command lines."""

import csv
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from engine_evaluate import mean_over_views
from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import convvit_from_checkpoint
from tests.checks import (
    assert_close_end,
    assert_ok,
    assert_one_line,
    assert_same_end,
    command_line,
    curve,
    events,
    load,
    log_lines,
    weights,
)
from tests.runs import call
from tests.video.movies import write_classes, write_movie
from util.data.transforms import denormalize
from util.errors import UsageError
from util.run.args import derive_args
from util.run.geometry_args import fill_geometry_flags
from util.run.same_run import plain
from util.weights.read import Weights, read_weights
from VideoConvMAE import main_finetune, main_pretrain, visualize
from VideoConvMAE.args import complete_protocol
from VideoConvMAE.datasets import Views
from VideoConvMAE.decode import write_mp4
from VideoConvMAE.lists import find_unlabeled, find_videos
from VideoConvMAE.transforms import views_transform

PRETRAIN, FINETUNE = "VideoConvMAE.main_pretrain", "VideoConvMAE.main_finetune"
# A tiny model on 12 videos: 3 epochs of 3 steps take a second or two.
DEFAULTS = {
    "input_size": 32, "num_frames": 4, "stride": 2, "device": "cpu", "num_workers": 0,
    "batch_size": 4, "epochs": 3, "warmup_epochs": 1, "lr": 1e-3, "print_freq": 1, "save_steps": 1,
}  # fmt: skip
MODEL = {"patch_size": (2, 2, 2), "model": "videoconvmae_tiny_patch16_msd", "mask_ratio": 0.75}
# What makes a step depend on how the batch is split.
PLAIN = {"mixup": 0, "cutmix": 0, "drop_path": 0}
BARELY = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-12, "min_lr": 0}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """12 training and 5 validation videos of two classes."""
    train, val = {"jump": 6, "run": 6}, {"jump": 3, "run": 2}
    return write_classes(tmp_path_factory.mktemp("classes"), {"train": train, "val": val})


def pretrain_flags(data: Path, output: Path, *more: object, **values: object) -> list[object]:
    values = DEFAULTS | MODEL | {"data_path": data, "output_dir": output} | values
    return command_line(values, *more)


def finetune_flags(data: Path, output: Path, *more: object, **values: object) -> list[object]:
    views = {"test_clips": 2, "test_crops": 3}
    values = DEFAULTS | views | {"data_path": data, "output_dir": output} | values
    return command_line(values, *more)


@pytest.fixture(scope="session")
def pretrained_run(data, tmp_path_factory):
    """A pretraining that was never stopped, started as a user does it, and its folder."""
    output = tmp_path_factory.mktemp("pretrained")
    return call("-m", PRETRAIN, *pretrain_flags(data, output)), output


@pytest.fixture(scope="session")
def pretrained(pretrained_run) -> Path:
    assert_ok(pretrained_run[0])
    return pretrained_run[1]


@pytest.fixture(scope="session")
def finetuned_run(data, pretrained, launcher, tmp_path_factory):
    """A fine-tuning that was never stopped, and its folder."""
    output = tmp_path_factory.mktemp("finetuned")
    start = {"finetune": pretrained / "checkpoint.pth", "predictions": output / "all.csv"}
    return launcher.run(*finetune_flags(data, output, **start), program=FINETUNE), output


@pytest.fixture(scope="session")
def finetuned(finetuned_run) -> Path:
    assert_ok(finetuned_run[0])
    return finetuned_run[1]


# ---- Pretraining ---------------------------------------------------------------------------------


def test_pretraining_says_what_it_does_and_leaves_what_images_leave(pretrained_run):
    result, output = pretrained_run
    assert_ok(result)
    for phrase in (
        "videoconvmae_tiny_patch16_msd", "4x32x32 pixels, 8 of 32 patches visible",
        "12 videos of", "3 steps an epoch, each of 4 x 1 x 1", "Epoch 3/3  [3/3]",
    ):  # fmt: skip
        assert phrase in result.out
    assert [line["epoch"] for line in log_lines(output)] == [0, 1, 2]
    assert {"train_loss", "train_lr"} <= log_lines(output)[0].keys()
    assert [step for step, _ in curve(output, "train/loss")][-1] == 3000
    assert events(output).Tags()["images"] == ["pictures/reconstruction"]
    assert Image.open(output / "reconstruction.png").width > 4 * 32
    with av.open(str(output / "reconstruction.mp4")) as movie:
        assert len(list(movie.decode(video=0))) == 4
    assert (output / "loss.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_pretraining_goes_on_bit_for_bit(data, pretrained, launcher, tmp_path, number):
    flags = pretrain_flags(data, tmp_path)
    process = launcher.start(*flags, program=PRETRAIN)
    process.wait_for("Epoch 2/3  [1/3]")
    process.signal(number)
    assert process.wait().code == (0 if number == signal.SIGTERM else -number)
    result = launcher.run(*flags, program=PRETRAIN)
    assert_ok(result)
    assert "from epoch" in result.out
    assert_same_end(tmp_path, pretrained)


def test_two_processes_take_the_steps_of_one(data, pretrained, launcher, tmp_path):
    flags = pretrain_flags(data, tmp_path, batch_size=2)
    assert_ok(*launcher.run_ranks(*flags, program=PRETRAIN))
    assert_close_end(tmp_path, pretrained)


def test_random_masking_and_uniform_sampling_are_flags(data, launcher, tmp_path):
    options = {"masking": "random", "sampling": "uniform", "epochs": 2, "mask_ratio": 0.9}
    result = launcher.run(*pretrain_flags(data, tmp_path, **options), program=PRETRAIN)
    assert_ok(result)
    assert "4 of 32 patches visible" in result.out


def test_a_broken_video_is_skipped_counted_and_named(data, launcher, tmp_path):
    videos = write_classes(tmp_path / "v", {"train": {"jump": 7}})
    (videos / "train" / "jump" / "broken.mp4").write_bytes(b"no video")
    flags = pretrain_flags(videos, tmp_path / "o", max_bad_images=0.5)
    result = launcher.run(*flags, program=PRETRAIN)
    assert_ok(result)
    assert result.err.count("broken.mp4 cannot be decoded: skipped") == 1
    assert "bad_images 1" in result.out
    flags = pretrain_flags(videos, tmp_path / "p")
    result = launcher.run(*flags, program=PRETRAIN)
    assert result.code == 1
    assert "1 of 8 videos cannot be decoded, more than --max_bad_images 0.01" in result.err


# ---- Fine-tuning ---------------------------------------------------------------------------------


def test_fine_tuning_starts_from_pretraining_and_tests_the_best_on_all_views(finetuned_run):
    result, output = finetuned_run
    assert_ok(result)
    assert "95 tensors loaded" in result.out
    assert "missing there, begin anew: fc_norm (2), head (2)" in result.out
    assert "2 classes" in result.out
    assert result.out.count("on the 5 test videos") == 3 + 2
    assert [line["epoch"] for line in log_lines(output)] == [0, 1, 2]
    assert {"test_acc1", "test_acc5", "test_loss"} <= log_lines(output)[0].keys()
    content = load(output / "best_checkpoint.pth")
    assert content["classes"] == ["jump", "run"]


def test_predictions_are_written_for_each_video(data, finetuned):
    with open(finetuned / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == find_videos(data / "val").paths
    assert [row["label"] for row in rows] == ["jump"] * 3 + ["run"] * 2
    assert {row["prediction"] for row in rows} <= {"jump", "run"}


def test_the_test_averages_probabilities_over_clips_and_crops(data, finetuned):
    model = convvit_from_checkpoint(finetuned / "best_checkpoint.pth").eval()
    views = Views(find_videos(data / "val"), ["jump", "run"], views_transform((32, 32), 3),
                  clips=2, length=4, stride=2)  # fmt: skip
    with open(finetuned / "all.csv") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        with torch.no_grad():
            mean = sum(model(view[None]).softmax(1) for view in views[i, 0][0])[0] / 6
        assert row["prediction"] == ["jump", "run"][mean.argmax()]
        assert float(row["probability"]) == pytest.approx(mean.max().item(), abs=2e-6)


def test_mean_over_views_gives_logits_of_the_mean_probabilities():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    views = torch.randn(2, 3, 3, 2, 2)
    mean = torch.stack([model(views[:, v]).softmax(1) for v in range(3)]).mean(0)
    torch.testing.assert_close(mean_over_views(model, views).softmax(1), mean)
    torch.testing.assert_close(mean_over_views(model, views).exp(), mean)


def test_the_test_is_exact_over_processes(data, finetuned, launcher, tmp_path):
    def test(output, processes):
        resume = {"resume": finetuned / "best_checkpoint.pth", "predictions": output}
        flags = finetune_flags(data, tmp_path, "--eval", **resume)
        results = launcher.run_ranks(*flags, program=FINETUNE, processes=processes)
        assert_ok(*results)
        accuracy = [line for line in results[0].out.splitlines() if "Acc" in line]
        assert len(accuracy) == 1
        return accuracy, output.read_text()

    one, two = test(tmp_path / "1.csv", 1), test(tmp_path / "2.csv", 2)
    assert one == two
    assert one[1] == (finetuned / "all.csv").read_text()


def test_a_killed_fine_tuning_goes_on_bit_for_bit(data, pretrained, finetuned, launcher, tmp_path):
    flags = finetune_flags(data, tmp_path, finetune=pretrained / "checkpoint.pth",
                           predictions=tmp_path / "all.csv")  # fmt: skip
    process = launcher.start(*flags, program=FINETUNE)
    process.wait_for("Epoch 2/3  [1/3]")
    process.signal(signal.SIGKILL)
    process.wait()
    assert_ok(launcher.run(*flags, program=FINETUNE))
    assert_same_end(tmp_path, finetuned)
    assert (tmp_path / "all.csv").read_text() == (finetuned / "all.csv").read_text()


def test_two_processes_fine_tune_as_one(data, pretrained, launcher, tmp_path):
    start = {"finetune": pretrained / "checkpoint.pth"} | PLAIN
    flags = finetune_flags(data, tmp_path / "1", **start)
    assert_ok(launcher.run(*flags, program=FINETUNE))
    flags = finetune_flags(data, tmp_path / "2", batch_size=2, **start)
    assert_ok(*launcher.run_ranks(*flags, program=FINETUNE))
    assert_close_end(tmp_path / "2", tmp_path / "1")


def test_the_best_and_the_last_weights_are_tested_each_by_its_name(finetuned_run):
    result, output = finetuned_run
    tests = result.out.split("Test of the best epoch's weights, best_checkpoint.pth:")[1]
    best, last = tests.split("Test of the last epoch's weights, checkpoint.pth:")
    views = "tested on 2 clips x 3 crops of 4 frames (dense sampling, stride 2) at 32x32"
    for part in (best, last):
        assert part.count("on the 5 test videos") == 1
        assert views in part
    tested = [line for line in best.splitlines() if "* Acc@1" in line]
    assert f"* Acc@1 {100 * _accuracy(output / 'all.csv'):.3f} " in tested[0]


def _accuracy(predictions):
    with open(predictions) as file:
        rows = list(csv.DictReader(file))
    return sum(row["label"] == row["prediction"] for row in rows) / len(rows)


def test_a_test_takes_clips_as_the_run_did_and_flags_override(data, finetuned, launcher, tmp_path):
    def test(**flags):
        line = {"data_path": data, "output_dir": tmp_path, "device": "cpu", "num_workers": 0,
                "resume": finetuned / "best_checkpoint.pth"} | flags  # fmt: skip
        result = launcher.run(*command_line(line, "--eval"), program=FINETUNE)
        assert_ok(result)
        return result.out.splitlines()[-1]

    assert test() == "tested on 2 clips x 3 crops of 4 frames (dense sampling, stride 2) at 32x32"
    flags = {"sampling": "uniform", "test_clips": 1, "test_crops": 1}
    assert test(**flags) == "tested on 1 clips x 1 crops of 4 frames (uniform sampling) at 32x32"


def test_videos_without_labels_are_predicted_but_not_judged(data, finetuned, launcher, tmp_path):
    paths = find_videos(data / "val").paths
    (tmp_path / "unknown.txt").write_text("\n".join(paths))
    resume = {"resume": finetuned / "best_checkpoint.pth"}
    flags = finetune_flags(tmp_path / "unknown.txt", tmp_path, "--eval", **resume)
    result = launcher.run(*flags, "--predictions", tmp_path / "p.csv", program=FINETUNE)
    assert_ok(result)
    assert "no labels, so no accuracy on the 5 videos" in result.out
    assert "Acc" not in result.out
    with open(tmp_path / "p.csv") as file, open(finetuned / "all.csv") as known:
        rows, expected = list(csv.DictReader(file)), list(csv.DictReader(known))
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    assert {row["label"] for row in rows} == {""}
    result = launcher.run(*flags, program=FINETUNE)
    assert_one_line(result, 2, "has no labels", "--predictions")


@pytest.mark.parametrize(("program", "base"), [(PRETRAIN, 1e-5), (FINETUNE, 1e-6)])
def test_the_last_learning_rate_is_scaled_with_the_batch(program, base):
    main = main_pretrain if program == PRETRAIN else main_finetune
    args = main.parse_args(
        ["--batch_size", "64", "--accum_iter", "2", "--data_path", "x", "--input_size", "32"]
    )
    derive_args(args, "cpu", 4)
    assert args.min_lr == pytest.approx(base * 512 / 256)
    assert args.lr == pytest.approx(args.blr * 2)


def test_lists_and_random_weights(data, launcher, tmp_path):
    for split, name in (("train", "train.csv"), ("val", "val.txt")):
        videos = find_videos(data / split)
        rows = [f"{p} {7 * (c == 'run')}\n" for p, c in zip(videos.paths, videos.labels)]  # noqa: B905
        (tmp_path / name).write_text("".join(rows))
    model = {"model": "videoconvvit_tiny_patch16", "patch_size": (2, 2, 2)}
    options = {"sampling": "uniform", "temporal_kernel": 5} | BARELY | model
    result = launcher.run(*finetune_flags(tmp_path, tmp_path / "o", **options), program=FINETUNE)
    assert_ok(result)
    assert "8 classes" in result.out
    assert result.err.count("6 of 8 classes have none of the videos") == 1  # in three evaluations
    assert load(tmp_path / "o" / "checkpoint.pth")["classes"] == [str(i) for i in range(8)]
    assert weights(tmp_path / "o")["blocks1.0.attn.weight"].shape == (32, 1, 5, 5, 5)


def test_two_lists_of_any_name_by_data_path_and_val_path(data, pretrained, launcher, tmp_path):
    for name, split in (("mine.csv", "train"), ("theirs.csv", "val")):
        paths = find_videos(data / split).paths
        (tmp_path / name).write_text("".join(f"{path},{i % 2}\n" for i, path in enumerate(paths)))
    lists = {"val_path": tmp_path / "theirs.csv", "finetune": pretrained / "checkpoint.pth"}
    flags = finetune_flags(tmp_path / "mine.csv", tmp_path / "o", **lists, **BARELY)
    result = launcher.run(*flags, program=FINETUNE)
    assert_ok(result)
    assert "12 videos of" in result.out
    assert result.out.count("on the 5 test videos") == 1 + 2
    alone = {"val_path": tmp_path / "theirs.csv", "output_dir": tmp_path / "o"}
    result = launcher.run(*command_line(DEFAULTS | alone, "--eval"), program=FINETUNE)
    assert_ok(result)
    assert "on the 5 test videos" in result.out
    alone = {"val_path": data / "val" / "run", "output_dir": tmp_path / "o"}
    line = command_line(DEFAULTS | alone, "--eval")
    assert_one_line(launcher.run(*line, program=FINETUNE), 2, "has no labels")


@pytest.mark.parametrize("how", ["center", "average"])
def test_an_image_checkpoint_starts_a_video_model(data, launcher, tmp_path, how):
    torch.manual_seed(0)
    image = convmae_convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 2))
    args = {"model": "convmae_convvit_tiny_patch16", "input_size": [32, 32]}
    torch.save({"model": image.state_dict(), "args": args}, tmp_path / "image.pth")
    options = {"finetune": tmp_path / "image.pth", "inflate": how} | BARELY
    result = launcher.run(*finetune_flags(data, tmp_path / "o", **options), program=FINETUNE)
    assert_ok(result)
    kernel, ours = image.patch_embed1.proj.weight, weights(tmp_path / "o")
    middle, last = ours["patch_embed1.proj.weight"].unbind(2)
    expected = (0 * kernel, kernel) if how == "center" else (kernel / 2, kernel / 2)
    for got, want in zip((middle, last), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    positions = ours["pos_embed"].view(2, 16, -1)
    torch.testing.assert_close(positions[0], image.pos_embed[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(positions[1], image.pos_embed[0], rtol=0, atol=1e-6)


def test_an_image_checkpoint_starts_a_video_pretraining(data, launcher, tmp_path):
    torch.manual_seed(0)
    image = convmae_convvit_tiny_patch16(img_size=32, patch_size=(2, 2, 2))
    torch.save({"model": image.state_dict()}, tmp_path / "image.pth")
    start = {"finetune": tmp_path / "image.pth", "model": None, "patch_size": None} | BARELY
    result = launcher.run(*pretrain_flags(data, tmp_path / "o", **start), program=PRETRAIN)
    assert_ok(result)
    assert "videoconvmae_tiny_patch16: " in result.out
    assert "pos_embed (4x4 to 2x4x4)" in result.out
    (missing,) = [line for line in result.out.splitlines() if "begin anew:" in line]
    assert "decoder_blocks" in missing and "blocks1" not in missing
    kernel = weights(tmp_path / "o")["patch_embed1.proj.weight"]
    torch.testing.assert_close(kernel[:, :, 1], image.patch_embed1.proj.weight, rtol=0, atol=1e-6)


def test_a_video_checkpoint_starts_no_image_pretraining(data, pretrained, launcher, tmp_path):
    flags = {"data_path": data, "output_dir": tmp_path, "device": "cpu"}
    line = command_line(flags | {"finetune": pretrained / "checkpoint.pth"})
    result = launcher.run(*line, program="main_pretrain.py")
    assert_one_line(result, 2, "holds a video model", "VideoConvMAE.main_pretrain")


def test_repeats_do_not_change_the_number_of_steps(data, pretrained, launcher, tmp_path):
    options = {"finetune": pretrained / "checkpoint.pth", "repeats": 3} | BARELY
    result = launcher.run(*finetune_flags(data, tmp_path, **options), program=FINETUNE)
    assert_ok(result)
    assert "3 steps an epoch, each of 4 x 1 x 1 = 4 (" in result.out


# ---- Bad use -------------------------------------------------------------------------------------


def test_bad_use_is_one_line_and_exit_code_2(data, pretrained, launcher, tmp_path):
    def refused(program, line, *phrases):
        assert_one_line(launcher.run(*line, program=program), 2, *phrases)

    refused(PRETRAIN, [], "--data_path is missing")
    refused(PRETRAIN, pretrain_flags(tmp_path / "x", tmp_path / "o"), "does not exist")
    refused(PRETRAIN, pretrain_flags(data, tmp_path / "o", num_frames=3), "not divisible")
    refused(PRETRAIN, pretrain_flags(data, tmp_path / "o", temporal_kernel=4), "must be odd")
    refused(PRETRAIN, pretrain_flags(data, tmp_path / "o", mask_ratio=0.01), "keeps 16 of 16")
    long = pretrain_flags(data, tmp_path / "o", temporal_kernel=7)
    refused(PRETRAIN, long, "temporal_kernel 7 is longer than a clip of 4 frames in 2 cubes")
    refused(PRETRAIN, pretrain_flags(data, tmp_path / "o", in_chans=4), "no alpha channel")
    refused(PRETRAIN, pretrain_flags(data, tmp_path / "o", crop_scales=(0.5, 1)), "larger shares")
    refused(FINETUNE, finetune_flags(data, tmp_path / "o"), "what to start from?")
    start = {"finetune": pretrained / "checkpoint.pth"}
    refused(FINETUNE, finetune_flags(data / "val", tmp_path / "o", **start), "has none of train/")
    (tmp_path / "train.csv").touch()
    alone = finetune_flags(tmp_path / "train.csv", tmp_path / "o", **start)
    refused(FINETUNE, alone, "the list to train on, with another one in --val_path")
    refused(FINETUNE, finetune_flags(data, tmp_path / "o", aa="x", **start), "no RandAugment")
    refused(FINETUNE, finetune_flags(data, tmp_path / "o", tubelet=4, **start), "--tubelet 4")
    odd = finetune_flags(data, tmp_path / "o", batch_size=3, **start)
    refused(FINETUNE, odd, "--batch_size 3 x --repeats 1 must be even, as mixup pairs clips")
    turned = finetune_flags(data, tmp_path / "o", cutmix_minmax=(0.8, 0.2), **start)
    refused(FINETUNE, turned, "--cutmix_minmax 0.8 0.2: the smaller share comes first")
    random = {"model": "videoconvvit_tiny_patch16", "patch_size": (2, 2, 2), "temporal_kernel": 9}
    long = finetune_flags(data, tmp_path / "o", **random)
    refused(FINETUNE, long, "temporal_kernel 9 is longer than a clip of 4 frames")
    resume = {"resume": pretrained / "checkpoint.pth"}
    refused(FINETUNE, finetune_flags(data, tmp_path / "o", "--eval", **resume), "no trained head")


def test_a_video_checkpoint_is_no_image_models(data, pretrained, launcher, tmp_path):
    flags = {"data_path": data, "output_dir": tmp_path, "device": "cpu"}
    line = command_line(flags | {"finetune": pretrained / "checkpoint.pth"})
    result = launcher.run(*line, program="main_finetune.py")
    assert_one_line(result, 2, "holds a video model", "VideoConvMAE.main_finetune")


def test_resuming_with_other_frames_is_refused(data, pretrained, launcher):
    line = pretrain_flags(data, pretrained, num_frames=8)
    assert_one_line(launcher.run(*line, program=PRETRAIN), 2, "--num_frames 4 there, 8 here")


# ---- Pictures ------------------------------------------------------------------------------------


def test_reconstructions_of_any_videos_from_a_checkpoint(data, pretrained, launcher, tmp_path):
    line = ["--checkpoint", pretrained / "checkpoint.pth", "--output", tmp_path / "clips.png"]
    line += ["--videos", data / "val", write_movie(tmp_path / "a.mp4", 9), "--columns", 2]
    result = launcher.run(*line, program="VideoConvMAE.visualize")
    assert_ok(result)
    assert "4 videos" in result.out
    assert "error of the removed pixels" in result.out
    # Two columns of 64 pixels and their frames, three rows of each clip, the errors below.
    width, height = Image.open(tmp_path / "clips.png").size
    assert width == 134 + 12 and height > 4 * (200 + 6) + 6
    with av.open(str(tmp_path / "clips.mp4")) as movie:
        assert len(list(movie.decode(video=0))) == 4


def test_a_fine_tuned_checkpoint_cannot_reconstruct(finetuned, data, launcher, tmp_path):
    line = ["--checkpoint", finetuned / "checkpoint.pth", "--output", tmp_path / "clips.png"]
    result = launcher.run(*line, "--videos", data / "val", program="VideoConvMAE.visualize")
    assert_one_line(result, 2, "is a classifier: only a whole autoencoder can reconstruct")


def test_visualize_does_not_write_over_a_video(tmp_path):
    write_movie(tmp_path / "clip.mp4", 4)
    paths = {"checkpoint": "x.pth", "videos": tmp_path, "output": tmp_path / "clip.png"}
    with pytest.raises(UsageError, match=r"clip\.mp4, beside --output, is one of the videos"):
        visualize.main(visualize.parse_args(list(map(str, command_line(paths)))))


@pytest.mark.parametrize("held_out", ["white", "unreadable", None])
def test_a_run_is_watched_by_held_out_videos_where_some_can_be_read(held_out, tmp_path):
    for split, gray in (("train", 0), ("val", 255)):
        (tmp_path / split).mkdir()
        write_mp4(tmp_path / split / "a.mp4", np.full((4, 32, 32, 3), gray, np.uint8), 8)
    if held_out == "unreadable":
        (tmp_path / "val" / "a.mp4").write_bytes(b"nothing")
    elif held_out is None:
        (tmp_path / "val" / "a.mp4").unlink()
    line = {"data_path": tmp_path, "input_size": 32, "num_frames": 4, "in_chans": 3, "stride": 1}
    args = main_pretrain.parse_args(list(map(str, command_line(line))))
    args.input_size = (32, 32)
    complete_protocol(args)
    samples = visualize.load_samples(find_unlabeled(tmp_path, None), args)
    assert denormalize(samples, 1).mean().round() == (held_out == "white")


# ---- Normalisation, a share to validate on -------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_a_share_of_the_training_videos_is_held_out_and_tested(kind, tmp_path, capsys):
    root = write_classes(tmp_path, {"train": {"jump": 3, "run": 3}}) / "train"
    source = tmp_path
    if kind == "list":
        source = tmp_path / "all.csv"
        source.write_text("".join(f"{v} {v.parent.name}\n" for v in sorted(root.glob("*/*"))))
    flags = ["--data_path", source, "--batch_size", 2, "--num_workers", 0, "--device", "cpu"]
    flags += ["--input_size", 32, "--num_frames", 4]

    def parsed(*more: object):
        args = main_finetune.parse_args(list(map(str, [*flags, *more])))
        args.in_chans, args.input_size, args.pin_mem = 3, (32, 32), False
        return args

    args = parsed("--val_share", 0.3, "--seed", 5)
    train, val = (loader.dataset for loader in main_finetune.build_data(args))
    paths = [{dataset.path(i) for i in range(len(dataset))} for dataset in (train, val)]
    assert len(paths[0]) == 4 and len(paths[1]) == 2 and len(paths[0] | paths[1]) == 6
    assert sorted(val.labels) == [0, 1] and val.classes == ["jump", "run"]
    assert "validation: 2 of 6 videos of" in capsys.readouterr().out
    weights = Weights(tmp_path / "c.pth", {}, {"args": plain(args)})
    assert set(main_finetune.videos_to_test(parsed(), weights).paths) == paths[1]


def test_a_video_model_sees_as_its_run_did(data, finetuned, tmp_path):
    content = load(finetuned / "checkpoint.pth")
    content["args"] |= {"mean": [0.0, 0.5, 1.0], "std": [1.0, 0.5, 0.25]}
    torch.save(content, tmp_path / "own.pth")
    args = main_finetune.parse_args(["--eval", "--data_path", str(data), "--num_workers", "0"])
    weights = read_weights(tmp_path / "own.pth")
    fill_geometry_flags(args, weights.architecture, "own.pth")
    args.input_size, args.pin_mem = (32, 32), False
    views = main_finetune.load_test(args, weights).dataset
    clip = (views.load(0) * torch.tensor([1, 0.5, 0.25]).view(3, 1, 1, 1)).movedim(1, -1)
    pixels = (clip + torch.tensor([0, 0.5, 1])) * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    assert pixels.min() + 1e-3 >= 0 and pixels.max() <= 255.001
