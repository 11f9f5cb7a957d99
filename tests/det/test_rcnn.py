import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs Detectron2")

from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from DET.config import CONFIGS, build, load_config
from DET.rcnn import MaskHead, norms_in_float32, unsquare

RECIPES = sorted(path.name for path in CONFIGS.glob("*.py"))
SMALL = ("embed_dim=[16,24,32]", "depth=[1,1,2]", "num_heads=2", "global_blocks=[1]")


def detector(name):
    """A recipe's detector and optimizer, its encoder and images made small."""
    part = "net" if "vitdet" in name else "bottom_up"
    sizes = [f"model.backbone.{part}.{size}" for size in SMALL]
    heads = "model.roi_heads"
    more = (
        "data.image_size=64", f"{heads}.num_classes=3", f"{heads}.batch_size_per_image=8",
        f"{heads}.box_head.fc_dims=[32]", f"{heads}.box_predictor.input_shape.channels=32",
    )  # fmt: skip
    cfg = load_config(CONFIGS / name, [*sizes, *more])
    torch.manual_seed(0)
    cfg.optimizer.params.model = model = build(cfg.model, "model").train()
    return model, build(cfg.optimizer, "optimizer")


def image(*objects):
    """A square with objects at (left, top, right, bottom)."""
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor(objects, dtype=torch.float32).view(-1, 4))
    instances.gt_classes = torch.zeros(len(objects), dtype=torch.int64)
    instances.gt_masks = PolygonMasks(
        [[[x, y, right, y, right, bottom, x, bottom]] for x, y, right, bottom in objects]
    )
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    return {"image": pixels, "height": 64, "width": 64, "instances": instances}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_steps_on_images_with_and_without_objects(name):
    model, optimizer = detector(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for batch in ([image()], [image(), image((8, 8, 40, 50))]):
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        assert {"loss_rpn_cls", "loss_cls", "loss_mask"} <= losses.keys()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {
        n for n, p in model.named_parameters() if p.requires_grad and p.numel() > 1000
    } <= changed


# --- squares -------------------------------------------------------------------------------------


def found(boxes, size=100):
    result = Instances((size, size))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    result.pred_masks = torch.ones(len(boxes), 1, 28, 28)
    return result


@pytest.mark.parametrize(("height", "width"), [(100, 333), (333, 100), (50, 50), (200, 199)])
def test_boxes_go_back_by_one_factor_for_both_axes(height, width):
    scale = max(height, width) / 100
    box = unsquare(found([[5, 6, 15, 26]]), height, width).pred_boxes.tensor[0]
    torch.testing.assert_close(box, torch.tensor([5, 6, 15, 26]) * scale)


def test_objects_are_cut_at_the_images_border_and_those_of_the_padding_left_out():
    objects = unsquare(found([[10, 20, 30, 60], [10, 31, 30, 60]]), 90, 300)
    torch.testing.assert_close(objects.pred_boxes.tensor, torch.tensor([[30.0, 60, 90, 90]]))
    assert objects.pred_masks.shape == (1, 90, 300)
    assert objects.pred_masks[0, 65:85, 35:85].all() and not objects.pred_masks[0, :55].any()


# --- objects without masks -----------------------------------------------------------------------


def mask_losses(*has_mask):
    """The mask head's loss of two objects, and the gradient at each one's features."""
    torch.manual_seed(0)
    head = MaskHead(
        input_shape=load_config(CONFIGS / RECIPES[0]).model.roi_heads.mask_head.input_shape,
        num_classes=2,
        conv_dims=[8, 8],
    )
    objects = image((4, 4, 40, 40), (10, 20, 60, 60))["instances"]
    objects.proposal_boxes = objects.gt_boxes
    if has_mask:
        objects.gt_has_mask = torch.tensor(has_mask)
    x = torch.randn(2, 256, 14, 14, requires_grad=True)
    with EventStorage():
        loss = head(x, [objects, objects[:0]])["loss_mask"]
    loss.backward()
    return loss.item(), x.grad.flatten(1).abs().sum(1) > 0


def test_the_mask_head_learns_from_the_objects_that_have_a_mask():
    loss, seen = mask_losses(True, False)
    assert loss > 0 and seen.tolist() == [True, False]


def test_without_a_word_on_it_all_objects_have_masks():
    assert mask_losses()[1].tolist() == [True, True]
    assert mask_losses()[0] == mask_losses(True, True)[0]


def test_a_batch_without_any_mask_has_no_mask_loss():
    loss, seen = mask_losses(False, False)
    assert loss == 0 and not seen.any()


def test_sync_norms_compute_in_float32():
    model = torch.nn.Sequential(NaiveSyncBatchNorm(4, stats_mode="N"), torch.nn.ReLU())
    norms_in_float32(model)
    seen = []
    model[0].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))
    assert [t.dtype for t in seen] == [torch.float32, torch.float32]
