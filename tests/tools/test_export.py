"""The encoder alone, exported for timm, and created by timm."""

import pytest
import timm
import torch

from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import convvit_from_checkpoint, convvit_from_weights, convvit_tiny_patch16
from tools import checkpoint
from util.weights.read import read_weights
from VideoConvMAE.models import videoconvvit_tiny_patch16

EXPORTED = {
    "pretraining": lambda: convmae_convvit_tiny_patch16(
        img_size=32, patch_size=(2, 2, 1), kernel_size=3, mlp_ratio=(1.3, 2, 4), in_chans=1
    ),
    "first token": lambda: convvit_tiny_patch16(img_size=32, num_classes=3, global_pool="token"),
    "class token": lambda: convvit_tiny_patch16(img_size=32, num_classes=3, class_token=True),
    "videos": lambda: videoconvvit_tiny_patch16(img_size=(4, 32, 32), num_classes=3),
}


@pytest.fixture(params=EXPORTED)
def exported(request, tmp_path, capsys):
    """The source, the file of its encoder, and the lines that are printed."""
    torch.manual_seed(0)
    source = EXPORTED[request.param]()
    torch.save({"model": source.state_dict(), "args": {"num_heads": 2}}, tmp_path / "x.pth")
    line = ["export", str(tmp_path / "x.pth"), "--to", str(tmp_path / "e.safetensors"), "--encoder"]
    checkpoint.main(checkpoint.parse_args(line))
    return source, tmp_path / "e.safetensors", capsys.readouterr().out.partition("\n")[2]


def test_timm_creates_the_exported_encoder_by_the_lines_printed(exported, tmp_path):
    _, _, lines = exported
    created: dict = {}
    exec(lines, created)
    model = created["model"].eval()
    expected = convvit_from_checkpoint(tmp_path / "x.pth", num_classes=0).eval()
    imgs = torch.randn(2, model.in_chans, *model.geometry.img_size)
    assert torch.equal(model(imgs), expected(imgs)) and model(imgs).shape == (2, 128)


def test_timm_makes_a_feature_extractor_of_the_exported_encoder(exported):
    source, path, lines = exported
    created: dict = {}
    exec(lines.replace("num_classes=0", "features_only=True"), created)
    model = created["model"].eval()
    imgs = torch.randn(2, source.in_chans, *source.geometry.img_size)
    expected = convvit_from_checkpoint(path).forward_intermediates(imgs, intermediates_only=True)
    assert all(map(torch.equal, model(imgs), expected))


def test_an_exported_encoder_is_without_decoder_and_head_and_starts_a_classifier(exported):
    _, path, _ = exported
    weights = read_weights(path)
    assert weights.kind == "encoder"
    assert not weights.without("pos_embed", "cls_token", "patch_embed*", "blocks*").state.keys() - {
        *("norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias")
    }
    assert convvit_from_weights(weights, num_classes=5)[0].head.out_features == 5


def test_a_feature_extractor_takes_a_pretraining_checkpoint_as_it_is(tmp_path):
    source = convmae_convvit_tiny_patch16(img_size=32)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    name, path = "convvit_tiny_patch16", str(tmp_path / "x.pth")
    first = timm.create_model(
        name, features_only=True, img_size=32, out_indices=(0,), checkpoint_path=path
    )
    for n, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[n])
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("convvit_small_patch16", features_only=True, checkpoint_path=path)
