"""The one loader of weights: what it reads, what it refuses and why, what it reports."""

import argparse
import json
import math
from pathlib import Path

import pytest
import timm.data
import torch
import torch.nn.functional as F
from torch import nn

import models_convmae
from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import ConvViT, convvit_from_checkpoint, convvit_from_weights
from tests.runs import call
from util import atomic
from util.errors import TrainingError, UsageError
from util.layers.architecture import SIZES
from util.layers.rel_pos import RelativePositionBias, resize_relative_table
from util.weights.checkpoint import save_atomically
from util.weights.describe import describe
from util.weights.export import export_weights
from util.weights.load import load_weights
from util.weights.read import read_weights, weights_of

TINY = dict(embed_dim=(8, 16, 24), depth=(1, 2, 2), num_heads=2, img_size=64)
ARGS = argparse.Namespace(model="convmae_convvit_base_patch16", input_size=64, blr=1.5e-4)


def classifier(**kwargs):
    return ConvViT(**{**TINY, "num_classes": 5, **kwargs}).eval()


def autoencoder(**kwargs):
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return models_convmae.MaskedAutoencoderConvViT(**{**TINY, **decoder, **kwargs})


def probe():
    model = classifier()
    model.add_probe_norm()
    return model.eval()


def saved(path, model, **content):
    save_atomically({"model": model.state_dict(), **content}, path)
    return path


def logits(model, size=64):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, size, size))


def encoder_only(model):
    """What the published v1 pretraining checkpoint holds."""
    kept = ("pos_embed", "patch_embed", "blocks")
    return {k: v for k, v in model.state_dict().items() if k.startswith(kept)}


# --- what is read --------------------------------------------------------------------------------


def ours(model, path):
    args = {"model": "convvit_tiny_patch16", "input_size": [64, 64]}
    content = {"model": model.state_dict(), "args": args, "epoch": 3, "step": 0}
    torch.save(content | {"classes": list("abcde")}, path)


def the_originals(model, path):
    scaler = {"scale": 65536.0}
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 99}
    torch.save(content | {"scaler": scaler, "args": ARGS}, path)


def bare(model, path):
    torch.save(model.state_dict(), path)


def from_ddp(model, path):
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)


def compiled(model, path):
    state = torch.compile(nn.ModuleDict({"inner": model})).state_dict()
    names = {k.replace("inner.", ""): v for k, v in state.items()}
    assert all(name.startswith("_orig_mod.") for name in names)
    torch.save({"state_dict": names}, path)


def compiled_in_ddp(model, path):
    state = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save({"model": state, "epoch": 1}, path)


@pytest.mark.parametrize("save", [ours, the_originals, bare, from_ddp, compiled, compiled_in_ddp])
@pytest.mark.parametrize("make", [classifier, probe], ids=["classifier", "probe"])
def test_a_file_of_any_origin_gives_the_model_that_was_saved(save, make, tmp_path):
    model = make()
    save(model, tmp_path / "x.pth")
    loaded = convvit_from_checkpoint(tmp_path / "x.pth", num_heads=2)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = classifier()
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = convvit_from_checkpoint(tmp_path / "x.safetensors", num_heads=2)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_timm_is_told_by_what_the_images_of_a_checkpoint_were_normalised(tmp_path):
    stats = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    for args, mean in ((stats, (0.1, 0.2, 0.3)), ({}, timm.data.IMAGENET_DEFAULT_MEAN)):
        path = saved(tmp_path / "x.pth", autoencoder(), args=args)
        told = timm.data.resolve_model_data_config(convvit_from_checkpoint(path, num_heads=2))
        assert told["mean"] == mean and told["input_size"] == (3, 64, 64)


def test_of_arrays_timm_is_told_nothing(tmp_path):
    args = dict(arrays=True, mean=[900.0] * 3, std=[9.0] * 3)
    path = saved(tmp_path / "x.pth", autoencoder(), args=args)
    assert not convvit_from_checkpoint(path, num_heads=2).pretrained_cfg


