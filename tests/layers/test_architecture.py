"""One architecture, from flags to a model, to the shapes of its weights and back."""

import pytest
import torch

from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from util.layers.architecture import SIZES, Architecture
from util.layers.geometry import Geometry

WIDTHS = dict(embed_dim=(24, 40, 80), depth=(1, 0, 3), num_heads=1)
ARCHITECTURES = {
    **{name: Architecture(**size) for name, size in SIZES.items()},
    "v2": Architecture(
        embed_dim=(384, 768, 1024), depth=(2, 2, 20), num_heads=16, class_token=True
    ),
    "non-square": Architecture(geometry=Geometry.of((48, 160), (4, 2, 2)), **SIZES["tiny"]),
    "odd": Architecture(
        geometry=Geometry.of((48, 96), ((2, 4), (2, 1), (4, 4))),
        in_chans=4,
        mlp_ratio=(2, 4, 3),
        kernel_size=7,
        **WIDTHS,
    ),
    "widths by 7": Architecture(
        embed_dim=(21, 35, 49), depth=(2, 1, 3), num_heads=7, mlp_ratio=(1.3, 2.7, 29 / 49)
    ),
    "video": Architecture(**SIZES["tiny"], temporal_kernel=5).with_time(8, 4),
    "non-square video": Architecture(
        geometry=Geometry.of((8, 48, 64), ((2, 4, 4), (1, 2, 2), (1, 2, 2))),
        temporal_kernel=1,
        **SIZES["tiny"],
    ),
    "video with a class token": Architecture(class_token=True).with_time(),
    "video with strides in time": Architecture(
        geometry=Geometry.of((16, 64, 64), ((2, 4, 4), (2, 2, 2), (1, 2, 2)))
    ),
}
every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES
)


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@every_architecture
def test_flags_model_and_shapes_lead_back_to_the_architecture(architecture):
    started = Architecture(class_token=architecture.class_token)
    described = started.with_flags(architecture.flags())
    assert described == architecture
    with torch.device("meta"):
        shapes = shapes_of(ConvViT(**described.kwargs()))
    found = Architecture.from_shapes(shapes, architecture.flags())
    with torch.device("meta"):
        assert shapes_of(ConvViT(**found.kwargs())) == shapes
    assert found.mlp_ratio == pytest.approx(architecture.mlp_ratio, abs=1 / 21)
    assert (found.geometry, found.num_heads) == (architecture.geometry, architecture.num_heads)
    assert (found.embed_dim, found.depth) == (architecture.embed_dim, architecture.depth)
    assert (found.in_chans, found.class_token) == (architecture.in_chans, architecture.class_token)
    assert found.kernel_size == architecture.kernel_size
    assert found.temporal_kernel == architecture.temporal_kernel


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_is_read_off_shapes_alone_with_its_name_and_heads(name):
    with torch.device("meta"):
        model = MaskedAutoencoderConvViT(**SIZES[name])
    found = Architecture.from_shapes(shapes_of(model))
    assert found == Architecture(**SIZES[name])
    assert found.size_name == name


def test_an_mlp_ratio_of_the_flags_is_taken_where_it_comes_to_the_same():
    with torch.device("meta"):
        shapes = shapes_of(ConvViT(embed_dim=(32, 64, 128), num_heads=2, mlp_ratio=(1.3, 4, 4)))
    flags = {"mlp_ratio": [1.3, 5, 4]}
    assert Architecture.from_shapes(shapes, flags).mlp_ratio == (1.3, 4, 4)


def test_a_model_of_no_published_size_has_no_name():
    assert ARCHITECTURES["odd"].size_name is None
    assert str(ARCHITECTURES["odd"]) == (
        "another size (widths 24-40-80, blocks 1-0-3, MLP ratios 2-4-3, 1 heads)"
    )


def test_a_description_names_size_and_class_token():
    assert str(Architecture(class_token=True)) == (
        "base (widths 256-384-768, blocks 2-2-11, MLP ratios 4-4-4, 12 heads, class token)"
    )


@pytest.mark.parametrize(("hidden", "dim"), [(29, 49), (1, 49), (64, 24), (55, 73)])
def test_an_mlp_ratio_gives_the_hidden_width_it_was_read_off(hidden, dim):
    shapes = with_shapes(blocks2=hidden, width=dim)
    ratio = Architecture.from_shapes(shapes).mlp_ratio[1]
    assert int(dim * ratio) == hidden


def with_shapes(*, blocks2=160, width=40, tokens=16, **more):
    """Shapes of an encoder with one block in stage 2."""
    return {
        "patch_embed1.proj.weight": (24, 3, 4, 4),
        "patch_embed2.proj.weight": (width, 24, 2, 2),
        "patch_embed3.proj.weight": (80, width, 2, 2),
        "pos_embed": (1, tokens, 80),
        "blocks2.0.mlp.fc1.weight": (blocks2, width, 1, 1),
        **{name.replace("__", "."): shape for name, shape in more.items()},
    }


# ---- The input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "size"), [(16, (64, 64)), (12, (48, 64)), (7, (16, 112))])
def test_without_flags_a_picture_is_as_square_as_its_tokens_allow(tokens, size):
    assert Architecture.from_shapes(with_shapes(tokens=tokens)).img_size == size


