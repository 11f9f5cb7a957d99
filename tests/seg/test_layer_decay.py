import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from SEG.options import without_sync_bn
from tests.seg.test_configs import read

RECIPES = {
    "small_512_slide_160k_ade20k": (1e-4, 0.75, 11),
    "base_512_slide_160k_ade20k": (1e-4, 0.75, 11),
    "large_512_slide_160k_ade20k": (1e-4, 0.75, 23),
    "tiny_scenes": (1e-2, 0.25, 4),
}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    """Learning rate, layer decay, blocks of stage 3; and of each parameter (lr, wd, scale)."""
    init_default_scope("mmseg")
    config = read(request.param)
    wrapper = config.optim_wrapper.to_dict() | {"type": "OptimWrapper"}
    config = without_sync_bn(config.model.to_dict())
    with torch.device("meta"):
        model = MODELS.build(config)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=wrapper.pop("constructor"),
            paramwise_cfg=wrapper.pop("paramwise_cfg"),
            optim_wrapper_cfg=wrapper,
        )
    )
    optimizer = constructor(model).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"], group["lr_scale"]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names), "each parameter is in one group"
    return *RECIPES[request.param], dict(found)


def layer(name: str, last: int) -> int:
    """The layer of a parameter, as the paper's recipe counts them."""
    if name.startswith("backbone.blocks3."):
        return int(name.split(".")[2]) + 1
    stem = ("backbone.pos_embed", "backbone.patch_embed", "backbone.blocks1", "backbone.blocks2")
    return 0 if name.startswith(stem) else last


def test_the_learning_rate_decays_from_layer_to_layer(recipe):
    lr, decay, blocks, groups = recipe
    last = blocks + 1
    for name, (rate, _, scale) in groups.items():
        assert scale == pytest.approx(decay ** (last - layer(name, last))), name
        assert rate == pytest.approx(lr * scale), name
    assert {layer(name, last) for name in groups} == set(range(last + 1))


def test_one_dimension_and_position_tables_have_no_weight_decay(recipe):
    *_, groups = recipe
    without = {name for name, (_, decay, _) in groups.items() if decay == 0}
    assert {decay for _, decay, _ in groups.values()} == {0.0, 0.05}
    for name in groups:
        flat = name.endswith(("bias", "pos_embed", "_bias_table", "gamma_1", "gamma_2"))
        norm = ".norm" in name or ".bn." in name or name.startswith("backbone.fpn.1")
        assert (name in without) == (flat or norm), name