def test_averaged_weights_are_taken_where_a_file_has_them(tmp_path):
    last, average = classifier(), classifier()
    content = {"model": last.state_dict(), "model_ema": average.state_dict()}
    torch.save(content, tmp_path / "x.pth")
    loaded = convvit_from_checkpoint(tmp_path / "x.pth", num_heads=2)
    torch.testing.assert_close(logits(loaded), logits(average), rtol=0, atol=0)


def test_half_precision_weights_become_the_models_type(tmp_path):
    torch.save({"model": classifier().half().state_dict()}, tmp_path / "x.pth")
    model = convvit_from_checkpoint(tmp_path / "x.pth", num_heads=2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_encoder_alone_starts_a_classifier(tmp_path):
    source = autoencoder()
    torch.save({"model": encoder_only(source), "args": ARGS}, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert weights.kind == "encoder"
    model, report = convvit_from_weights(weights, num_classes=7, num_heads=2)
    assert report.missing == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert report.unexpected == []
    torch.testing.assert_close(model.blocks3[1].mlp.fc1.weight, source.blocks3[1].mlp.fc1.weight)


def test_the_norm_of_an_autoencoder_serves_a_classifier_of_the_first_token(tmp_path):
    source = autoencoder()
    nn.init.normal_(source.norm.weight)
    weights = read_weights(saved(tmp_path / "x.pth", source))
    model, report = convvit_from_weights(weights, num_classes=7, num_heads=2, global_pool="token")
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert report.missing == ["head.bias", "head.weight"]


def test_without_a_number_of_classes_an_autoencoder_gives_features(tmp_path):
    model = convvit_from_checkpoint(saved(tmp_path / "x.pth", autoencoder()), num_heads=2)
    assert logits(model).shape == (2, 24)


# --- classes, pooling, class token ---------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_pooling_is_read_off_the_norms_name(pool, tmp_path):
    source = classifier(global_pool=pool)
    model = convvit_from_checkpoint(saved(tmp_path / "x.pth", source), num_heads=2)
    assert model.global_pool == pool
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)


def test_a_class_token_comes_with_the_weights(tmp_path):
    source = classifier(class_token=True, global_pool="token")
    model = convvit_from_checkpoint(saved(tmp_path / "x.pth", source), num_heads=2)
    assert model.num_prefix_tokens == 1
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)


def test_a_class_token_without_a_row_in_the_table_gets_one_of_zeros(tmp_path):
    source = classifier(class_token=True)
    with torch.no_grad():
        source.pos_embed[:, 0] = 0
    state = source.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save({"model": state}, tmp_path / "x.pth")
    model = convvit_from_checkpoint(tmp_path / "x.pth", num_heads=2)
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)


def test_a_head_of_the_right_width_is_kept_by_a_model_that_goes_on(tmp_path):
    source = classifier()
    weights = read_weights(saved(tmp_path / "x.pth", source))
    same, _ = convvit_from_weights(weights, num_classes=5, num_heads=2)
    assert torch.equal(same.head.weight, source.head.weight)
    other, report = convvit_from_weights(weights, num_classes=6, num_heads=2)
    assert other.head.weight.shape == (6, 24)
    assert report.missing == ["head.bias", "head.weight"]


# --- position tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [False, True])
def test_a_position_table_is_resized_to_the_input(class_token, tmp_path):
    source = classifier(class_token=class_token)
    path = saved(tmp_path / "x.pth", source)
    model = convvit_from_checkpoint(path, num_heads=2, img_size=(96, 64))
    assert model.pos_embed.shape == (1, class_token + 6 * 4, 24)
    # As a model of the old size does it for an input of the new one.
    torch.manual_seed(0)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-5, atol=1e-6)


