import json

import pytest
import torch
from torch import nn

from benchmarks import inference_step, steps
from benchmarks.steps import Form, ready_step, settle_options

SMALL = ["--model", "tiny", "--input_size", "32", "--batch_size", "2", "--rounds", "1"]


@pytest.fixture
def args():
    args = inference_step.get_args_parser().parse_args([*SMALL, "--device", "cpu"])
    settle_options(args, inference_step.BENCHMARK.bases)
    return args


@pytest.mark.parametrize("form", inference_step.BENCHMARK.bases)
def test_a_forward_pass_keeps_no_gradient_and_drops_no_path(form, args, monkeypatch):
    seen = []

    def logits(form: str, model: nn.Module, args: object, imgs: torch.Tensor) -> torch.Tensor:
        seen.append((model.training, model(imgs)))
        return seen[-1][1]

    benchmark = inference_step.BENCHMARK
    benchmark = type(benchmark)(**{**vars(benchmark), "loss": logits})
    ready_step(benchmark, Form(form, form, False, None), args)()
    ((training, outputs),) = seen
    assert not training and outputs.shape == (2, 1000) and outputs.is_inference()


def test_the_arithmetic_is_that_of_timms_own_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "measure_memory_afresh", lambda *_: None)  # two processes
    file = tmp_path / "results.json"
    inference_step.main([*SMALL, "--forms", "tokens", "vit", "--json", str(file)])
    forms = json.loads(file.read_text())["forms"]
    assert min(forms["tokens"]["seconds"] + forms["vit"]["seconds"]) > 0
    # 5 tokens, 12 blocks of width 192: projections 12 * 192**2 multiply-adds each, attention
    # 2 * 5 * 192; embedding of 4 patches, head of 1000 classes.
    macs = 12 * 5 * (12 * 192**2 + 2 * 5 * 192) + 4 * 192 * 768 + 192 * 1000
    assert forms["vit"]["flops_per_image"] == 2 * macs
    assert "| tokens / vit" in capsys.readouterr().out


def test_a_size_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit) as refusal:
        inference_step.main([*SMALL, "--input_size", "40"])
    assert refusal.value.code == 2
    complaints = capsys.readouterr().err
    assert "not divisible by the patch" in complaints and len(complaints.splitlines()) == 1
