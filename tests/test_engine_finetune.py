"""Supervised training and evaluation, without a process of their own."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from unittest.mock import Mock

import pytest
import timm.utils
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import build_classifier
import main_finetune
from build_classifier import Trainee
from engine_evaluate import evaluate, judge
from engine_finetune import Best, train_one_epoch
from models_convvit import ConvViT, convvit_tiny_patch16
from tests.fake_gpu import GPU, FakeRun, fake_gpu, to_fake_gpu
from tests.modules import INPUTS, SIZES
from tests.pictures import picture
from util.data.datasets import LabeledImages
from util.data.loader import Loader
from util.data.samplers import EvalSampler
from util.data.transforms import center_crop_transform
from util.errors import TrainingError
from util.run.geometry_args import fill_geometry_flags
from util.run.lars import LARS

CPU = torch.device("cpu")


def arguments(*more):
    args = main_finetune.parse_args(["--data_path", "x", "--model", "convvit_tiny_patch16", *more])
    args.lr, args.in_chans = 1e-3, 3
    return args


# --- losses --------------------------------------------------------------------------------------


def test_mixed_batches_get_timms_soft_target_loss():
    criterion, mixup = build_classifier.build_criterion(arguments(), 10)
    assert isinstance(criterion, SoftTargetCrossEntropy)
    assert isinstance(mixup, Mixup)
    settings = (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob)
    assert settings == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.label_smoothing, mixup.num_classes) == (0.1, 10)


def test_mode_and_sides_of_mixing_reach_timm():
    flags = ("--mixup", "0", "--cutmix", "0", "--cutmix_minmax", "0.2", "0.8")
    _, mixup = build_classifier.build_criterion(arguments(*flags, "--mixup_mode", "elem"), 10)
    assert (mixup.mode, mixup.cutmix_minmax, mixup.cutmix_alpha) == ("elem", [0.2, 0.8], 1.0)


def test_activations_are_recomputed_where_the_flag_says_so():
    for flags in ((), ("--grad_checkpointing",)):
        args = arguments(*flags, "--drop_path", "0")
        fill_geometry_flags(args, None)
        trainee = build_classifier.build_finetuning(args, CPU, None, ["a", "b"])
        assert trainee.model.grad_checkpointing == bool(flags)


def test_without_mixing_labels_are_smoothed_as_timm_does():
    criterion, mixup = build_classifier.build_criterion(
        arguments("--mixup", "0", "--cutmix", "0"), 10
    )
    assert mixup is None
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    expected = LabelSmoothingCrossEntropy(0.1)(logits, labels)
    torch.testing.assert_close(criterion(logits, labels), expected)


def test_without_mixing_and_smoothing_the_loss_is_cross_entropy():
    flags = ("--mixup", "0", "--cutmix", "0", "--smoothing", "0")
    criterion, _ = build_classifier.build_criterion(arguments(*flags), 10)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    torch.testing.assert_close(criterion(logits, labels), F.cross_entropy(logits, labels))


class OneStepRun:
    """A run of one step of one batch, which it keeps the loss of."""

    def __init__(self, model, batch):
        self.model = self.ddp_model = model
        self.batch = batch
        self.loader = SimpleNamespace(steps_per_epoch=1)

    def steps(self, epoch, start):
        self.modes = {name: m.training for name, m in self.model.named_modules()}
        step = Mock(micro_batches=[self.batch], autocast=contextlib.nullcontext)
        yield step
        (self.loss,) = step.backward.call_args.args
        step.update.assert_called_once_with()

    def means(self, epoch):
        return {"train_loss": self.loss.item()}


def test_a_training_step_mixes_images_and_labels_as_timm_does():
    model, imgs, labels = nn.Flatten(), torch.rand(4, 1, 1, 6), torch.tensor([0, 1, 2, 3])
    settings = dict(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=6)
    torch.manual_seed(0), __import__("numpy").random.seed(0)
    mixed, targets = Mixup(**settings)(imgs.clone(), labels)
    expected = SoftTargetCrossEntropy()(mixed.flatten(1), targets)

    __import__("numpy").random.seed(0)
    run = OneStepRun(model, (imgs.clone(), labels, torch.arange(4)))
    trainee = Trainee(model, model, None, SoftTargetCrossEntropy(), Mixup(**settings))
    train_one_epoch(run, 0, 0, trainee)
    torch.testing.assert_close(run.loss, expected)


@pytest.mark.parametrize("kind", ["image", "video", "probe"])
def test_no_step_of_a_classifier_waits_for_a_gpu(kind):
    args = arguments(*(["--model_ema"] if kind == "image" else []))
    fill_geometry_flags(args, None)
    sizes = SIZES | INPUTS["video" if kind == "video" else "image"]
    models = {args.model: lambda **_: ConvViT(num_classes=6, drop_path_rate=0.1, **sizes)}
    build = build_classifier.build_probe if kind == "probe" else build_classifier.build_finetuning
    with mock.patch.dict(build_classifier.MODELS, models):
        trainee = build(args, CPU, None, range(6))
    with fake_gpu():
        model = to_fake_gpu(trainee.model)
        if kind == "probe":
            optimizer = LARS(model.head.parameters(), lr=1.0)
        else:
            optimizer = build_classifier.build_optimizer(args, model)
        ema = trainee.ema and to_fake_gpu(trainee.ema)
        imgs = torch.empty(4, 3, *model.geometry.img_size, dtype=torch.uint8)
        run = FakeRun(model, optimizer, [imgs, torch.empty(4).long(), torch.empty(4)])
        with run.never_waiting():
            train_one_epoch(run, 0, 0, replace(trainee, ema=ema))
    assert run.report.done == 1
    assert {t.device for state in optimizer.state.values() for t in state.values()} == {GPU}


# --- a probe -------------------------------------------------------------------------------------


def probe():
    model = convvit_tiny_patch16(img_size=32, num_classes=3)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.add_probe_norm()
    return model


def test_only_the_head_of_a_probe_is_in_training_mode():
    model = probe()
    run = OneStepRun(model, (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2)))
    train_one_epoch(run, 0, 0, Trainee(model, model.head, None, nn.CrossEntropyLoss()))
    assert {name for name, training in run.modes.items() if training} == {
        "head", "head.0", "head.1",
    }  # fmt: skip


def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass():
    model, kept = probe(), []
    features = model.num_features

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(4, 3, 32, 32)).sum()
    # What the head's own gradient needs: its input and its weight.
    assert set(kept) <= {(4, features), (3, features), (features, 3)}


# --- judging and evaluating ----------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 7])
def test_accuracies_and_loss_are_timms_and_torchs(classes):
    torch.manual_seed(classes)
    logits, labels = torch.randn(64, classes), torch.randint(classes, (64,))
    losses, top1, top5, predictions, probabilities = judge(logits, labels)
    acc1, acc5 = timm.utils.accuracy(logits, labels, topk=(1, 5))
    assert 100 * top1.double().mean().item() == pytest.approx(acc1.item(), rel=1e-6)
    assert 100 * top5.double().mean().item() == pytest.approx(acc5.item(), rel=1e-6)
    torch.testing.assert_close(losses.mean(), F.cross_entropy(logits, labels))
    assert torch.equal(predictions, logits.argmax(1))
    torch.testing.assert_close(probabilities, logits.softmax(1).max(1).values)


def write_classes(folder: Path, count: int) -> Path:
    for i in range(count):
        path = folder / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


def loader(folder: Path, batch_size: int, workers: int = 0) -> Loader:
    dataset = LabeledImages(folder, center_crop_transform((32, 32)))
    return Loader(dataset, EvalSampler(len(dataset), batch_size), workers)


def test_outputs_that_are_not_finite_are_wrong():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, nan], [nan, 1.0], [inf, 0.0], [2.0, 1.0]])
    losses, top1, top5, *_ = judge(logits, torch.zeros(4, dtype=torch.long))
    assert top1.tolist() == top5.tolist() == [False, False, False, True]
    assert losses.isfinite().tolist() == [False, False, False, True]


def test_evaluation_does_not_depend_on_batches_or_workers(tmp_path):
    write_classes(tmp_path, 17)
    model = convvit_tiny_patch16(img_size=32, num_classes=3)
    results = [
        evaluate(model, loader(tmp_path, batch, workers), CPU)
        for batch, workers in ((17, 0), (4, 0), (3, 2))
    ]
    for result in results:
        assert result.indices.tolist() == list(range(17))
        assert result.acc1 == results[0].acc1
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)
        assert torch.equal(result.predictions, results[0].predictions)


def test_evaluation_leaves_dropout_out(tmp_path):
    write_classes(tmp_path, 6)
    model = convvit_tiny_patch16(img_size=32, num_classes=3, drop_path_rate=0.9, drop_rate=0.9)
    model.train()
    first, second = (evaluate(model, loader(tmp_path, 4), CPU) for _ in range(2))
    assert torch.equal(first.losses, second.losses)


def test_images_that_cannot_be_decoded_are_left_out_wherever_they_stand(tmp_path):
    write_classes(tmp_path, 17)
    dataset = loader(tmp_path, 4).dataset
    for index in (0, 5, 16):
        Path(dataset.path(index)).write_bytes(b"no picture")
    model = convvit_tiny_patch16(img_size=32, num_classes=3)
    result = evaluate(model, loader(tmp_path, 4), CPU)
    assert result.indices.tolist() == [i for i in range(17) if i not in (0, 5, 16)]
    with pytest.raises(TrainingError, match="3 of 17 images cannot be decoded"):
        evaluate(model, loader(tmp_path, 4), CPU, max_bad_images=0.1)


def test_the_best_accuracy_survives_a_checkpoint():
    best, again = Best(), Best()
    assert best.improves(0.0)
    assert best.improves(50.0) and not best.improves(50.0) and not best.improves(49.0)
    again.load_state_dict(best.state_dict())
    assert not again.improves(50.0) and again.improves(math.nextafter(50, 51))


# --- optimizer -----------------------------------------------------------------------------------


def test_the_optimizer_is_the_recipes():
    args = arguments()
    model = convvit_tiny_patch16(img_size=32, num_classes=3)
    optimizer = build_classifier.build_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == pytest.approx([0.65**n for n in range(5, -1, -1)])  # 4 blocks
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_every_parameter_has_one_place_in_the_optimizer():
    model = convvit_tiny_patch16(img_size=32, num_classes=3)
    groups = build_classifier.build_optimizer(arguments(), model).param_groups
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
