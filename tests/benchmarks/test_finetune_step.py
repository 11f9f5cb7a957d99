import json

import pytest
import torch

from benchmarks.finetune_step import main
from benchmarks.reference import GridConvViT
from models_convvit import convvit_tiny_patch16


def test_channels_last_is_the_published_form_forward_and_backward():
    torch.manual_seed(0)
    model, imgs = convvit_tiny_patch16(img_size=64, num_classes=10), torch.randn(2, 3, 64, 64)
    results = []
    for kind in (type(model), GridConvViT):
        model.__class__ = kind
        model.zero_grad(set_to_none=True)
        logits = model(imgs)
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (ours, our_grads), (published, grads) = results
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_both_forms_are_measured_with_the_same_arithmetic(tmp_path, capsys):
    file = tmp_path / "results.json"
    sizes = ["--model", "tiny", "--input_size", "32", "--batch_size", "2", "--rounds", "1"]
    main([*sizes, "--device", "cpu", "--json", str(file)])
    results = json.loads(file.read_text())
    forms = results["forms"]
    assert forms["tokens"]["flops_per_image"] == forms["grid"]["flops_per_image"] > 0
    assert results["ratios"]["tokens / grid"]["seconds"] == pytest.approx(
        [forms["tokens"]["seconds"][0] / forms["grid"]["seconds"][0]]
    )
    assert "| tokens / grid" in capsys.readouterr().out
