"""The entry points for torch.hub, loaded as torch.hub loads them."""

import subprocess
import sys

import pytest
import torch

import hubconf
from models_convmae import MODELS as AUTOENCODERS
from models_convvit import MODELS as CLASSIFIERS
from models_convvit import convvit_tiny_patch16
from tests.runs import ROOT
from util.errors import UsageError
from VideoConvMAE.models import CLASSIFIERS as VIDEO_CLASSIFIERS
from VideoConvMAE.models import MODELS as VIDEO_AUTOENCODERS


def test_all_models_are_listed():
    public = {name for name, value in vars(hubconf).items() if callable(value)}
    assert public >= {*AUTOENCODERS, *CLASSIFIERS, *VIDEO_AUTOENCODERS, *VIDEO_CLASSIFIERS}


def test_a_model_is_built_with_its_own_arguments():
    model = torch.hub.load(ROOT, "convvit_tiny_patch16", source="local", num_classes=3, img_size=32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_checkpoint_fills_the_model_and_decides_what_it_is(tmp_path):
    source = convvit_tiny_patch16(num_classes=7, img_size=64)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    model = torch.hub.load(
        ROOT, "convvit_tiny_patch16", source="local", checkpoint=str(tmp_path / "x.pth")
    )
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_program_with_a_util_of_its_own_keeps_it(tmp_path):
    (tmp_path / "util.py").write_text("NAME = 'own'\n")
    (tmp_path / "program.py").write_text(
        "import util, torch\n"
        f"folder, name = {str(ROOT)!r}, 'convvit_tiny_patch16'\n"
        "model = torch.hub.load(folder, name, source='local', num_classes=3, img_size=32)\n"
        "assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)\n"
        "again = util\n"
        "import util\n"
        "assert util is again and util.NAME == 'own'\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_help_says_what_a_checkpoint_is():
    assert "`checkpoint`: a file of any kind" in hubconf.convvit_base_patch16.__doc__


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    source = convvit_tiny_patch16(num_classes=7, img_size=64)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="holds a tiny model, not a convvit_base_patch16"):
        hubconf.convvit_base_patch16(checkpoint=str(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["convmae_convvit_tiny_patch16"])
def test_an_autoencoder_is_built(name):
    model = torch.hub.load(ROOT, name, source="local", img_size=32, patch_size=(2, 2, 1))
    loss, pred, mask = model(torch.randn(2, 3, 32, 32))
    assert loss.isfinite() and pred.shape[:2] == mask.shape == (2, 64)


def test_a_video_model_is_filled_from_a_checkpoint_of_videos_alone(tmp_path):
    clips = dict(img_size=(4, 32, 32), num_classes=3)
    source = VIDEO_CLASSIFIERS["videoconvvit_tiny_patch16"](**clips)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    entry, path = "videoconvvit_tiny_patch16", str(tmp_path / "x.pth")
    model = torch.hub.load(ROOT, entry, source="local", checkpoint=path)
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(UsageError, match="holds a model of videos, not a convvit_tiny_patch16"):
        hubconf.convvit_tiny_patch16(checkpoint=path)
