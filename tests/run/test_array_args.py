import argparse

import numpy as np
import pytest
import tifffile

import main_finetune
import main_pretrain
from tests.pictures import picture
from tools import mean_std
from util.errors import UsageError
from util.run.array_args import (
    array_format,
    complete_arrays,
    follow_checkpoint,
    random_view,
    tell_kind,
)
from util.run.pictures import load_samples

TWO = ["--in_chans", "2", "--mean", "1", "2", "--std", "3", "4"]


def pretraining(*flags: str) -> argparse.Namespace:
    return main_pretrain.parse_args(["--data_path", "x", *flags])


def test_pictures_are_pictures_unless_asked_otherwise():
    args = pretraining()
    assert (args.in_chans, args.arrays) == (3, None)


@pytest.mark.parametrize(
    "flags",
    [["--arrays"], ["--nodata", "-3.4e+38"], ["--layout", "chw"], ["--bands", "3", "2", "1"]],
)
def test_flags_of_arrays_ask_for_arrays(flags):
    args = pretraining(*flags, "--mean", "1", "2", "-3e-05", "--std", "1", "1", "1")
    assert (args.in_chans, args.arrays, args.mean[2]) == (3, True, -3e-5)
    form = array_format(args)
    assert form.nodata == (-3.4e38 if "--nodata" in flags else None)
    assert form.bands == ((3, 2, 1) if "--bands" in flags else None)


def test_another_number_of_channels_asks_for_arrays():
    assert pretraining(*TWO).arrays


REFUSED = {
    "no statistics": ("--in_chans 5", "give --mean and --std"),
    "too few": ("--in_chans 5 --mean 1 --std 1", "--mean takes 5 numbers, one for each channel"),
    "no spread": ("--arrays --in_chans 1 --mean 1 --std 0", "--std 0.0 must be above 0"),
    "two counts": ("--bands 1 2 --in_chans 3", "are 2 channels, not --in_chans 3"),
    "bounds": (
        "--arrays --in_chans 1 --mean 1 --std 1 --clip_min 2 --clip_max 1",
        "--clip_min 2 must be below",
    ),
    "one of both": ("--mean .5 .5 .5", "--mean goes with --std: give both"),
    "of 255": ("--mean 124 116 104 --std 58 57 57", "from 0 to 1: divide by 255"),
    "colour of gray": ("--in_chans 1 --mean .5 .5 .5 --std 1 1 1", "--mean takes 1 numbers"),
    "rgb of pictures": ("--rgb 1 2 3", "--rgb is for arrays"),
    "rgb beyond": (" ".join(TWO) + " --rgb 1 2 3", "there are 2 channels, counted from 1"),
    "infinite": ("--nodata inf", "must be a finite number"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_flags_that_do_not_go_together_are_refused_in_one_line(kind, capsys):
    flags, phrase = REFUSED[kind]
    with pytest.raises(SystemExit) as caught:
        pretraining(*flags.split())
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1 and phrase in line


def test_turns_need_a_square():
    args = pretraining(*TWO, "--rot90", "--input_size", "32", "64")
    with pytest.raises(UsageError, match="--rot90 needs a square --input_size, not 32 64"):
        random_view(args, rule=None)


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (["--aa", "rand-m9-mstd0.5-inc1"], "--aa rand-m9-mstd0.5-inc1 changes colours"),
        (["--color_jitter", "0.4"], "--color_jitter changes colours"),
    ],
)
def test_colour_operations_are_refused_for_arrays(flags, phrase):
    args = main_finetune.parse_args(["--batch_size", "2", *TWO, *flags])
    complete_arrays(args)
    args.input_size = (32, 32)
    with pytest.raises(UsageError, match=phrase):
        main_finetune.check_recipe(args)


def test_the_policy_of_colours_is_the_default_of_pictures_alone():
    for flags, expected in ((TWO, "none"), ([], "rand-m9-mstd0.5-inc1")):
        args = main_finetune.parse_args(["--batch_size", "2", *flags])
        complete_arrays(args)
        args.input_size = (32, 32)
        main_finetune.check_recipe(args)
        assert args.aa == expected


