import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.config import LazyConfig, instantiate

from DET.checkpoint import fit_heads
from DET.config import CONFIGS, load_config
from DET.engine import plan
from tests.det import small
from util.errors import UsageError
from util.weights.read import Weights

KEYS = json.loads((Path(__file__).parent.parent / "golden" / "state_dict_keys.json").read_text())
BASE = "convmae_base_mask_rcnn_FPN_25ep.py"
VITDET = "mask_rcnn_vitdet_convmae_b_25ep.py"
# Millions of trainable parameters; the paper says 104 of the first.
PARAMETERS = {
    BASE: 107.03,
    "convmae_base_mask_rcnn_FPN_50ep.py": 107.03,
    "convmae_base_mask_rcnn_FPN_100ep.py": 107.03,
    "convmae_small_mask_rcnn_FPN_25ep.py": 44.07,
    "convmae_large_mask_rcnn_FPN_25ep.py": 344.65,
    VITDET: 109.70,
    "mask_rcnn_vitdet_convmae_s_25ep.py": 44.78,
    "mask_rcnn_vitdet_convmae_l_25ep.py": 349.33,
    "convmae_tiny_mask_rcnn_FPN_demo.py": 1.93,
}


def load(name, *overrides):
    return load_config(CONFIGS / name, overrides)


def build(cfg):
    with torch.device("meta"):
        return instantiate(cfg.model)


def test_every_recipe_is_known_here():
    assert {path.name for path in CONFIGS.glob("*.py")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_builds_a_model_of_its_size(name):
    trainable = sum(p.numel() for p in build(load(name)).parameters() if p.requires_grad)
    assert trainable / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)


@pytest.mark.parametrize(
    ("name", "part", "golden"),
    [
        (BASE, "backbone.bottom_up.", "DET ConvViTDet base, 1024x1024, window 16"),
        (VITDET, "backbone.net.", "DET ViTDet-style ConvViT base, 1024x1024, window 14"),
    ],
)
def test_the_backbone_in_a_detector_has_the_published_names(name, part, golden):
    state = build(load(name)).state_dict()
    own = {k.removeprefix(part): list(t.shape) for k, t in state.items() if k.startswith(part)}
    assert own == KEYS[golden]
    weights = Weights(Path("published.pth"), state)
    assert (weights.kind, weights.num_classes, weights.encoder) == ("detector", 80, part)
    assert weights.architecture.depth == (2, 2, 11)


# --- schedules -----------------------------------------------------------------------------------


def planned(name, *overrides, images=118_000):
    cfg = load(name, *overrides)
    return cfg, plan(cfg, images)


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        (BASE, 92_188),
        ("convmae_base_mask_rcnn_FPN_50ep.py", 184_375),
        ("convmae_base_mask_rcnn_FPN_100ep.py", 368_750),
        (VITDET, 184_375),
    ],
)
def test_a_recipe_takes_the_published_iterations_on_coco(name, iterations):
    assert planned(name)[1].iterations == iterations


def test_the_first_recipe_warms_up_and_falls_by_a_cosine_to_zero():
    cfg, schedule = planned(BASE)
    factor = instantiate(cfg.lr_multiplier)
    end_of_warmup = 0.125 / 25
    assert (schedule.batch_size, cfg.optimizer.lr, cfg.optimizer.weight_decay) == (32, 8e-5, 0.1)
    assert factor(0.0) == pytest.approx(0.001)
    assert factor(end_of_warmup / 2) == pytest.approx(0.5005, abs=1e-3)
    assert factor(end_of_warmup) == pytest.approx(1, abs=1e-3)
    assert factor(0.5) == pytest.approx(0.5) and factor(1 - 1e-9) == pytest.approx(0, abs=1e-6)


