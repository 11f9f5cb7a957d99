import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from SEG.options import without_sync_bn
from SEG.test import follow_scale
from SEG.train import accumulate
from util.errors import UsageError
from util.weights.load import load_weights
from util.weights.read import weights_of

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "state_dict_keys.json"
PAPER = ("small", "base", "large")


def read(name: str) -> Config:
    return Config.fromfile(ROOT / "SEG" / "configs" / f"upernet_convmae_{name}.py")


def build(name: str, device: str = "meta") -> torch.nn.Module:
    init_default_scope("mmseg")
    with torch.device(device):
        return MODELS.build(without_sync_bn(read(name).model.to_dict()))


def conv_module(name: str, *shape: int) -> dict[str, list[int]]:
    """The names and shapes of mmcv's convolution without a bias, with batch norm."""
    norm = {f"{name}.bn.{key}": [shape[0]] for key in ("weight", "bias")}
    norm |= {f"{name}.bn.running_{key}": [shape[0]] for key in ("mean", "var")}
    return {f"{name}.conv.weight": list(shape), **norm, f"{name}.bn.num_batches_tracked": []}


def published_heads() -> dict[str, list[int]]:
    """The names and shapes of the heads in the published UperNet checkpoint."""
    shapes = {
        "decode_head.conv_seg.weight": [150, 768, 1, 1],
        "decode_head.conv_seg.bias": [150],
        "auxiliary_head.conv_seg.weight": [150, 256, 1, 1],
        "auxiliary_head.conv_seg.bias": [150],
    }
    for i in range(4):
        shapes |= conv_module(f"decode_head.psp_modules.{i}.1", 768, 768, 1, 1)
    shapes |= conv_module("decode_head.bottleneck", 768, 5 * 768, 3, 3)
    for i, width in enumerate((256, 384, 768)):
        shapes |= conv_module(f"decode_head.lateral_convs.{i}", 768, width, 1, 1)
        shapes |= conv_module(f"decode_head.fpn_convs.{i}", 768, 768, 3, 3)
    shapes |= conv_module("decode_head.fpn_bottleneck", 768, 4 * 768, 3, 3)
    return shapes | conv_module("auxiliary_head.convs.0", 256, 768, 3, 3)


@pytest.mark.filterwarnings("ignore:.*to a meta parameter")
def test_the_published_checkpoints_names_load_with_nothing_missing():
    backbone = json.loads(GOLDEN.read_text())["SEG ConvMAE backbone base, 512x512"]
    shapes = {f"backbone.{name}": shape for name, shape in backbone.items()} | published_heads()
    # A single number behind each tensor keeps it small.
    counter = {True: torch.int64, False: torch.float32}
    state = {
        name: torch.zeros((), dtype=counter[name.endswith("num_batches_tracked")]).expand(shape)
        for name, shape in shapes.items()
    }
    classes = tuple(f"class {i}" for i in range(150))
    meta = {"mmseg_version": "0.20", "CLASSES": classes, "PALETTE": [[0, 0, 0]] * 150, "iter": 160}
    content = {"meta": meta, "state_dict": state, "optimizer": {}}
    weights = weights_of(content, "published.pth")
    assert weights.kind == "segmentor" and weights.classes == list(classes)
    report = load_weights(build("base_512_slide_160k_ade20k"), weights)
    assert report.missing == report.unexpected == report.resized == []
    assert report.loaded == len([name for name in shapes if not name.endswith("position_index")])


@pytest.mark.parametrize(("size", "millions"), [("small", 41.7), ("base", 160.2), ("large", 456.0)])
def test_models_have_their_number_of_parameters(size, millions):
    model = build(f"{size}_512_slide_160k_ade20k")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_base_is_the_papers_recipe():
    config = read("base_512_slide_160k_ade20k")
    assert config.model.decode_head.channels == 768
    assert config.model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert config.model.auxiliary_head.in_index == 2
    assert config.model.backbone.drop_path_rate == 0.2
    assert config.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert config.optim_wrapper.type == "AmpOptimWrapper"
    warmup, decay = config.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (decay.type, decay.power, decay.eta_min, decay.end) == ("PolyLR", 1.0, 0.0, 160_000)
    assert config.train_cfg.max_iters == 160_000
    assert config.auto_scale_lr.base_batch_size == 16 == 8 * config.train_dataloader.batch_size


def test_accumulation_keeps_the_number_and_the_rates_of_steps():
    plain, config = read("base_512_slide_160k_ade20k"), read("base_512_slide_160k_ade20k")
    accumulate(config, 4)
    assert config.optim_wrapper.accumulative_counts == 4
    assert config.train_cfg.max_iters == 4 * 160_000
    assert config.train_cfg.val_interval == 4 * 16_000
    assert config.default_hooks.checkpoint.interval == 4 * 4000
    assert config.param_scheduler == plain.param_scheduler
    assert config.default_hooks.param_scheduler.type == "StepSchedulerHook"


def test_accumulation_is_refused_where_epochs_are_counted():
    config = read("base_512_slide_160k_ade20k")
    config.train_cfg = Config(dict(type="EpochBasedTrainLoop", max_epochs=3))
    with pytest.raises(UsageError, match="not epochs"):
        accumulate(config, 4)


@pytest.mark.parametrize(
    "resize", [{"scale": (1024, 256)}, {"scale": 256}, {"scale_factor": 0.5, "scale": None}]
)
def test_augmented_testing_follows_the_scale_of_plain_testing(resize):
    config = read("base_512_slide_160k_ade20k")
    follow_scale(config.tta_pipeline, [dict(type="Resize", keep_ratio=True, **resize)])
    steps = config.tta_pipeline[1]["transforms"][0]
    if resize["scale"]:
        longest = {256: (128, 192, 256)}.get(resize["scale"], (512, 768, 1024))
        assert [s["scale"] for s in steps][:3] == [*zip(longest, (128, 192, 256), strict=True)]
        assert not any("scale_factor" in s for s in steps)
    else:
        assert [s["scale_factor"] for s in steps][:3] == [0.25, 0.375, 0.5]


@pytest.mark.parametrize(
    "size", [*(f"{size}_512_slide_160k_ade20k" for size in PAPER), "tiny_scenes"]
)
def test_heads_fit_the_encoder_and_the_classes(size):
    config = read(size)
    widths, head = list(config.model.backbone.embed_dim), config.model.decode_head
    assert head.in_channels == [[*widths, widths[-1]][i] for i in head.in_index]
    assert config.model.auxiliary_head.in_channels == widths[-1]
    classes = 150 if "ade20k" in size else 11
    assert config.model.decode_head.num_classes == classes
    assert config.model.auxiliary_head.num_classes == classes
    crop = config.model.data_preprocessor.size
    assert config.model.backbone.img_size == config.model.test_cfg.crop_size == crop
    (step,) = [s for s in config.train_dataloader.dataset.pipeline if s.type == "RandomCrop"]
    assert step.crop_size == crop
