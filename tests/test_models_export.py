"""Exported models are saved, loaded and run on other images than those they were made with."""

import pytest
import torch

from models_convvit import ConvViT
from tests.modules import INPUTS, SIZES

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
# Tracers warn of each size that they take for a constant.
pytestmark = pytest.mark.filterwarnings("ignore")


class Features(torch.nn.Module):
    """The feature maps alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(self.model.forward_intermediates(x, intermediates_only=True))


def classifier(**size):
    return ConvViT(**SIZES, num_classes=3, **size).eval()


MODELS = {
    "classifier": lambda: classifier(**INPUTS["image"]),
    "features": lambda: Features(classifier(**INPUTS["image"])),
    "video classifier": lambda: classifier(**INPUTS["video"]),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def images(model):
    geometry = getattr(model, "model", model).geometry
    return torch.randn(2, 3, *geometry.img_size)


def assert_runs_alike(exported, model):
    imgs = images(model)
    with torch.no_grad():
        torch.testing.assert_close(as_list(exported(imgs)), as_list(model(imgs)))


def as_list(outputs):
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def test_a_saved_trace_runs(model, tmp_path):
    torch.jit.trace(model, images(model)).save(tmp_path / "model.pt")
    assert_runs_alike(torch.jit.load(tmp_path / "model.pt"), model)


def test_a_saved_exported_program_runs(model, tmp_path):
    torch.export.save(torch.export.export(model, (images(model),)), tmp_path / "model.pt2")
    assert_runs_alike(torch.export.load(tmp_path / "model.pt2").module(), model)


@pytest.mark.parametrize("dynamo", [True, False], ids=["new exporter", "old exporter"])
def test_an_onnx_file_runs_in_onnxruntime(model, tmp_path, dynamo):
    torch.onnx.export(
        model, (images(model),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name

    def run(imgs):
        return [torch.from_numpy(output) for output in session.run(None, {name: imgs.numpy()})]

    assert_runs_alike(run, model)