def test_the_second_recipe_falls_in_two_steps():
    cfg, schedule = planned(VITDET)
    factor = instantiate(cfg.lr_multiplier)
    assert (schedule.batch_size, cfg.optimizer.lr, cfg.optimizer.weight_decay) == (16, 1e-4, 0.1)
    assert schedule.iterations_of(cfg.train.warmup_epochs) == 250
    assert cfg.lr_multiplier.warmup_length == pytest.approx(250 / 184_375)
    values = [factor(share) for share in (0.002, 0.888, 0.89, 0.962, 0.964, 0.999)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_number_of_epochs_is_one_override():
    cfg, schedule = planned(BASE, "train.epochs=50")
    assert schedule.iterations == 184_375
    assert cfg.lr_multiplier.warmup_length == 0.125 / 50


def test_the_batch_is_one_override_and_the_learning_rate_follows_it():
    cfg, schedule = planned(BASE, "dataloader.train.total_batch_size=8")
    assert (schedule.iterations, cfg.optimizer.lr) == (368_750, 2e-5)
    cfg, _ = planned(BASE, "dataloader.train.total_batch_size=8", "train.scale_lr=false")
    assert cfg.optimizer.lr == 8e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.accum_iter=5", "32 is not divisible by 1 processes x 5 micro-batches"),
        ("dataloader.train.total_batch_size=0", "total_batch_size 0"),
        ("train.warmup_epochs=25", "warmup_epochs 25 must be less than train.epochs 25"),
        ("train.epochs=0", "must be less than train.epochs 0"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error(override, message):
    with pytest.raises(UsageError, match=message):
        planned(BASE, override)


# --- optimizer -----------------------------------------------------------------------------------


def groups_of(name):
    """Parameter name to its group's (lr, weight decay), for a small model of a recipe."""
    part = "bottom_up" if name == BASE else "net"
    sizes = ("embed_dim=[16,24,32]", "depth=[1,1,11]", "num_heads=2", "img_size=64")
    cfg = load(name, *(f"model.backbone.{part}.{size}" for size in sizes))
    cfg.optimizer.params.model = model = instantiate(cfg.model)
    optimizer = instantiate(cfg.optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_norms_and_position_tables_have_no_weight_decay_and_the_frozen_one_is_left_out():
    groups = groups_of(BASE)
    without = {name for name, (_, decay) in groups.items() if decay == 0}
    assert {name for name in groups if "norm" in name or "bias_table" in name} == without
    assert {lr for lr, _ in groups.values()} == {8e-5}
    assert not any("pos_embed" in name for name in groups)


def test_the_second_recipes_learning_rate_falls_from_layer_to_layer():
    groups = groups_of(VITDET)
    lr = {name.removeprefix("backbone.net."): value for name, (value, _) in groups.items()}
    assert lr["backbone.simfp_2.0.weight"] == lr["roi_heads.box_head.fc1.weight"] == 1e-4
    for i in range(11):
        assert lr[f"blocks3.{i}.mlp.fc1.weight"] == pytest.approx(1e-4 * 0.8 ** (11 - i))
        assert lr[f"blocks3.{i}.attn.rel_pos_h"] == pytest.approx(1e-4 * 0.8 ** (11 - i))
    stem = ("pos_embed", "patch_embed1.proj.weight", "patch_embed4.weight")
    for name in (*stem, "blocks1.0.conv1.weight", "blocks2.0.mlp.fc1.weight"):
        assert lr[name] == pytest.approx(1e-4 * 0.8**12)
    tables = ("pos_embed", "rel_pos_h", "rel_pos_w")
    assert all(groups[name][1] == 0 for name in groups if name.endswith(tables))


# --- overrides -----------------------------------------------------------------------------------


def test_the_image_size_is_one_override():
    cfg = load(BASE, "data.image_size=512")
    assert build(cfg).backbone.bottom_up.geometry.img_size == (512, 512)
    assert cfg.model.backbone.square_pad == 512
    resize, crop = (instantiate(a) for a in cfg.dataloader.train.mapper.augmentations[1:])
    assert (resize.target_height, resize.target_width) == (512, 512)
    assert list(crop.crop_size) == [512, 512]
    (test,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert (test.short_edge_length, test.max_size) == ((512, 512), 512)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=50", "override train.epoch: there is no epoch: did you mean epochs?"),
        ("trian.epochs=50", "there is no trian: did you mean train?"),
        ("data.train.jsn=a", "did you mean json?"),
        ("dataloader.train.mapper.augmentations.7.prob=0", "there is no 7"),
        ("train.epochs.more=1", "there is no more"),
        ("train.epochs", "overrides have the form key.key=value"),
    ],
)
def test_an_override_that_names_nothing_is_an_error(override, message):
    with pytest.raises(UsageError) as error:
        load(BASE, override)
    assert message in str(error.value)


def test_an_argument_that_the_recipe_does_not_name_can_be_given():
    cfg = load(BASE, "model.backbone.bottom_up.in_chans=1", "dataloader.evaluator.tasks=[bbox]")
    assert cfg.model.backbone.bottom_up.in_chans == 1


def test_an_unknown_recipe_is_an_error_that_names_those_there_are():
    with pytest.raises(UsageError, match=f"there is no configuration DET/none.py.*{BASE}"):
        load_config("DET/none.py")


def test_a_recipe_read_twice_is_not_changed_by_the_first(tmp_path):
    first = load(BASE, "train.epochs=3")
    assert load(BASE).train.epochs == 25 and first.train.epochs == 3


def test_the_yaml_that_a_run_leaves_is_a_recipe(tmp_path):
    LazyConfig.save(load(BASE, "data.image_size=512"), str(tmp_path / "config.yaml"))
    cfg = load_config(tmp_path / "config.yaml")
    assert build(cfg).backbone.bottom_up.geometry.img_size == (512, 512)


# --- heads ---------------------------------------------------------------------------------------


def test_a_detectors_heads_are_made_as_its_weights_have_them():
    cfg = load_config(small.CONFIG)
    cfg.model.roi_heads.num_classes = 4
    state = build(cfg).state_dict()
    boxes = {name: t for name, t in state.items() if "mask_head" not in name}
    for weights, masks in ((state, True), (boxes, False)):
        cfg = load_config(small.CONFIG)
        fit_heads(cfg.model, Weights(Path("some.pth"), weights))
        model = build(cfg)
        assert model.roi_heads.num_classes == 4 and model.roi_heads.mask_on is masks
        assert model.state_dict().keys() == weights.keys()
