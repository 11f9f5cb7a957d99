"""Own mean and deviation: from flags and checkpoints to what a model gets."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from models_convmae import convmae_convvit_tiny_patch16
from models_teacher import load_teacher
from tests.pictures import picture
from tests.tools.small import GEOMETRY
from tools import embed, mean_std, visualize
from tools.inference import open_frozen
from util.data.transforms import channel_stats
from util.run.array_args import follow_checkpoint
from util.run.labeled_data import build_data, val_images
from util.run.normalization import (
    agreed_stats,
    complete_stats,
    given_stats,
    saved_stats,
)
from util.run.start import find_start
from util.weights.read import Weights, read_weights

OWN = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
FLAGS = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
IMAGENETS = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
FEW = ["--device", "cpu", "--num_workers", "0", "--batch_size", "2", "--input_size", "32"]


def saved(stats=OWN, **args: object) -> Weights:
    """What a checkpoint of a run with these numbers says of itself."""
    mean, std = map(list, stats)
    return Weights("run.pth", {}, {"args": {"in_chans": 3, "mean": mean, "std": std, **args}})


def completed(*flags: str, weights: Weights | None = None, in_chans: int = 3) -> argparse.Namespace:
    args = main_finetune.parse_args([*FEW, *flags])
    args.in_chans = in_chans
    complete_stats(args, weights)
    return args


# --- flags ---------------------------------------------------------------------------------------


def test_imagenets_numbers_are_as_good_as_none():
    assert given_stats(completed(*IMAGENETS)) is None
    assert completed(*IMAGENETS).mean is None  # so that a run without flags goes on


def test_a_checkpoints_numbers_are_taken_where_no_flag_is_given(capsys):
    assert given_stats(completed(weights=saved())) == OWN
    assert given_stats(completed(*FLAGS, weights=saved())) == OWN
    assert not capsys.readouterr().out


def test_flags_that_differ_from_the_checkpoint_are_told(capsys):
    assert given_stats(completed(*IMAGENETS, weights=saved())) is None
    assert "0.485 0.456 0.406 --std 0.229 0.224 0.225, those of run.pth were by --mean 0.1 0.2" in (
        capsys.readouterr().out
    )
    given = Weights("old.pth", {}, {"args": {"in_chans": 3}})
    assert given_stats(completed(*FLAGS, weights=given)) == OWN
    assert "those of old.pth were by --mean 0.485" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "in_chans", "mean"),
    [
        ((0.1, 0.2, 0.6), 1, [0.3]),
        ((0.2,), 3, [0.2] * 3),
        ((0.1, 0.2, 0.3), 4, [0.1, 0.2, 0.3, 0.5]),
    ],
)
def test_numbers_of_other_channels_become_those_of_these(there, in_chans, mean):
    args = completed(weights=saved((there, there)), in_chans=in_chans)
    assert args.mean == pytest.approx(mean)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": "0.1"}, {"std": [0.1, 0.0, 0.1]}, {"std": [0.1]}, {"mean": [float("nan")] * 3},
     {"arrays": True}],
)  # fmt: skip
def test_a_file_of_other_types_or_of_arrays_has_no_numbers_of_pictures(wrong):
    assert saved(**wrong).stats is None


def test_pictures_numbers_are_no_arrays():
    args = main_finetune.parse_args([*FEW, "--arrays"])
    follow_checkpoint(args, saved().args)
    assert args.mean is None


# --- what measures -------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_measured_flags_make_mean_0_and_deviation_1(in_chans, tmp_path, capsys):
    for i in range(3):
        picture(i, 24, 40 + 8 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"damaged")
    mean_std.main(mean_std.parse_args([str(tmp_path), "--in_chans", str(in_chans)]))
    out, err = capsys.readouterr()
    assert "3.png" in err and "3 of 4 files" in err
    args = completed(*out.split(), in_chans=in_chans)
    mode = {1: "L", 3: "RGB"}[in_chans]
    pixels = [np.asarray(picture(i, 24, 40 + 8 * i).convert(mode)) for i in range(3)]
    pixels = np.concatenate([p.reshape(-1, in_chans) for p in pixels]) / 255
    np.testing.assert_allclose(args.mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(args.std, pixels.std(0), rtol=1e-5)


def test_a_channel_that_never_changes_is_told(tmp_path, capsys):
    picture(0).point(lambda _: 51).save(tmp_path / "a.png")
    mean_std.main(mean_std.parse_args([str(tmp_path), "--in_chans", "1"]))
    assert "channel 1 never changes: give --std 1 for it" in capsys.readouterr().err


def test_some_files_spread_over_all_are_measured(tmp_path, capsys):
    for i, level in enumerate((0, 51, 102, 255)):
        picture(i).point(lambda _, level=level: level).save(tmp_path / f"{i}.png")
    mean_std.main(mean_std.parse_args([str(tmp_path), "--in_chans", "1", "--max_files", "2"]))
    assert capsys.readouterr().out == "--mean 0.2 --std 0.2\n"  # 0 and 102 of 255


# --- what a model gets ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of two plain pictures: (51, 102, 204) is (0.2, 0.4, 0.8)."""
    root = tmp_path_factory.mktemp("plain")
    for split, label, i in np.ndindex(2, 2, 2):
        path = root / ("train", "val")[split] / "ab"[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(0, 40, 40)
        image.paste((51, 102, 204), (0, 0, 40, 40))
        image.save(path)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pretraining checkpoint of a run with `OWN` numbers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("own") / "pretrained.pth"
    model = convmae_convvit_tiny_patch16(**GEOMETRY)
    args = {"model": "convmae_convvit_tiny_patch16", "input_size": [32, 32], "in_chans": 3}
    args |= {"mean": [*OWN[0]], "std": [*OWN[1]]}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def plain(images: torch.Tensor, stats=OWN) -> None:
    """The channels are those of `data`, normalised by `stats`."""
    values = [(v - m) / s for v, m, s in zip((0.2, 0.4, 0.8), *stats, strict=True)]
    expected = torch.tensor(values).view(3, 1, 1).expand_as(images)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_training_validation_and_evaluation_are_normalised_alike(data, pretrained, tmp_path):
    line = [*FEW, "--data_path", data, "--finetune", pretrained, "--output_dir", tmp_path / "o"]
    line += ["--aa", "none", "--reprob", "0"]
    args = main_finetune.parse_args(list(map(str, line)))
    _, weights = find_start(args, "fine-tuning")
    args.input_size, args.pin_mem = (32, 32), False
    loaders = build_data(args, main_finetune.build_transform(args))
    for loader in loaders:
        plain(next(loader.epoch(0))[0])
    args = main_finetune.parse_args([*FEW, "--eval", "--data_path", str(data)])
    args.input_size, args.pin_mem = (32, 32), False
    plain(next(val_images(args, weights).epoch(0))[0])


def test_pretraining_sees_what_it_says(data, tmp_path):
    seen = []

    def note(module, inputs):
        if type(module).__name__ == "MaskedAutoencoderConvViT":
            seen.append(inputs[0].clone())

    line = ["--data_path", data, "--output_dir", tmp_path, *FEW, *FLAGS, "--epochs", 1]
    line += ["--model", "convmae_convvit_tiny_patch16", "--patch_size", 2, 2, 1]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        main_pretrain.main(main_pretrain.parse_args(list(map(str, line))))
    finally:
        hook.remove()
    assert {len(images) for images in seen} == {2, 4}  # steps; the picture to watch
    for images in seen:
        plain(images)
    assert read_weights(tmp_path / "checkpoint.pth").stats == OWN


@pytest.mark.parametrize(("flags", "stats"), [([], OWN), (IMAGENETS, channel_stats(3))])
def test_a_frozen_model_sees_as_its_run_did_or_as_the_flags_say(flags, stats, data, pretrained):
    line = ["--checkpoint", str(pretrained), "--data_path", str(data / "val"), *FEW, *flags]
    frozen = open_frozen(embed.parse_args([*line, "--output", "x.npz"]))
    plain(frozen.dataset(data / "val").load(0), stats)


def test_a_teacher_sees_through_its_own_numbers_the_students(data, pretrained):
    teacher = load_teacher(str(pretrained))
    assert teacher.mean.tolist() == pytest.approx(OWN[0])
    ours, theirs = channel_stats(3), OWN
    image = torch.rand(1, 3, 1, 1)
    through = teacher.see_through(*ours, teacher.grid)
    by_student, by_teacher = (
        (image - torch.tensor(m).view(-1, 1, 1)) / torch.tensor(s).view(-1, 1, 1)
        for m, s in (ours, theirs)
    )
    torch.testing.assert_close(by_student * through.scale + through.shift, by_teacher)


def test_a_picture_of_reconstructions_shows_the_originals_colours(data, pretrained, tmp_path):
    grid = tmp_path / "grid.png"
    line = ["--checkpoint", pretrained, "--images", data / "val/a/0.png", "--output", grid]
    visualize.main(visualize.parse_args(list(map(str, line))))
    assert Image.open(grid).getpixel((40, 40)) == (51, 102, 204)


# --- other libraries' models ---------------------------------------------------------------------


def test_imagenets_numbers_of_a_recipe_give_way_to_the_checkpoints():
    recipe = (
        (123.675 / 255, 116.28 / 255, 103.53 / 255),
        (58.395 / 255, 57.12 / 255, 57.375 / 255),
    )
    stats, line = agreed_stats(recipe, saved())
    assert stats == OWN and line.startswith("images are normalised by --mean 0.1 0.2 0.3")
    assert saved_stats(recipe) == {"mean": None, "std": None}


def test_chosen_numbers_stay_and_are_told_to_differ():
    chosen = ((0.5,) * 3, (0.5,) * 3)
    stats, line = agreed_stats(chosen, saved())
    assert stats is chosen and line.startswith("note: images are normalised by --mean 0.5")


def test_equal_numbers_and_a_file_that_says_nothing_change_nothing():
    for weights in (saved(), Weights("bare.pth", {})):
        assert agreed_stats(OWN, weights) == (OWN, "")
