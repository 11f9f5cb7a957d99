import argparse

import pytest
import torch
from torch import nn

from build_classifier import build_optimizer
from engine_finetune import Best
from models_convvit import ConvViT
from util.data.datasets import seeded
from util.errors import UsageError
from util.run.lars import LARS
from util.run.logger import Meters
from util.run.optim_step import OptimStep
from util.run.resume import Checkpoints, find_resumable
from util.run.states import compare_moments
from util.weights.checkpoint import load_file

TINY = dict(
    img_size=(32, 32), embed_dim=(4, 4, 8), depth=(1, 1, 1), num_heads=2, mlp_ratio=(1, 1, 1)
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_random_state():
    with seeded(0):
        yield


def run_parts():
    """The parts of a fine-tuning."""
    model = ConvViT(**TINY, num_classes=3)
    settings = argparse.Namespace(weight_decay=0.05, layer_decay=0.65, lr=1e-3)
    optimizer = build_optimizer(settings, model)
    parts = {"model": model, "optimizer": optimizer, "scaler": OptimStep(model, optimizer, CPU)}
    return parts | {"meters": Meters(("loss", "grad_norm"), CPU), "best": Best()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The contents of a checkpoint in the middle of a run."""
    folder = tmp_path_factory.mktemp("run")
    with seeded(0):
        parts = run_parts()
        parts["model"](torch.randn(2, 3, 32, 32)).sum().backward()
        parts["optimizer"].step()
        extra = {"program": "fine-tuning", "num_images": 9, "classes": ["a", "b", "c"]}
        Checkpoints(folder, {"epochs": 3, "lr": 0.1}, parts, extra).save(1, 2, "x.pth")
    return load_file(folder / "x.pth")


def changed(value, keys, new):
    """A copy of nested containers with another value at a place, or without it."""
    key, *rest = keys
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = changed(copy[key], rest, new)
    elif new is GONE:
        del copy[key]
    else:
        copy[key] = new
    return copy


GONE = object()
DEEP = [0]
for _ in range(40):
    DEEP = [DEEP, DEEP]  # as text it would have more digits than there is memory
WEIGHT = "blocks1.0.conv1.weight"
ODD = [
    (("epoch",), "one", "its epoch is 'one', it must be a count"),
    (("epoch",), -1, "its epoch is -1"),
    (("epoch",), 10**30, "its epoch is 1000"),
    (("step",), torch.zeros(2), "its step is float32 of shape [2]"),
    (("step",), 1.5, "its step is 1.5"),
    (("args",), [1], "its args is a list, it must be plain values by name"),
    (("args", "lr"), torch.zeros(2), "its args is a dict, it must be plain values"),
    (("args", "lr"), DEEP, "its args is a dict, it must be plain values"),
    (("classes",), 5, "its classes is 5"),
    (("num_images",), GONE, "no training state of this program (no num_images)"),
    (("optimizer",), None, "its optimizer is None"),
    (("optimizer", "param_groups"), {}, "its optimizer is a dict"),
    (("optimizer", "param_groups", 0, "params"), ["a"], "its optimizer is a dict"),
    (("optimizer", "param_groups", 0), GONE, "its optimizer has other groups of parameters"),
    (("optimizer", "state"), {}, "its optimizer lacks exp_avg, exp_avg_sq, step of parameter 0"),
    (("optimizer", "state", 4), GONE, "lacks exp_avg, exp_avg_sq, step of parameter 4"),
    (("optimizer", "state", 4, "step"), GONE, "lacks exp_avg, exp_avg_sq, step of parameter 4"),
    (("optimizer", "state", 4, "step"), torch.tensor(0.0), "must be more than 0"),
    (("optimizer", "state", 4, "exp_avg"), torch.zeros(77), "float32 of shape [77], it must be"),
    (("optimizer", "state", 4, "exp_avg"), None, "is None, it must be a tensor"),
    (("optimizer", "state", 999), {}, "has a state for parameter 999, which is none"),
    (("model",), 7, "its model is 7"),
    (("model", WEIGHT), GONE, f"its model lacks {WEIGHT}"),
    (("model", "more"), torch.zeros(1), "its model has besides more"),
    (("model", WEIGHT), torch.zeros(2), f"its model.{WEIGHT} is float32 of shape [2]"),
    (("model", WEIGHT), torch.zeros(4, 4, 1, 1, dtype=torch.int64), "is int64 of shape"),
    (("scaler",), {}, "its scaler lacks scaler, skipped, skipped_in_a_row"),
    (("scaler", "skipped"), "x", "its scaler.skipped is 'x', it must be a number"),
    (("meters",), GONE, "its meters is None"),
    (("meters", "epoch"), [1.0], "its meters.epoch is a list, it must be 3 entries"),
    (("meters", "epoch", 1), "x", "its meters.epoch.1 is 'x'"),
    (("best", "acc1"), None, "its best.acc1 is None"),
    (("random_state",), 5, "its random_state is 5"),
    (("random_state",), [5], "its random_state is a list"),
    (("random_state", 0, "torch"), torch.zeros(3, dtype=torch.uint8), "random_state is not one"),
    (("random_state", 0, "numpy"), (), "random_state is not one"),
    (("random_state", 0, "python"), (3, [0] * 625, "x"), "random_state is not one"),
]  # fmt: skip


NAMES = [".".join(map(str, keys)) for keys, *_ in ODD]


def resume(content, path):
    torch.save(content, path)
    parts = run_parts()
    return Checkpoints("", {}, parts).restore(find_resumable(str(path), path.parent / "run")), parts


def test_a_sound_state_is_restored(saved, tmp_path):
    position, parts = resume(saved, tmp_path / "x.pth")
    assert position == (1, 2)
    assert len(parts["optimizer"].state) == len(list(parts["model"].parameters()))


@pytest.mark.parametrize(("keys", "new", "phrase"), ODD, ids=NAMES)
def test_a_state_that_does_not_fit_is_refused_in_a_line(keys, new, phrase, saved, tmp_path):
    with pytest.raises(UsageError) as error:
        resume(changed(saved, keys, new), tmp_path / "x.pth")
    assert phrase in str(error.value) and str(error.value).isprintable()


def test_nothing_is_changed_by_a_state_that_does_not_fit(saved):
    parts = run_parts()
    before = {name: t.clone() for name, t in parts["model"].state_dict().items()}
    with pytest.raises(UsageError, match="meters"):
        Checkpoints("", {}, parts).restore(changed(saved, ("meters", "epoch"), []))
    torch.testing.assert_close(parts["model"].state_dict(), before, rtol=0, atol=0)


def test_settings_of_the_groups_are_this_runs_not_the_files(saved, tmp_path):
    there = changed(saved, ("optimizer", "param_groups", 0, "betas"), "x")
    _, parts = resume(there, tmp_path / "x.pth")
    assert parts["optimizer"].param_groups[0]["betas"] == (0.9, 0.999)


def test_a_run_goes_on_with_float16_from_one_without_and_back(saved):
    parts = run_parts()
    with_scaler = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    with_scaler |= {"growth_interval": 2000, "_growth_tracker": 7}
    there = changed(saved, ("scaler", "scaler"), with_scaler)
    assert Checkpoints("", {}, parts).restore(there) == (1, 2)
    parts["scaler"].scaler = torch.amp.GradScaler("cpu")
    assert Checkpoints("", {}, parts).restore(saved) == (1, 2)
    assert Checkpoints("", {}, parts).restore(there) == (1, 2)
    assert parts["scaler"].scaler.get_scale() == 8.0


def test_a_probes_momentum_must_be_there():
    layer = nn.Linear(2, 3)
    optimizer = LARS(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lacks mu of parameter 1"):
        compare_moments("optimizer", {0: {"mu": torch.zeros(3, 2)}}, optimizer, started=True)
    compare_moments("optimizer", {}, optimizer, started=False)
