"""Pretraining started from weights of other runs: what is taken, what begins anew, what is said."""

import pytest
import torch

from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import convvit_tiny_patch16
from util.errors import UsageError
from util.weights.read import Weights, weights_of
from util.weights.start import start_from
from VideoConvMAE.models import videoconvmae_tiny_patch16

TABLES = ("pos_embed", "decoder_pos_embed")


def saved(source, **args) -> Weights:
    return weights_of({"model": source.state_dict(), "args": args}, "x.pth")


def autoencoder(img_size=32, **kwargs):
    return convmae_convvit_tiny_patch16(img_size=img_size, **kwargs)


def started(weights: Weights, model):
    """The model as it was, as it has become, and the report."""
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = start_from(model, weights, "center")
    return fresh, model.state_dict(), report


def taken(source, state, names):
    return all(torch.equal(state[name], source.state_dict()[name]) for name in names)


def test_another_size_of_input_takes_all_weights_and_computes_the_tables_anew():
    source = autoencoder(32)
    fresh, state, report = started(saved(source), autoencoder(48))
    assert taken(source, state, state.keys() - {*TABLES})
    assert all(torch.equal(state[name], fresh[name]) for name in TABLES)
    assert str(report).splitlines() == [
        f"weights of x.pth: {len(state) - 2} tensors loaded",
        "  fixed, computed anew: decoder_pos_embed (2x2 to 3x3), pos_embed (2x2 to 3x3)",
    ]


def test_a_decoder_begins_anew_under_an_encoder_alone():
    source = autoencoder()
    fresh, state, report = started(
        saved(source).without("decoder_*", "mask_token", "stage*", "norm"), autoencoder()
    )
    encoder = {name for name in state if name.startswith(("patch_embed", "blocks"))}
    assert taken(source, state, encoder)
    assert all(torch.equal(state[name], fresh[name]) for name in state.keys() - encoder)
    assert {*report.missing} == state.keys() - encoder - {"pos_embed"}
    assert not report.recomputed and not report.unexpected


def test_a_classifier_with_a_class_token_gives_its_encoder():
    source = convvit_tiny_patch16(img_size=32, class_token=True, num_classes=3)
    _, state, report = started(saved(source), autoencoder())
    assert taken(source, state, (name for name in state if name.startswith("blocks")))
    assert report.unexpected == [
        "cls_token", "fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"
    ]  # fmt: skip
    assert report.recomputed == ["pos_embed"]


@pytest.mark.parametrize("changed", [dict(decoder_depth=3), dict(decoder_num_heads=4)], ids=str)
def test_a_decoder_of_another_size_begins_anew_as_a_whole(changed):
    source = autoencoder()
    weights = saved(source, decoder_num_heads=2)
    fresh, state, report = started(weights, autoencoder(**changed))
    decoder = {name for name in state if name.startswith(("decoder", "mask"))}
    assert all(torch.equal(state[name], fresh[name]) for name in decoder)
    assert taken(source, state, state.keys() - decoder)
    assert {*report.missing} == decoder
    assert {*report.unexpected} == {
        name for name in source.state_dict() if name.startswith(("decoder", "mask"))
    }


def test_stages_that_were_not_fused_are_by_new_convolutions():
    source = autoencoder(multi_scale=False)
    _, state, report = started(saved(source), autoencoder())
    assert {name.split(".")[0] for name in report.missing} == {
        "stage1_output_decode",
        "stage2_output_decode",
    }
    assert taken(source, state, source.state_dict())


def test_a_picture_model_starts_a_video_model():
    source = autoencoder()
    video = videoconvmae_tiny_patch16(img_size=(4, 32, 32))
    fresh, state, report = started(saved(source), video)
    kernel = source.patch_embed1.proj.weight
    assert torch.equal(state["patch_embed1.proj.weight"][:, :, 1], kernel)
    assert not state["patch_embed1.proj.weight"][:, :, 0].any()
    assert torch.equal(state["pos_embed"], fresh["pos_embed"])
    assert report.recomputed == ["pos_embed (2x2 to 2x2x2)"]
    assert {name.split(".")[0] for name in report.missing} == {
        *("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm"),
        "decoder_pred",
    }
    assert {name.split(".")[0] for name in report.unexpected} >= {"decoder_blocks", "mask_token"}


def test_another_size_of_encoder_is_refused_with_both_named():
    with pytest.raises(UsageError, match=r"another size of model: tiny .*; the model to fill"):
        start_from(autoencoder(embed_dim=(32, 64, 64)), saved(autoencoder()))
