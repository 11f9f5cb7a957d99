"""Checkpoints of the original code, made here in its format: parameters in its order, its groups,
optimizers that took real steps on them."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

import models_convmae
import models_convvit
from build_classifier import build_optimizer
from models_convmae import MaskedAutoencoderConvViT
from models_convvit import ConvViT
from tests.checks import assert_ok, assert_one_line, command_line, load, log_lines
from tests.runs import write_images
from util.data.datasets import seeded
from util.errors import UsageError
from util.run.lars import LARS
from util.run.optim_step import OptimStep
from util.run.original import comparable_args
from util.run.resume import Checkpoints, find_resumable
from util.run.same_run import check_same_run

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_keys.json").read_text())
TINY = dict(img_size=(32, 32), patch_size=(2, 2, 1))
SMALL = dict(
    img_size=(32, 32), embed_dim=(8, 16, 32), depth=(1, 2, 3), num_heads=2, mlp_ratio=(2, 2, 2)
)
ARGS = argparse.Namespace(
    model="convmae_convvit_base_patch16", input_size=32, blr=1.5e-4, weight_decay=0.05, epochs=9
)


def autoencoder():
    decoder = dict(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    return MaskedAutoencoderConvViT(**SMALL, **decoder)


def classifier():
    return ConvViT(**SMALL, num_classes=5)


def probe():
    model = classifier().requires_grad_(False)
    model.head.requires_grad_(True)
    model.add_probe_norm()
    return model


def names_in_the_originals_order(model):
    """The names of a small model, which are among those of the original's base model."""
    kind = "convmae_convvit_base_patch16" if hasattr(model, "mask_token") else None
    names = list(GOLDEN[kind or "convvit_base_patch16[global_pool]"])
    if "head.1.weight" in model.state_dict():
        at = names.index("head.weight")
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        names[at : at + 2] = [f"head.0.{b}" for b in buffers] + ["head.1.weight", "head.1.bias"]
    return [name for name in names if name in model.state_dict()]


# --- the originals' groups, by what MAE's paper and code say of them ------------------------------


def pretraining_groups(model, names):
    """Without decay: one dimension and biases; then the others."""
    named = dict(model.named_parameters())
    trained = [(name, named[name]) for name in names if name in named]
    trained = [(name, p) for name, p in trained if p.requires_grad]
    plain = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if not (p.ndim == 1 or name.endswith(".bias"))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]


def finetuning_groups(model, names, decay=0.65):
    """A group for each layer and decay, in the order of first appearance."""
    named, groups, layers = dict(model.named_parameters()), {}, len(model.blocks3) + 1
    for name in names:
        layer = layers
        if name == "pos_embed" or name.startswith(("patch_embed", "blocks1", "blocks2")):
            layer = 0
        elif name.startswith("blocks3"):
            layer = int(name.split(".")[1]) + 1
        plain = named[name].ndim == 1 or name == "pos_embed"
        settings = {"lr_scale": decay ** (layers - layer), "weight_decay": 0.0 if plain else 0.05}
        groups.setdefault((layer, plain), settings | {"params": []})["params"].append(named[name])
    return list(groups.values())


# --- both sides -----------------------------------------------------------------------------------


def pretraining_loss(model, step):
    torch.manual_seed(step)
    imgs = torch.randn(4, 3, 32, 32)
    return model(imgs, 0.5, torch.rand(4, model.geometry.num_mask_units))[0]


def classifying_loss(model, step):
    torch.manual_seed(step)
    return F.cross_entropy(model(torch.randn(6, 3, 32, 32)), torch.arange(6) % 2)


KINDS = {
    "pretraining": (
        autoencoder,
        lambda model, names: torch.optim.AdamW(
            pretraining_groups(model, names), lr=1e-2, betas=(0.9, 0.95)
        ),
        lambda model: torch.optim.AdamW(
            param_groups_weight_decay(model, 0.05), lr=1e-2, betas=(0.9, 0.95), fused=True
        ),
        pretraining_loss,
    ),
    "fine-tuning": (
        classifier,
        lambda model, names: torch.optim.AdamW(finetuning_groups(model, names), lr=1e-2),
        lambda model: build_optimizer(
            argparse.Namespace(weight_decay=0.05, layer_decay=0.65, lr=1e-2), model
        ),
        classifying_loss,
    ),
    "probing": (
        probe,
        lambda model, names: LARS(model.head.parameters(), lr=1.0),
        lambda model: LARS(model.head.parameters(), lr=1.0),
        classifying_loss,
    ),
}


@pytest.fixture(autouse=True)
def own_random_state():
    with seeded(0):
        yield