def test_a_table_that_is_not_square_is_known_by_the_arguments_of_its_run(tmp_path):
    source = classifier(img_size=(32, 128))  # 2 x 8 tokens, as many as 4 x 4
    path = saved(tmp_path / "x.pth", source, args={"input_size": [32, 128]})
    assert read_weights(path).architecture.img_size == (32, 128)
    assert convvit_from_checkpoint(path, num_heads=2).geometry.img_size == (32, 128)


def test_a_resized_table_is_reported_with_both_sizes(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", classifier()))
    _, report = convvit_from_weights(weights, img_size=96, num_heads=2)
    assert report.resized == ["pos_embed (4x4 to 6x6)"]
    assert "resized: pos_embed (4x4 to 6x6)" in str(report)


def test_a_row_added_for_a_class_token_is_reported_as_such(tmp_path):
    state = classifier(class_token=True).state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    weights = weights_of({"model": state}, tmp_path / "x.pth")
    _, report = convvit_from_weights(weights, num_heads=2)
    assert report.resized == ["pos_embed (a row of zeros added for the class token)"]
    _, report = convvit_from_weights(weights, num_heads=2, img_size=96)
    assert report.resized == ["pos_embed (4x4 to 6x6, a row of zeros added for the class token)"]


def test_a_class_tokens_row_that_is_left_out_is_reported_as_such(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", classifier(class_token=True)))
    model = classifier(num_classes=5)
    report = load_weights(model, weights)
    assert report.resized == ["pos_embed (the class token's row left out)"]
    assert torch.equal(model.pos_embed, weights.state["pos_embed"][:, 1:])


@pytest.mark.parametrize("size", [(384, 384), (112, 112), (96, 272)], ids=str)
@pytest.mark.parametrize("class_token", [False, True])
def test_a_loaded_table_is_the_plain_bicubic_of_the_files(size, class_token):
    source = classifier(img_size=224, class_token=class_token)
    weights = weights_of({"model": source.state_dict()}, "x.pth")
    model, _ = convvit_from_weights(weights, img_size=size, num_heads=2)
    table = source.pos_embed[:, class_token:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(
        table, size=model.geometry.grid(3), mode="bicubic", align_corners=False
    )
    rows = model.pos_embed[:, class_token:].unflatten(1, model.geometry.grid(3))
    torch.testing.assert_close(rows.permute(0, 3, 1, 2), expected, rtol=0, atol=0)
    assert torch.equal(model.pos_embed[:, :class_token], source.pos_embed[:, :class_token])


def test_both_tables_of_an_autoencoder_are_resized(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", autoencoder()))
    report = load_weights(autoencoder(img_size=32), weights)
    assert report.resized == ["decoder_pos_embed (4x4 to 2x2)", "pos_embed (4x4 to 2x2)"]


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "here"), [(1, 3), (3, 1), (4, 1), (1, 4)])
def test_gray_pictures_give_the_same_in_colour_and_the_other_way_round(there, here, tmp_path):
    source = classifier(in_chans=there)
    weights = read_weights(saved(tmp_path / "a.pth", source))
    model = classifier(in_chans=here)
    report = load_weights(model, weights)
    assert report.resized == [f"patch_embed1.proj.weight ({there} to {here} channels)"]
    gray = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = source(gray.expand(-1, there, -1, -1))
        torch.testing.assert_close(model(gray.expand(-1, here, -1, -1)), expected)


def test_a_colour_model_becomes_one_of_any_channels_by_timms_rule(tmp_path):
    source = classifier(in_chans=3)
    model = classifier(in_chans=7)
    report = load_weights(model, read_weights(saved(tmp_path / "a.pth", source)))
    assert report.resized == ["patch_embed1.proj.weight (3 to 7 channels)"]
    kernel = source.state_dict()["patch_embed1.proj.weight"]
    expected = torch.cat([kernel, kernel, kernel[:, :1]], dim=1) * (3 / 7)
    torch.testing.assert_close(model.state_dict()["patch_embed1.proj.weight"], expected)


def test_other_channels_do_not_become_colours(tmp_path):
    weights = read_weights(saved(tmp_path / "a.pth", classifier(in_chans=4)))
    with pytest.raises(UsageError, match="8x4x4x4 there, 8x3x4x4 in the model"):
        load_weights(classifier(in_chans=3), weights)


def test_a_relative_table_is_resized_and_its_index_is_the_models_own(tmp_path):
    def model(grid):
        positions = RelativePositionBias(grid, 2)
        return nn.ModuleDict({"encoder": classifier(), "positions": positions})

    source, target = model((4, 4)), model((3, 6))
    nn.init.normal_(source["positions"].relative_position_bias_table)
    state = source["encoder"].state_dict()
    state |= {name: t for name, t in source.state_dict().items() if name.startswith("positions")}
    weights = weights_of(state, tmp_path / "a.pth")
    report = load_weights(target["positions"], weights, prefix="positions.")
    assert report.resized == ["relative_position_bias_table (4x4 to 3x6)"]
    assert report.missing == report.unexpected == []
    table = source["positions"].relative_position_bias_table
    expected = resize_relative_table(table, (4, 4), (3, 6))
    torch.testing.assert_close(target["positions"].relative_position_bias_table, expected)
    assert target["positions"].relative_position_index.shape == (18, 18)


def test_names_of_classes_are_read_off_mmsegmentations_checkpoints(tmp_path):
    state = {f"backbone.{name}": t for name, t in classifier(num_classes=0).state_dict().items()}
    for meta in ({"dataset_meta": {"classes": ("a", "b")}}, {"CLASSES": ("a", "b")}):
        weights = weights_of({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
        assert weights.kind == "segmentor" and weights.classes == ["a", "b"]


def test_the_report_says_in_a_few_lines_what_became_of_the_weights(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", autoencoder()))
    _, report = convvit_from_weights(weights, num_classes=3, num_heads=2)
    loaded, missing, unexpected = str(report).splitlines()
    assert f"x.pth: {report.loaded} tensors loaded" in loaded
    assert missing == "  missing there, begin anew: fc_norm (2), head (2)"
    assert "decoder_blocks (12)" in unexpected and "mask_token" in unexpected
    assert report.loaded == len(encoder_only(autoencoder()))


# --- what is refused -----------------------------------------------------------------------------


def test_another_size_of_model_is_refused_with_both_named(tmp_path):
    with torch.device("meta"):
        state = ConvViT(**SIZES["base"], num_classes=5).state_dict()
        small = ConvViT(**SIZES["small"], num_classes=5)
    weights = weights_of({"model": state}, tmp_path / "base.pth")
    with pytest.raises(UsageError, match=r"another size.*base \(widths 256-384.*small \(widths 1"):
        load_weights(small, weights)


def test_another_number_of_classes_is_refused(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", classifier()))
    with pytest.raises(UsageError, match="head of 5 classes, the model has 9"):
        load_weights(classifier(num_classes=9), weights)


def test_a_pretraining_checkpoint_is_no_classifier(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", autoencoder()))
    with pytest.raises(UsageError, match=r"has no head: it is a whole masked autoencoder"):
        load_weights(classifier(), weights)


def test_weights_that_lack_a_block_are_refused(tmp_path):
    state = classifier().state_dict()
    del state["blocks2.0.attn.weight"]
    weights = weights_of({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"lacks 1 weights of the model \(blocks2\)"):
        load_weights(classifier(), weights)


def test_another_patch_size_is_refused_with_the_shapes(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", classifier()))
    with pytest.raises(UsageError, match=r"patch_embed1.proj.weight: 8x3x4x4 there, 8x3x2x2 in"):
        load_weights(classifier(patch_size=(2, 2, 2), img_size=32), weights)


def test_weights_of_something_else_are_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 3).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"no weights of a ConvViT: .*\(it has bias, weight, …\)"):
        convvit_from_checkpoint(tmp_path / "x.pth")


def test_a_shape_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    state = classifier().state_dict()
    state["pos_embed"] = torch.zeros(1, 1, 24).expand(1, 10**9, 24)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(
        UsageError, match=r"a tensor of \(1, 1000000000, 24\) that is larger than its data"
    ):
        convvit_from_checkpoint(tmp_path / "x.pth")


def test_a_gap_in_the_blocks_is_refused_in_one_line(tmp_path):
    state = classifier().state_dict() | {"blocks3.1000000000.norm1.weight": torch.ones(24)}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth: blocks3\.1000000000 is there, but blocks3\.2 "):
        convvit_from_checkpoint(tmp_path / "x.pth")


def test_kernels_that_no_encoder_has_are_refused_in_one_line(tmp_path):
    state = classifier().state_dict() | {"blocks1.0.attn.weight": torch.ones(8, 1, 4, 4)}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth: kernel_size 4 must be odd"):
        convvit_from_checkpoint(tmp_path / "x.pth", num_heads=2)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3, "args": {"lr": 1.0}}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="holds no weights"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_a_damaged_safetensors_file_is_refused(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.safetensors cannot be read"):
        read_weights(tmp_path / "x.safetensors")


def test_a_missing_safetensors_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_weights(tmp_path / "x.safetensors")


def test_nothing_is_loaded_if_something_does_not_fit(tmp_path):
    weights = read_weights(saved(tmp_path / "x.pth", classifier()))
    model = classifier(num_classes=9)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UsageError):
        load_weights(model, weights)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- the published files, by their names and shapes ----------------------------------------------

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_keys.json").read_text())


def published(name, **content):
    """Weights with the names and shapes of a published checkpoint, without numbers in them."""
    state = {k: torch.empty(shape, device="meta") for k, shape in GOLDEN[name].items()}
    return weights_of({"model": state, **content}, f"{name}.pth")


@pytest.mark.parametrize(("mode", "pool"), [("global_pool", "avg"), ("first_token", "token")])
def test_a_published_classifier_fills_the_model_whole(mode, pool):
    with torch.device("meta"):
        model, report = convvit_from_weights(published(f"convvit_base_patch16[{mode}]"))
    assert (model.global_pool, model.num_classes) == (pool, 1000)
    assert (report.missing, report.unexpected, report.loaded) == ([], [], 207)


def test_a_published_encoder_starts_a_classifier_whole():
    weights = published("convmae_convvit_base_patch16").without(
        "mask_token", "decoder_*", "stage1_output_decode", "stage2_output_decode"
    )
    assert weights.kind == "encoder"
    with torch.device("meta"):
        model, report = convvit_from_weights(weights, num_classes=10)
    assert {name.split(".")[0] for name in report.missing} == {"fc_norm", "head"}
    assert model.blocks3[0].attn.num_heads == 12


# --- inspect and export --------------------------------------------------------------------------


def test_a_description_names_kind_geometry_epoch_classes_and_use(tmp_path):
    path = tmp_path / "x.pth"
    ours(classifier(), path)
    text = describe(read_weights(path))
    for phrase in (
        "a classifier of 5 classes", "widths 8-16-24, blocks 1-2-2", "64x64 pixels, 3 channels",
        "4x4 patches of 16x16", "3 epochs done", "a, b, c, d, e", "--eval --resume",
    ):  # fmt: skip
        assert phrase in text


def test_a_description_tells_the_recipe_and_the_best_accuracy(tmp_path):
    path = tmp_path / "x.pth"
    ours(classifier(), path)
    content = torch.load(path, weights_only=True)
    content["args"] = {"epochs": 100, "lr": 1e-3, "drop_path": "odd", "norm_pix_loss": True}
    torch.save(content | {"best": {"acc1": 81.25}}, path)
    text = describe(read_weights(path))
    assert "recipe   epochs 100, lr 0.001, norm_pix_loss\n" in text
    assert "best     81.250 % top 1\n" in text


def test_a_description_names_what_is_special_of_a_pretraining(tmp_path):
    model = convmae_convvit_tiny_patch16(img_size=32, class_token=True, in_chans=2)
    args = dict(teacher="vit", teacher_digest="abc", mimic_weight=0.5, predict_share=0.25)
    args |= dict(complementary=True, arrays=True, bands=[8, 3], nodata=-9999.0)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "x.pth")
    text = describe(read_weights(tmp_path / "x.pth"))
    assert "2 heads, class token)" in text and "teacher vit (weights abc)" in text
    assert "recipe   predict_share 0.25, mimic_weight 0.5, complementary\n" in text
    assert "2 channels, 2x2 patches of 16x16, arrays, bands 8 3, no data -9999\n" in text


def test_inspect_and_export_from_the_command_line(tmp_path):
    path, exported = tmp_path / "x.pth", tmp_path / "model.safetensors"
    the_originals(probe(), path)
    result = call("-m", "tools.checkpoint", "inspect", path)
    assert result.code == 0, result.err
    assert "a linear probe: an encoder, a batch norm and a linear head of 5 classes" in result.out
    assert "100 epochs done" in result.out
    result = call("-m", "tools.checkpoint", "export", path, "--to", exported)
    assert (result.code, result.err) == (0, "")
    assert "model.safetensors" in result.out and exported.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_exported_weights_are_read_again_with_their_classes(name, tmp_path):
    model = classifier()
    ours(model, tmp_path / "x.pth")
    export_weights(read_weights(tmp_path / "x.pth"), tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert weights.classes == list("abcde")
    assert weights.args["input_size"] == [64, 64]
    loaded, _ = convvit_from_weights(weights, num_heads=2)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_an_export_holds_the_weights_alone(tmp_path):
    the_originals(classifier(), tmp_path / "x.pth")
    export_weights(read_weights(tmp_path / "x.pth"), tmp_path / "model.pth")
    assert set(torch.load(tmp_path / "model.pth", weights_only=True)) == {"model", "epoch", "args"}


BAD_EXPORTS = {
    "the file itself": ("x.pth", "exists already"),
    "another ending": ("model.onnx", "must end in .safetensors, .pth or .pt"),
    "no folder": ("missing/model.pth", "does not exist"),
}


@pytest.mark.parametrize("kind", BAD_EXPORTS)
def test_an_export_that_cannot_be_written_is_one_line_and_exit_2(kind, launcher, tmp_path):
    name, phrase = BAD_EXPORTS[kind]
    path = tmp_path / "x.pth"
    ours(classifier(), path)
    before = path.read_bytes()
    result = launcher.run("export", path, "--to", tmp_path / name, program="tools.checkpoint")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert phrase in result.err
    assert path.read_bytes() == before


def test_a_full_disk_is_an_error_of_the_export(tmp_path, monkeypatch):
    ours(classifier(), tmp_path / "x.pth")
    (tmp_path / "temporary").symlink_to("/dev/full")
    monkeypatch.setattr(atomic, "temporary_name", lambda path: tmp_path / "temporary")
    with pytest.raises(TrainingError, match="No space left"):
        export_weights(read_weights(tmp_path / "x.pth"), tmp_path / "model.safetensors")


def test_arguments_of_the_original_survive_an_export(tmp_path):
    the_originals(classifier(), tmp_path / "x.pth")
    export_weights(read_weights(tmp_path / "x.pth"), tmp_path / "m.safetensors")
    assert read_weights(tmp_path / "m.safetensors").args == json.loads(json.dumps(vars(ARGS)))
    assert math.isclose(read_weights(tmp_path / "m.safetensors").args["blr"], 1.5e-4)


# --- odd content ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "phrase"),
    [({"blocks3.1000000000.norm1.weight": torch.zeros(1)}, "blocks3.1000000000 is there, but"),
     ({"blocks3.x.norm1.weight": torch.zeros(1)}, "blocks3.x is there, but"),
     ({"pos_embed": torch.zeros(3)}, r"pos_embed is \[3\]"),
     ({"pos_embed": torch.zeros(1, 10**12, 0)}, "pos_embed is empty"),
     ({"patch_embed1.proj.weight": torch.zeros(())}, r"patch_embed1.proj.weight is \[\]"),
     ({"head.weight": torch.zeros(())}, r"head.weight is \[\]"),
     ({"blocks1.0.conv1.bias": torch.zeros(())}, "have another shape or type"),
     ({"blocks1.0.conv1.bias": torch.zeros(8, dtype=torch.int64)}, "int64 there, float32"),
     ({"module.head.bias": torch.zeros(5)}, "holds weights twice")],
)  # fmt: skip
def test_weights_of_odd_shapes_are_refused_in_a_line(change, phrase, tmp_path):
    torch.save({"model": classifier().state_dict() | change}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=phrase) as error:
        convvit_from_weights(read_weights(tmp_path / "x.pth"))
    assert str(error.value).isprintable()


def test_a_state_with_something_else_in_it_names_that(tmp_path):
    torch.save({"model": classifier().state_dict() | {"scheme": 4}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"holds no weights, only model with scheme \(int\)"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "entries",
    [{"epoch": "x"}, {"epoch": torch.zeros(2)}, {"args": 5}, {"args": {1: 2}},
     {"args": {"input_size": "big", "patch_size": 16}}, {"args": {"num_frames": 8}},
     {"classes": 7}, {"meta": {"dataset_meta": 3, "CLASSES": 4}}],
    ids=["epoch", "epoch_tensor", "args", "args_names", "sizes", "frames", "classes", "meta"],
)  # fmt: skip
def test_what_a_file_says_of_itself_in_an_odd_way_does_not_keep_its_weights_from_use(
    entries, tmp_path
):
    torch.save({"model": classifier().state_dict()} | entries, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    convvit_from_weights(weights)
    assert "64x64 pixels" in describe(weights)


class Settings(dict):
    """Another library's mapping."""


def test_arguments_in_a_foreign_mapping_are_read(tmp_path):
    args = Settings(input_size=64, model="convvit_tiny_patch16")
    torch.save({"model": classifier().state_dict(), "args": args}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").args == dict(args)


def test_arguments_that_json_does_not_have_do_not_hinder_an_export(tmp_path):
    many = [0]
    for _ in range(40):
        many = [many, many]
    args = {"output_dir": Path("a"), "object": Settings, "many": many, "size": [64, 64]}
    torch.save({"model": classifier().state_dict(), "args": args}, tmp_path / "x.pth")
    export_weights(read_weights(tmp_path / "x.pth"), tmp_path / "m.safetensors")
    got = read_weights(tmp_path / "m.safetensors").args
    assert (got["output_dir"], got["size"]) == ("a", [64, 64])


@pytest.mark.parametrize(("write", "epochs"), [(ours, "3 epochs"), (the_originals, "100 epochs")])
def test_the_epochs_done_are_counted_alike_in_both_formats(write, epochs, tmp_path):
    write(classifier(), tmp_path / "x.pth")
    assert f"{epochs} done" in describe(read_weights(tmp_path / "x.pth"))


def test_one_epoch_done_by_the_original_is_one(tmp_path):
    torch.save({"model": classifier().state_dict(), "epoch": 0, "args": ARGS}, tmp_path / "x.pth")
    assert "1 epoch done" in describe(read_weights(tmp_path / "x.pth"))


def test_names_that_cannot_be_printed_are_told_in_one_line(tmp_path):
    torch.save({"model": {"a\nb\r": torch.zeros(2)}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"it has a\?b\?") as refusal:
        _ = read_weights(tmp_path / "x.pth").architecture
    assert str(refusal.value).isprintable()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = ConvViT(**TINY, num_classes=2)
    model.blocks3[0].mlp.fc1.bias.data[1] = float("nan")
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"not finite, in blocks3: .*take an earlier one"):
        convvit_from_checkpoint(tmp_path / "x.pth")