@pytest.mark.parametrize("tokens", [196, 197])
def test_a_class_token_may_have_a_row_of_the_table_or_not(tokens):
    shapes = with_shapes(tokens=tokens, cls_token=(1, 1, 80))
    assert Architecture.from_shapes(shapes).img_size == (224, 224)


@pytest.mark.parametrize("size", [32, [32], (16, 64), [16, 64]])
def test_flags_say_the_proportions_of_the_input(size):
    found = Architecture.from_shapes(with_shapes(tokens=4), {"input_size": size})
    assert found.img_size == ((32, 32) if size in (32, [32]) else (16, 64))


@pytest.mark.parametrize("size", [64, (16, 32), (17, 64), "64", None, [0, 4], {"a": 1}, [10**12]])
def test_flags_that_do_not_fit_the_tokens_are_no_hint(size):
    flags = {"input_size": size, "num_heads": "many"}
    assert Architecture.from_shapes(with_shapes(tokens=4), flags).img_size == (32, 32)


@pytest.mark.parametrize("size", [(16, 64, 64), (16, 224, 224), (4, 48, 48), (8, 80, 80)], ids=str)
def test_without_flags_a_video_has_16_frames_or_the_fewest_square_ones(size):
    geometry = Geometry.of(size, ((2, 4, 4), (1, 2, 2), (1, 2, 2)))
    with torch.device("meta"):
        model = ConvViT(**Architecture(geometry, **SIZES["tiny"]).kwargs())
    found = Architecture.from_shapes(shapes_of(model))
    assert found.geometry.num_patches == geometry.num_patches
    assert found.img_size == size if size[0] == 16 else found.img_size[0] <= size[0]


def test_a_table_of_a_billion_rows_is_read_at_once():
    shapes = with_shapes(tokens=10**9 + 7, cls_token=(1, 1, 80))
    assert Architecture.from_shapes(shapes).geometry.num_patches == 10**9 + 6


# ---- What is no ConvViT's ------------------------------------------------------------------------


def test_weights_of_another_model_have_no_architecture():
    with pytest.raises(ValueError, match=r"no weights of a ConvViT: 'patch_embed1.*is missing"):
        Architecture.from_shapes({"conv1.weight": (64, 3, 7, 7)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (16, 80)),
        ("pos_embed", ()),
        ("pos_embed", (1, 0, 80)),
        ("patch_embed2.proj.weight", (40, 24)),
        ("patch_embed2.proj.weight", (40, 24, 2)),
        ("patch_embed2.proj.weight", (40, 24, 2, 2, 2)),
    ],
)
def test_shapes_that_no_encoder_has_are_refused_with_the_shapes(name, shape):
    shown = "x".join(map(str, shape)) or "a number"
    with pytest.raises(ValueError, match=rf"no weights of a ConvViT, by the .*{name} {shown}"):
        Architecture.from_shapes(with_shapes() | {name: shape})


@pytest.mark.parametrize("block", ["1000000000", "2", "01", "x"])
def test_a_gap_in_the_blocks_is_refused_and_counts_none(block):
    shapes = with_shapes() | {f"blocks2.{block}.norm1.weight": (40,)}
    with pytest.raises(ValueError, match=f"blocks2.{block} is there, but blocks2.1 is missing"):
        Architecture.from_shapes(shapes)


# ---- Flags ---------------------------------------------------------------------------------------


def test_flags_that_are_not_given_leave_the_architecture_as_it_is():
    flags = {"input_size": None, "patch_size": None, "lr": 0.1, "num_frames": None}
    assert ARCHITECTURES["odd"].with_flags(flags) == ARCHITECTURES["odd"]


def test_frames_make_a_picture_encoder_a_videos():
    video = Architecture().with_flags({"input_size": [96], "num_frames": 8, "temporal_kernel": 1})
    assert video.img_size == (8, 96, 96)
    assert video.geometry.patch_size == ((2, 4, 4), (1, 2, 2), (1, 2, 2))
    assert (video.grid, video.stride, video.temporal_kernel) == ((4, 6, 6), (2, 16, 16), 1)


def test_flags_give_every_number_of_the_encoder():
    flags = dict(
        input_size=[32, 64], patch_size=[2, 2, 2], in_chans=1, embed_dim=[8, 16, 24],
        depth=[1, 2, 3], num_heads=3, mlp_ratio=[2, 2.5, 3], kernel_size=3,
    )  # fmt: skip
    geometry = Geometry.of((32, 64), (2, 2, 2))
    sizes = dict(embed_dim=(8, 16, 24), depth=(1, 2, 3), num_heads=3, mlp_ratio=(2, 2.5, 3))
    described = Architecture(geometry, in_chans=1, kernel_size=3, **sizes)
    assert Architecture().with_flags(flags) == described


def test_sizes_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="100x100 is not divisible by the patch of 16x16"):
        Architecture().with_flags({"input_size": 100})


def test_a_models_name_says_its_size():
    assert Architecture.named("videoconvmae_small_patch16_msd").size_name == "small"
    assert Architecture.named("convmae_convvit_base_patch16_dec512d8b") == Architecture()
    with pytest.raises(ValueError, match="model resnet50 names none of the sizes tiny, small"):
        Architecture.named("resnet50")


def test_the_defaults_are_the_base_models():
    assert Architecture(**SIZES["base"]) == Architecture()