def take_step(model, optimizer, loss, number):
    """A step; the layers' scales of the rate count, as MAE's schedule applies them."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group.get("lr_scale", 1.0)
    optimizer.zero_grad()
    loss(model, number).backward()
    optimizer.step()


def the_originals_file(kind, path, steps=3, build=None, **entries):
    """Train in the original's order, save as the original does; returns model and optimizer."""
    small, their_optimizer, _, loss = KINDS[kind]
    build = build or small
    torch.manual_seed(1)
    model = build()
    names = names_in_the_originals_order(model)
    optimizer = their_optimizer(model, names)
    for number in range(steps):
        take_step(model, optimizer, loss, number)
    state = model.state_dict()
    scaler = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler |= {"growth_interval": 2000, "_growth_tracker": 7}
    content = {
        "model": OrderedDict((name, state[name]) for name in names),
        "optimizer": optimizer.state_dict(),
        "epoch": 4,
        "scaler": scaler,
        "args": ARGS,
    }
    torch.save(content | entries, path)
    return model, optimizer


def our_run(kind, folder):
    """Model, optimizer and checkpoints of a run that begins."""
    build, _, our_optimizer, _ = KINDS[kind]
    torch.manual_seed(2)
    model = build()
    optimizer = our_optimizer(model)
    parts = {"model": model, "optimizer": optimizer}
    parts["scaler"] = OptimStep(model, optimizer, torch.device("cpu"))
    return model, optimizer, Checkpoints(folder, {}, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_is_the_originals(kind, tmp_path):
    theirs, their_optimizer = the_originals_file(kind, tmp_path / "original.pth")
    model, optimizer, checkpoints = our_run(kind, tmp_path / "run")
    content = find_resumable(str(tmp_path / "original.pth"), tmp_path / "run")
    assert checkpoints.restore(content) == (5, 0)
    take_step(theirs, their_optimizer, KINDS[kind][3], 3)
    take_step(model, optimizer, KINDS[kind][3], 3)
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
def test_the_orders_differ_so_that_numbers_alone_would_mislead(kind):
    model = KINDS[kind][0]()
    assert names_in_the_originals_order(model) != list(model.state_dict())


def test_plain_numbers_of_steps_are_taken_as_older_versions_of_torch_wrote_them(tmp_path):
    _, optimizer = the_originals_file("pretraining", tmp_path / "x.pth")
    saved = optimizer.state_dict()
    saved["state"] = {n: s | {"step": int(s["step"])} for n, s in saved["state"].items()}
    the_originals_file("pretraining", tmp_path / "x.pth", optimizer=saved)
    _, ours, checkpoints = our_run("pretraining", tmp_path)
    checkpoints.restore(find_resumable(str(tmp_path / "x.pth"), tmp_path / "run"))
    assert {state["step"].item() for state in ours.state.values()} == {3.0}


def damage(change):
    """The entries of an original file's optimizer after a change."""

    def entries(optimizer):
        saved = optimizer.state_dict()
        saved = {"state": dict(saved["state"]), "param_groups": saved["param_groups"]}
        change(saved)
        return saved

    return entries


def give(saved, number, **values):
    saved["state"][number] = saved["state"][number] | values


DAMAGES = {
    "no_state": (lambda s: s.update(state={}), "lacks exp_avg, exp_avg_sq, step"),
    "one_missing": (lambda s: s["state"].pop(3), "lacks exp_avg, exp_avg_sq, step"),
    "other_shape": (lambda s: give(s, 0, exp_avg=torch.zeros(2)), "float32 of shape [2]"),
    "no_tensor": (lambda s: give(s, 0, exp_avg=3), "is 3, it must be a tensor"),
    "no_step": (lambda s: give(s, 0, step="x"), "step is 'x'"),
    "one_group": (lambda s: s["param_groups"].pop(), "its optimizer has groups of"),
    "other_group": (
        lambda s: s["param_groups"][1].update(weight_decay=0.3),
        "a weight_decay of 0.3, this run's has 0.05",
    ),
    "text_in_a_group": (lambda s: s["param_groups"][1].update(weight_decay="x"), "decay of x"),
    "a_number_twice": (lambda s: s["param_groups"][0]["params"].append(0), "groups of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_optimizer_that_does_not_fit_is_refused_in_a_line(name, tmp_path):
    change, phrase = DAMAGES[name]
    _, optimizer = the_originals_file("pretraining", tmp_path / "x.pth")
    saved = damage(change)(optimizer)
    the_originals_file("pretraining", tmp_path / "x.pth", optimizer=saved)
    model, _, checkpoints = our_run("pretraining", tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    content = find_resumable(str(tmp_path / "x.pth"), tmp_path / "run")
    with pytest.raises(UsageError) as error:
        checkpoints.restore(content)
    assert phrase in str(error.value) and str(error.value).isprintable()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("entries", "phrase"),
    [({"epoch": "four"}, "no training state"), ({"epoch": -1}, "no training state"),
     ({"args": None}, "no training state"), ({"optimizer": 5}, "its optimizer is 5"),
     ({"optimizer": {"state": {}}}, "its optimizer is a dict")],
    ids=["epoch", "negative_epoch", "args", "optimizer", "groups"],
)  # fmt: skip
def test_entries_of_other_types_are_refused_in_a_line(entries, phrase, tmp_path):
    the_originals_file("pretraining", tmp_path / "x.pth", **entries)
    with pytest.raises(UsageError, match=phrase):
        find_resumable(str(tmp_path / "x.pth"), tmp_path / "run")


def test_arguments_are_compared_where_both_mean_the_same():
    saved = dict(input_size=32, aa=None, blr=3.0, weight_decay=0.1)
    saved |= dict(batch_size=64, accum_iter=2, world_size=8)
    now = dict(input_size=[32, 32], aa="none", blr=1.0, weight_decay=0.05)
    now |= dict(effective_batch_size=512, amp="none")
    expected = now | {"effective_batch_size": 1024, "weight_decay": 0.1}
    assert comparable_args(saved, now) == expected


# --- from the command line ------------------------------------------------------------------------


def test_two_names_of_one_model_are_the_same():
    name = "convmae_convvit_base_patch16"
    assert comparable_args({"model": f"{name}_dec512d8b"}, {"model": name}) == {"model": name}
    assert comparable_args({"model": name}, {"model": None}) == {"model": None}


def test_no_colour_jitter_is_none_of_it():
    saved, now = {"aa": "", "color_jitter": None}, {"aa": "none", "color_jitter": 0.0}
    assert comparable_args(saved, now) == now


def test_a_setting_that_the_original_had_and_this_run_leaves_away_is_another_run():
    saved = {"cutmix_minmax": [0.2, 0.8]}
    with pytest.raises(UsageError, match=r"--cutmix_minmax 0\.2 0\.8 there, None here"):
        now = {"cutmix_minmax": None}
        check_same_run(argparse.Namespace(**now), comparable_args(saved, now))


def tiny(kind):
    """Builds the smallest model that the programs know."""
    if kind == "pretraining":
        return models_convmae.MODELS["convmae_convvit_tiny_patch16"](**TINY)
    model = models_convvit.MODELS["convvit_tiny_patch16"](**TINY, num_classes=2)
    if kind == "probing":
        model.requires_grad_(False).head.requires_grad_(True)
        model.add_probe_norm()
    return model


def labeled(folder):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            write_images(folder / split / name, 8)
    return folder


PROGRAMS = {
    "pretraining": "main_pretrain.py",
    "fine-tuning": "main_finetune.py",
    "probing": "main_linprobe.py",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_goes_on_from_the_originals_file(kind, launcher, tmp_path):
    settings = dict(lr=1e-3, epochs=6, warmup_epochs=1, weight_decay=0.05 * (kind != "probing"))
    settings |= {"layer_decay": 0.65} if kind == "fine-tuning" else {}
    path, output = tmp_path / "original.pth", tmp_path / "run"
    args = argparse.Namespace(**settings, input_size=32, batch_size=4, world_size=1, start_epoch=0)
    the_originals_file(kind, path, build=lambda: tiny(kind), args=args)
    here = dict(data_path=labeled(tmp_path / "data"), output_dir=output, resume=path, batch_size=4)
    here |= dict(num_workers=0, device="cpu")
    if kind == "pretraining":
        here |= dict(model="convmae_convvit_tiny_patch16", input_size=32, patch_size=(2, 2, 1))
    command = command_line(settings | here)
    result = launcher.run(*command, program=PROGRAMS[kind])
    assert_ok(result)
    assert "from epoch 6, step 0" in result.out
    assert [line["epoch"] for line in log_lines(output)] == [5]
    moments = load(output / "checkpoint.pth")["optimizer"]["state"].values()
    done = {state["step"].item() for state in moments if "step" in state}
    assert done == (set() if kind == "probing" else {3 + 4})  # in the file, in an epoch


def test_other_flags_than_the_originals_are_named(launcher, tmp_path):
    path = tmp_path / "original.pth"
    args = argparse.Namespace(mask_ratio=0.6, epochs=100, input_size=32)
    the_originals_file("pretraining", path, build=lambda: tiny("pretraining"), args=args)
    command = command_line(
        dict(data_path=labeled(tmp_path / "data"), output_dir=tmp_path / "run", resume=path,
             model="convmae_convvit_tiny_patch16", input_size=32, patch_size=(2, 2, 1),
             num_workers=0, device="cpu", epochs=100, batch_size=4)
    )  # fmt: skip
    assert_one_line(launcher.run(*command), 2, "--mask_ratio 0.6 there, 0.75 here")


@pytest.mark.parametrize(("family", "complementary"), [("convmae", None), ("fastconvmae", True)])
def test_complementary_masks_of_the_original_are_known_by_the_models_name(family, complementary):
    saved = {"model": f"{family}_convvit_base_patch16_dec512d8b"}
    now = {"model": f"{family}_convvit_base_patch16", "complementary": True, "teacher": "a"}
    expected = {"model": now["model"], "complementary": complementary, "teacher": None}
    assert comparable_args(saved, now) == expected
