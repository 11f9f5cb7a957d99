import copy

import pytest
import torch
from torch import nn

from util.errors import TrainingError, UsageError
from util.run.optim_step import MAX_SKIPPED_IN_A_ROW, OptimStep, amp_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EVERY_DEVICE = [CPU, pytest.param(CUDA, marks=needs_cuda)]


class Case:
    """A linear map on its way to fit random numbers, and what its steps see."""

    def __init__(self, device=CPU, dtype=None, clip_grad=None, **optimizer):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
        build = optimizer.pop("build", torch.optim.AdamW)
        settings = {"lr": 0.1, "fused": True, **optimizer}
        self.optimizer = build(self.model.parameters(), **settings)
        self.step = OptimStep(self.model, self.optimizer, device, dtype, clip_grad)
        self.inputs = torch.randn(8, 3).to(device)

    def loss(self, inputs):
        return self.model(inputs).float().square().mean()

    def take(self, forward=None, batches=None):
        """One step over the micro-batches, by default all inputs as one."""
        batches = [self.inputs] if batches is None else batches
        self.step.begin(batches, len(batches))
        for inputs in self.step.micro_batches:
            with self.step.autocast():
                loss = (forward or self.loss)(inputs)
            self.step.backward(loss)
        return self.step.update()

    def take_bad(self):
        return self.take(lambda inputs: self.loss(inputs) * float("nan"))

    def state(self):
        """A copy of all that a step may change: weights, moments, step counters."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()["state"]))

    def gradient(self):
        """The gradient of the loss at the current weights, as one vector."""
        gradient = torch.autograd.grad(self.loss(self.inputs), self.model.parameters())
        return nn.utils.parameters_to_vector(gradient)

    def weights(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()


def assert_same_bits(state, expected):
    torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


# ---- Steps ---------------------------------------------------------------------------------------


def test_accumulation_equals_one_batch():
    whole, parts = Case(), Case()
    for _ in range(3):
        one = whole.take()
        many = parts.take(batches=parts.inputs.split(2))
        torch.testing.assert_close(many, one)
    torch.testing.assert_close(parts.state(), whole.state())


def test_a_step_follows_the_gradient():
    case = Case(build=torch.optim.SGD, lr=0.5)
    before, gradient, loss = case.weights(), case.gradient(), case.loss(case.inputs)
    result = case.take()
    torch.testing.assert_close(case.weights(), before - 0.5 * gradient)
    torch.testing.assert_close(result[:3], (loss.detach(), gradient.norm(), torch.tensor(1.0)))


def test_parts_of_the_loss_are_means_over_the_micro_batches_of_one_step():
    case = Case(build=torch.optim.SGD, lr=0.0)
    for scale in (5.0, 1.0):
        case.step.begin(case.inputs.split(2), 4)
        for inputs in case.step.micro_batches:
            loss = case.loss(inputs)
            case.step.backward(loss, {"third": scale * loss.detach() / 3})
        result = case.step.update()
    torch.testing.assert_close(result.parts, {"third": result.loss / 3})


def test_gradients_of_the_step_before_are_forgotten():
    case = Case(build=torch.optim.SGD, lr=0.0)
    first, second = case.take(), case.take()
    assert first == second


def test_clipping_limits_the_norm_and_reports_the_one_before():
    case = Case(build=torch.optim.SGD, lr=1.0, clip_grad=0.01)
    before, gradient = case.weights(), case.gradient()
    result = case.take()
    taken = before - case.weights()
    assert gradient.norm() > 0.1
    torch.testing.assert_close(result.grad_norm, gradient.norm())
    torch.testing.assert_close(taken, gradient * 0.01 / gradient.norm(), rtol=1e-3, atol=1e-6)


def test_clipping_leaves_a_small_gradient_alone():
    plain, clipped = Case(), Case(clip_grad=1e3)
    for _ in range(3):
        plain.take()
        clipped.take()
    assert_same_bits(clipped.state(), plain.state())


# ---- Steps that are not finite -------------------------------------------------------------------


def nan_loss(case):
    return lambda inputs: case.loss(inputs) * float("nan")


def infinite_loss_with_a_finite_gradient(case):
    return lambda inputs: case.loss(inputs) + float("inf")


def infinite_gradient_of_one_weight(case):
    def forward(inputs):
        bias = case.model[1].bias.clone()
        bias.register_hook(lambda _: torch.tensor([0, float("inf")]))
        return case.loss(inputs) + 0 * bias.sum()

    return forward


BAD = [nan_loss, infinite_loss_with_a_finite_gradient, infinite_gradient_of_one_weight]


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_a_step_that_is_not_finite_changes_no_bit(bad, clip_grad):
    case, undisturbed = Case(clip_grad=clip_grad), Case(clip_grad=clip_grad)
    for each in (case, undisturbed):
        each.take()
    before = case.state()
    result = case.take(bad(case))

    assert result.taken == 0
    assert not (torch.isfinite(result.loss) and torch.isfinite(result.grad_norm))
    assert case.step.skipped == case.step.skipped_in_a_row == 1
    assert_same_bits(case.state(), before)
    for each in (case, undisturbed):
        each.take()
    assert_same_bits(case.state(), undisturbed.state())


def test_a_first_step_that_is_not_finite_leaves_no_trace():
    case, undisturbed = Case(), Case()
    case.take_bad()
    for each in (case, undisturbed):
        each.take()
    assert_same_bits(case.state(), undisturbed.state())


def test_one_bad_micro_batch_skips_the_whole_step():
    case = Case()
    before = case.weights()
    batches = [case.inputs, case.inputs * float("nan"), case.inputs]
    assert case.take(batches=batches).taken == 0
    assert torch.equal(case.weights(), before)


def test_a_good_step_resets_the_count_in_a_row():
    case = Case()
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        case.take_bad()
    case.take()
    assert (case.step.skipped, case.step.skipped_in_a_row) == (MAX_SKIPPED_IN_A_ROW - 1, 0)
    case.take_bad()
    case.step.check()


def test_after_ten_bad_steps_in_a_row_even_good_ones_are_skipped():
    case = Case()
    case.take()
    before = case.state()
    for _ in range(10):
        case.step.check()
        case.take_bad()
    results = [case.take(), case.take()]
    assert [(result.taken, torch.isfinite(result.loss)) for result in results] == [(0, True)] * 2
    assert_same_bits(case.state(), before)
    with pytest.raises(
        TrainingError, match=r"10 steps in a row.*checkpoint is intact.*--clip_grad.*--blr"
    ):
        case.step.check()


# ---- State ---------------------------------------------------------------------------------------


def test_state_goes_through_a_checkpoint():
    case, other = Case(), Case()
    case.take_bad()
    case.take()
    case.take_bad()
    case.take_bad()
    other.step.load_state_dict(case.step.state_dict())
    assert (other.step.skipped, other.step.skipped_in_a_row) == (3, 2)
    assert other.step.state_dict() == case.step.state_dict()


def test_the_scale_goes_through_a_checkpoint():
    case, other, full = Case(dtype=torch.float16), Case(dtype=torch.float16), Case()
    case.take_bad()
    state = case.step.state_dict()
    other.step.load_state_dict(state)
    assert other.step.scaler.get_scale() == case.step.scaler.get_scale() == 2.0**15
    full.step.load_state_dict(state)  # resumed with another --amp
    assert full.take().taken == 1


# ---- Precision -----------------------------------------------------------------------------------


def seen_dtypes(case):
    """The types inside `forward`, and of its loss, during a step."""
    seen = []

    def forward(inputs):
        output = case.model(inputs)
        seen.append(output.dtype)
        return output.float().square().mean()

    result = case.take(forward)
    return [*seen, result.loss.dtype, case.model[0].weight.dtype, case.model[0].weight.grad.dtype]


@pytest.mark.parametrize("device", EVERY_DEVICE, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_runs_in_the_autocast_type_and_weights_stay_in_float32(dtype, device):
    assert seen_dtypes(Case(device, dtype)) == [dtype] + [torch.float32] * 3


def test_forward_runs_in_float32_without_autocast():
    assert seen_dtypes(Case()) == [torch.float32] * 4


@pytest.mark.parametrize("device", EVERY_DEVICE, ids=str)
def test_half_precision_scales_the_loss_and_unscales_the_gradient(device):
    full, half = Case(device), Case(device, torch.float16)
    # Too small for float16 unless scaled.
    results = [case.take(lambda inputs, c=case: c.loss(inputs) * 1e-7) for case in (full, half)]
    assert half.step.scaler.get_scale() == 2.0**16
    assert results[1].taken == 1
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", EVERY_DEVICE, ids=str)
def test_half_precision_overflow_skips_the_step_and_halves_the_scale(device):
    case = Case(device, torch.float16)
    case.take()
    before = case.state()
    result = case.take(lambda inputs: case.loss(inputs) * 1e36)
    assert result.taken == 0 and torch.isfinite(result.loss)
    assert case.step.scaler.get_scale() == 2.0**15
    assert_same_bits(case.state(), before)
    assert case.take().taken == 1


@needs_cuda
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(dtype, clip_grad):
    case = Case(CUDA, dtype, clip_grad)
    case.take()  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.take()
        case.take_bad()
        case.take(batches=case.inputs.split(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_is_not_fused_is_refused(build):
    with pytest.raises(ValueError, match=f"{build.__name__} must be fused"):
        Case(build=build, fused=False)


@pytest.mark.parametrize(
    ("amp", "device", "gpu_has_bf16", "expected"),
    [
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float16),
        ("auto", CPU, True, None),
        ("auto", torch.device("mps"), True, None),
        ("bf16", CUDA, False, torch.bfloat16),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", CUDA, True, torch.float16),
        ("none", CUDA, True, None),
        ("none", CPU, True, None),
    ],
)
def test_precision_fits_the_device(amp, device, gpu_has_bf16, expected, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return gpu_has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert amp_dtype(amp, device) is expected


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_without_a_gpu_is_refused_with_what_would_do(device):
    with pytest.raises(UsageError, match=f"fp16 needs a CUDA GPU, not {device}; use bf16 or none"):
        amp_dtype("fp16", torch.device(device))
