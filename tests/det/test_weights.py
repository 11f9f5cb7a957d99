"""Checkpoints into the backbones, by the one loader."""

import pytest
import torch
from torch import nn

from DET.backbone import ConvViTDet, SingleScaleConvViTDet
from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from util.errors import UsageError
from util.weights.describe import describe
from util.weights.load import load_weights
from util.weights.read import read_weights

SMALL = dict(embed_dim=(8, 12, 16), depth=(1, 1, 2), num_heads=2)
BACKBONES = {
    ConvViTDet: dict(img_size=64, global_blocks=(1,)),
    SingleScaleConvViTDet: dict(img_size=64, pretrain_img_size=32, global_blocks=(1,)),
}
RELATIVE = ("*_rel_pos_bias", "blocks3.*.attn.rel_pos_[hw]")


def backbone(cls, **options):
    torch.manual_seed(0)
    model = cls(**SMALL, **{**BACKBONES[cls], **options})
    for name, parameter in model.named_parameters():
        if "rel" in name:
            nn.init.normal_(parameter)
    return model


def saved(path, state, **content):
    torch.save({"model": state, **content}, path)
    return read_weights(path)


@pytest.mark.parametrize("cls", BACKBONES)
@pytest.mark.parametrize(
    "source",
    [
        lambda: MaskedAutoencoderConvViT(
            **SMALL, img_size=32, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
        ),
        lambda: ConvViT(**SMALL, img_size=32, num_classes=5),
        lambda: ConvViT(**SMALL, img_size=32, num_classes=5, class_token=True),
    ],
    ids=["pretraining", "classification", "class token"],
)
def test_nothing_of_an_encoder_is_missing(cls, source, tmp_path):
    torch.manual_seed(1)
    encoder, model = source(), backbone(cls)
    weights = saved(tmp_path / "x.pth", encoder.state_dict())
    report = load_weights(model, weights.without_heads(), new=RELATIVE)
    assert all("rel_pos" in name for name in report.missing)
    assert set(report.unexpected) <= {"cls_token"}
    assert report.loaded + len(report.missing) == len(
        [name for name in model.state_dict() if not name.endswith("relative_position_index")]
    )
    for name in ("patch_embed4.weight", "blocks3.1.attn.qkv.weight", "blocks1.0.attn.bias"):
        torch.testing.assert_close(model.state_dict()[name], encoder.state_dict()[name])
    resized = cls is ConvViTDet or "cls_token" in encoder.state_dict()
    assert [line.split(" ")[0] for line in report.resized] == ["pos_embed"] * resized


@pytest.mark.parametrize("cls", BACKBONES)
def test_a_trained_backbone_fills_one_of_another_size(cls, tmp_path):
    source = backbone(cls)
    model = backbone(cls, img_size=96, window_size=7)
    prefix = "backbone.bottom_up."
    state = {prefix + name: t for name, t in source.state_dict().items()}
    weights = saved(tmp_path / "x.pth", state)
    report = load_weights(model, weights, prefix=prefix)
    assert not report.missing and not report.unexpected
    tables = {line.split(" ")[0] for line in report.resized}
    if cls is ConvViTDet:
        assert tables == {"pos_embed"} | {
            f"{kind}_rel_pos_bias.relative_position_bias_table" for kind in ("windowed", "global")
        }
    else:
        assert tables == {f"blocks3.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw"}
        assert "blocks3.1.attn.rel_pos_h (7 to 11 shifts)" in report.resized
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():  # a global block resizes its tables as the loader does
        model.blocks3[0].attn, source.blocks3[0].attn = nn.Identity(), nn.Identity()
        for block in (model.blocks3[0], source.blocks3[0]):
            block.attn.forward = lambda x, *bias: x
            block.attn.window_size = 0
        for name, feature in source(images).items():
            torch.testing.assert_close(model(images)[name], feature, rtol=1e-4, atol=1e-4)


def test_a_detector_is_known_and_described(tmp_path):
    state = {f"backbone.bottom_up.{k}": t for k, t in backbone(ConvViTDet).state_dict().items()}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(4, 8)
    weights = saved(tmp_path / "x.pth", state, classes=["a", "b", "c"])
    assert (weights.kind, weights.num_classes) == ("detector", 3)
    text = describe(weights)
    assert "a detection model of 3 classes" in text and "a, b, c" in text
    assert "python -m DET.train_net --config-file CONFIG --eval-only" in text


def test_a_backbone_of_another_width_is_refused(tmp_path):
    weights = saved(tmp_path / "x.pth", backbone(ConvViTDet).state_dict())
    model = ConvViTDet(**{**SMALL, "embed_dim": (8, 12, 32)}, **BACKBONES[ConvViTDet])
    with pytest.raises(UsageError, match="another size of model"):
        load_weights(model, weights)
