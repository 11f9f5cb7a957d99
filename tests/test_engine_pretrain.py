"""Pretraining steps as a GPU would take them."""

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from engine_pretrain import train_one_epoch
from models_convmae import MaskedAutoencoderConvViT
from models_teacher import load_teacher
from tests.fake_gpu import GPU, FakeRun, NeverWait, Waited, fake_gpu, to_fake_gpu
from tests.modules import DECODER, INPUTS, SIZES
from util.data.transforms import channel_stats

TINY = SIZES | DECODER
VIDEO = INPUTS["video"] | {"mask_unit": (2, 1, 1)}
# Arguments of the model, and of the run.
FAMILIES = {
    "image": ({}, dict(dtype=torch.float16)),
    "complementary masks, class token": (dict(complementary=True, class_token=True), {}),
    "arrays, a share predicted": (dict(norm_pix_loss=True), dict(predict_share=0.5, arrays=True)),
    "teacher": (dict(mimic_dim=64), dict(losses=("loss_reconstruction", "loss_mimic"))),
    "video, a share predicted": (VIDEO | {"complementary": True}, dict(predict_share=0.5)),
}


def small_teacher(path):
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return load_teacher("test_vit", path).see_through(*channel_stats(3), (2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_of_pretraining_waits_for_a_gpu(family, tmp_path):
    sizes, options = FAMILIES[family]
    settings = {"predict_share": 1.0, "arrays": False, **options}
    model = MaskedAutoencoderConvViT(**TINY | INPUTS["image"] | sizes)
    teacher = small_teacher(tmp_path / "vit.pth") if family == "teacher" else None
    pixels = torch.float32 if settings["arrays"] else torch.uint8
    with fake_gpu():
        to_fake_gpu(model)
        teacher = teacher and to_fake_gpu(teacher)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        batch = torch.empty(2, 3, *model.geometry.img_size, dtype=pixels)
        run = FakeRun(model, optimizer, [batch], **settings)
        with run.never_waiting():
            train_one_epoch(run, 0, 0, 0.75, settings["predict_share"], teacher)
    assert run.report.done == 1
    assert {optimizer.state[p]["exp_avg"].device for p in parameters} == {GPU}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x > 0],
        lambda x: x + torch.ones(2),
    ],
    ids=["a value", "a truth", "a copy", "new numbers", "an index", "a choice", "another device"],
)
def test_what_waits_for_a_gpu_is_found_without_one(wait):
    found = (Waited, DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
    with fake_gpu():
        x = torch.empty(2, device=GPU)
        with NeverWait(), pytest.raises(found):
            wait(x)