# --- the checkpoint ------------------------------------------------------------------------------


SAVED = dict(arrays=True, in_chans=2, mean=[1.0, 2.0], std=[3.0, 4.0], nodata=0.0, bands=[5, 1])


def test_flags_that_were_not_given_are_the_checkpoints():
    args = main_finetune.parse_args(["--nodata", "7"])
    follow_checkpoint(args, SAVED)
    assert (args.mean, args.std, args.bands, args.nodata) == ([1, 2], [3, 4], [5, 1], 7)


def test_nothing_is_taken_from_a_checkpoint_of_other_channels():
    args = main_finetune.parse_args(["--bands", "1", "2", "3"])
    follow_checkpoint(args, SAVED)
    assert (args.mean, args.nodata, args.in_chans) == (None, None, 3)


def test_values_of_another_type_are_not_taken():
    args = main_finetune.parse_args([])
    follow_checkpoint(args, SAVED | dict(mean="1 2", std=[None, 1], nodata=[0], arrays="yes"))
    assert (args.mean, args.std, args.nodata, args.arrays) == (None, None, None, None)


# --- the first file ------------------------------------------------------------------------------


def test_the_run_says_how_it_reads_files(tmp_path, capsys):
    (tmp_path / "a.npy").write_bytes(b"damaged")
    np.save(tmp_path / "b.npy", np.zeros((8, 9, 2), "u2"))
    tell_kind(pretraining(*TWO), tmp_path)
    out = capsys.readouterr().out
    assert "as arrays" in out and "b.npy is 8 x 9 of 2 channels (hwc), uint16\n" in out


def test_the_run_says_what_a_geotiff_calls_no_data(tmp_path, capsys):
    tag = (42113, "s", 0, "-9999", True)
    array = np.zeros((2, 8, 9), "i2")
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", extratags=[tag])
    tell_kind(pretraining(*TWO), tmp_path)
    assert "(chw), int16, -9999 is no data, as it says\n" in capsys.readouterr().out


def test_the_run_says_why_no_file_can_be_read(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((8, 9, 2), "c8"))
    tell_kind(pretraining(*TWO), tmp_path)
    assert "its numbers are of type complex64" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"the first: .*type complex64"):
        load_samples(tmp_path, (8, 8), 2, form=array_format(pretraining(*TWO)))


def test_files_of_other_channels_are_refused_at_the_start(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 9, 5), "u2"))
    with pytest.raises(UsageError, match="has no 2 channels first or last"):
        tell_kind(pretraining(*TWO), tmp_path)


def test_a_folder_of_arrays_read_as_pictures_names_the_flag(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 9, 3), "u1"))
    args = main_pretrain.parse_args(["--data_path", str(tmp_path), "--input_size", "32"])
    with pytest.raises(UsageError, match="--arrays reads"):
        main_pretrain.build_data(args)


# --- the command that measures -------------------------------------------------------------------


def test_the_measured_flags_are_flags_of_a_run(tmp_path, capsys):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.asarray(picture(i)).astype("f4") - 120)
    mean_std.main(mean_std.parse_args([str(tmp_path), "--clip_percentiles", "1", "99"]))
    flags = capsys.readouterr().out.split()
    args = pretraining("--arrays", *flags)
    values = np.stack([np.asarray(picture(i)) for i in range(3)]) - 120.0
    low, high = np.percentile(values.reshape(-1, 3), (1, 99), axis=0)
    np.testing.assert_allclose(args.mean, np.clip(values, low, high).mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(args.clip_max, high, rtol=1e-4)


def test_a_channel_that_never_changes_is_named(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.stack([np.arange(72.0), np.ones(72)]).reshape(2, 8, 9))
    mean_std.main(mean_std.parse_args([str(tmp_path), "--in_chans", "2"]))
    assert "channel 2 never changes: leave it away by --bands" in capsys.readouterr().err


def test_percentiles_in_the_wrong_order_are_refused(tmp_path):
    with pytest.raises(UsageError, match="the smaller comes first"):
        mean_std.main(mean_std.parse_args([str(tmp_path), "--clip_percentiles", "99", "1"]))
