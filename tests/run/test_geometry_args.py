"""The flags of a model's geometry, filled from a checkpoint's architecture or the defaults."""

import argparse

import pytest

from util.errors import UsageError
from util.layers.architecture import SIZES, Architecture
from util.layers.geometry import Geometry
from util.run.geometry_args import described_architecture, fill_geometry_flags

SMALL = Architecture(geometry=Geometry.of((48, 64), (2, 2, 2)), in_chans=1, **SIZES["small"])
BLOCKS = dict(embed_dim=None, depth=None, num_heads=None, mlp_ratio=None, kernel_size=None)
FLAGS = dict(input_size=None, patch_size=None, in_chans=None, **BLOCKS)
BASE = {"model": "convvit_base_patch16"}
CLIP = dict(num_frames=None, tubelet=None, temporal_kernel=None)


def flags(**given):
    return argparse.Namespace(**{"model": None, **FLAGS, **given})


def filled(found, **given):
    args = flags(**given)
    fill_geometry_flags(args, found, "x.pth")
    return args


def test_without_a_checkpoint_flags_have_the_defaults():
    args = filled(None, model="convvit_tiny_patch16")
    assert (args.input_size, args.patch_size, args.in_chans) == ([224, 224], [4, 2, 2], 3)


def test_a_checkpoint_decides_what_is_not_given():
    args = filled(SMALL)
    assert (args.input_size, args.patch_size, args.in_chans) == ([48, 64], [2, 2, 2], 1)
    assert described_architecture(args, SMALL) == SMALL


def test_another_input_size_than_the_checkpoints_stays():
    args = filled(SMALL, input_size=[96])
    assert args.input_size == [96]
    assert described_architecture(args, SMALL).img_size == (96, 96)


def test_a_picture_checkpoint_leaves_clips_to_flags_and_defaults():
    args = filled(SMALL, **CLIP | {"tubelet": 4})
    assert (args.num_frames, args.tubelet, args.temporal_kernel) == (16, 4, 3)
    video = described_architecture(args, SMALL)
    assert (video.img_size, video.stride) == ((16, 48, 64), (4, 8, 8))


def test_a_video_checkpoint_decides_the_clips():
    args = filled(SMALL.with_time(8, 4), **CLIP)
    assert (args.num_frames, args.tubelet, args.input_size) == (8, 4, [48, 64])


def test_a_checkpoint_decides_the_blocks():
    args = filled(SMALL, num_heads=6)
    blocks = ([128, 256, 384], [2, 2, 11], 6, [4, 4, 4], 5)
    assert tuple(getattr(args, name) for name in BLOCKS) == blocks


def test_flags_change_the_blocks_of_a_named_model():
    args = filled(None, **BASE | {"depth": [1, 1, 2], "kernel_size": 7})
    model = described_architecture(args, Architecture())
    assert (model.depth, model.kernel_size, model.embed_dim) == ((1, 1, 2), 7, (256, 384, 768))


def test_a_named_model_with_the_flags_of_its_run_is_what_the_checkpoint_holds():
    given = dict(depth=[2, 2, 11], embed_dim=[128, 256, 384])
    assert filled(SMALL, **BASE | given).num_heads == 6


def test_an_mlp_ratio_that_comes_to_the_same_width_is_the_same():
    read = Architecture(embed_dim=(32, 64, 128), mlp_ratio=(41 / 32, 4, 4), num_heads=2)
    assert filled(read, mlp_ratio=[1.3, 4, 4]).mlp_ratio == [1.3, 4, 4]


def test_heads_that_a_file_does_not_tell_are_those_given():
    args = flags(num_heads=3)
    fill_geometry_flags(args, SMALL, "x.pth", ["num_heads"])
    assert described_architecture(args, SMALL).num_heads == 3


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [
        (None, {}, "what to start from"),
        (SMALL, {"in_chans": 3}, "--in_chans 3 is not what x.pth holds: 1; leave the flag away"),
        (SMALL, {"patch_size": [4, 2, 2]}, "--patch_size 4 2 2 is not what x.pth holds: 2 2 2"),
        (SMALL, {"model": "convvit_base_patch16"}, r"convvit_base_patch16 is not .*: small \(wid"),
        (SMALL, {"embed_dim": [128, 256, 768]}, "--embed_dim 128 256 768 is not .*: 128 256 384"),
        (SMALL, {"num_heads": 8}, "--num_heads 8 is not what x.pth holds: 6"),
        (SMALL, {"mlp_ratio": [4, 4, 3]}, "--mlp_ratio 4 4 3 is not what x.pth holds: 4 4 4"),
        (
            None,
            BASE | {"num_heads": 5},
            "width 768 of stage 3 is not divisible by 5 heads",
        ),
        (None, BASE | {"mlp_ratio": [1e-3, 4, 4]}, "MLP ratio 0.001 leaves stage 1, 256 wide, no"),
        (SMALL.with_time(), {}, "video model: use python -m VideoConvMAE.main_finetune"),
        (SMALL.with_time(), CLIP | {"tubelet": 4}, "--tubelet 4 is not what x.pth holds: 2"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(found, given, message):
    with pytest.raises(UsageError, match=message):
        filled(found, **given)


def test_sizes_that_do_not_fit_are_refused_by_the_names_of_their_flags():
    with pytest.raises(UsageError, match="--input_size, --patch_size: img_size 100x100 is not div"):
        described_architecture(flags(input_size=100), Architecture())
