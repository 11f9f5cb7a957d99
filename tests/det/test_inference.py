import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs Detectron2")

from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from DET.config import load_config
from DET.data import read_array
from DET.inference import Predictor, class_names, draw
from tests.det import small
from tests.pictures import picture
from util.errors import UsageError
from util.weights.read import read_weights


def config(tmp_path, *more):
    return load_config(small.CONFIG, small.overrides(tmp_path, tmp_path, *more))


def detector(tmp_path, **content):
    """The weights of a detector that was never trained, as a file has them."""
    torch.manual_seed(0)
    path = tmp_path / "detector.pth"
    torch.save({"model": instantiate(config(tmp_path).model).state_dict(), **content}, path)
    return read_weights(path)


@pytest.mark.parametrize("size", [(64, 64), (30, 101), (200, 90)])
@pytest.mark.parametrize("square_pad", [64, 0])
def test_images_of_any_size_are_taken_and_boxes_and_masks_are_of_that_size(
    tmp_path, size, square_pad
):
    cfg = config(tmp_path, f"model.backbone.square_pad={square_pad}")
    predictor = Predictor(cfg, detector(tmp_path), torch.device("cpu"), threshold=0.0)
    found = predictor(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    assert len(found) > 0 and found.pred_masks.shape[1:] == size
    limits = torch.tensor([size[1], size[0]] * 2)
    assert (found.pred_boxes.tensor >= 0).all() and (found.pred_boxes.tensor <= limits).all()


def test_a_threshold_leaves_out_what_scores_less(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    weights, device = detector(tmp_path), torch.device("cpu")
    everything = Predictor(config(tmp_path), weights, device, threshold=0.0)(image)
    middle = everything.scores.median().item()
    some = Predictor(config(tmp_path), weights, device, threshold=middle)(image)
    assert 0 < len(some) < len(everything) and some.scores.min() > middle


def test_classes_are_those_of_the_file_cocos_or_numbers(tmp_path):
    names = [f"digit {d}" for d in range(10)]
    assert class_names(detector(tmp_path, classes=names)) == names
    weights = detector(tmp_path)
    assert class_names(weights) == list("0123456789")
    weights.state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(81, 8)
    assert class_names(weights)[:2] == ["person", "bicycle"]


def test_a_detector_of_another_recipe_is_refused(tmp_path):
    cfg = config(tmp_path, "model.backbone.out_channels=32")
    with pytest.raises(UsageError, match="weights have another shape"):
        Predictor(cfg, detector(tmp_path), torch.device("cpu"), threshold=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_found_is_drawn_on_an_enlarged_picture(channels):
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 30.0, 30.0]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([1])
    image = np.full((40, 60, channels), 100, np.uint8)
    drawn = draw(image, found, ["cat", "dog"])
    assert drawn.shape == (480, 720, 3)
    changed = (drawn != 100).any(-1)
    assert changed[115:365, 115:365].any() and not changed[:60, 500:].any()


def test_any_image_file_is_read_as_a_viewer_shows_it(tmp_path):
    path = tmp_path / "x.png"
    picture(height=24, width=40).convert("RGBA").save(path)
    assert read_array(path, "RGB").shape == (24, 40, 3)
    assert read_array(path, "L").shape == (24, 40, 1)
    path.write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"x\.png cannot be decoded"):
        read_array(path, "RGB")
