import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks.pretrain_step import main
from benchmarks.reference import PlainMaskedAutoencoder

ROOT = Path(__file__).parents[2]
FORMS = ["visible", "dense", "mae"]


def run_script(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.pretrain_step", "--model", "tiny", *options]
    # Several threads on a busy machine wait for each other longer than they compute.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    """What the script prints, and what it writes."""
    file = tmp_path_factory.mktemp("pretrain_step") / "results.json"
    sizes = ["--input_size", "64", "--batch_size", "8", "--rounds", "2"]
    forms = ["--forms", *FORMS, "visible:bf16"]
    done = run_script(*sizes, *forms, "--device", "cpu", "--json", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_every_form_is_timed_once_a_round(run):
    forms = run[1]["forms"]
    assert list(forms) == [*FORMS, "visible:bf16"]
    for result in forms.values():
        assert len(result["seconds"]) == 2
        assert min(result["seconds"]) > 0


def test_computing_what_is_visible_takes_less_arithmetic_than_all(run):
    forms = run[1]["forms"]
    assert 0 < forms["visible"]["flops_per_image"] < forms["dense"]["flops_per_image"]
    assert forms["mae"]["flops_per_image"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_over_the_idle_model(run):
    forms = run[1]["forms"]
    assert all(0 < forms[form]["peak_memory"] < 2**30 for form in FORMS)


@pytest.mark.parametrize("other", ["dense", "mae"])
def test_ratios_follow_from_the_results_of_the_same_round(run, other):
    visible, reference = run[1]["forms"]["visible"], run[1]["forms"][other]
    ratio = run[1]["ratios"][f"visible / {other}"]
    pairs = zip(visible["seconds"], reference["seconds"], strict=True)
    assert ratio["seconds"] == pytest.approx([a / b for a, b in pairs])
    assert ratio["flops"] == visible["flops_per_image"] / reference["flops_per_image"]


def test_the_report_says_where_and_how_it_was_measured(run):
    printed, written = run
    for name in ("hardware", "precision", "torch", "date", "command"):
        assert f"{name}: {written['environment'][name]}\n" in printed


def test_a_form_can_have_a_type_of_its_own(run):
    written = run[1]
    assert written["environment"]["precision"] == (
        "visible float32, dense float32, mae float32, visible:bf16 bfloat16"
    )
    visible, bf16 = (written["forms"][form] for form in ("visible", "visible:bf16"))
    assert visible["flops_per_image"] == bf16["flops_per_image"]


def test_the_printed_table_is_aligned_and_holds_the_medians(run):
    printed, written = run
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    bars = [[at for at, char in enumerate(line) if char == "|"] for line in lines]
    assert all(b == bars[0] for b in bars)
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines}
    for form in FORMS:
        seconds = median(written["forms"][form]["seconds"])
        assert cells[form].startswith(f"{seconds:.3g} (")
    assert {"visible / dense", "visible / mae"} <= set(cells)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--input_size", "100"], "not divisible by the patch"),
        (["--mask_ratio", "0.999"], "at least one must stay"),
        (["--mask_ratio", "1"], "must lie above 0 and below 1"),
        (["--rounds", "0"], "must be at least 1"),
        (["--device", "tpu"], "tpu"),
        (["--forms", "sparse"], "invalid choice: 'sparse'"),
        (["--forms", "dense:fp17"], "'fp17' must be eager, auto, none, bf16, fp16"),
        (["--json", "no/such/folder/results.json"], "there is no folder"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA GPU is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_refused_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--model", "tiny", *options])
    assert refusal.value.code == 2
    complaints = capsys.readouterr().err
    assert complaint in complaints
    assert len(complaints.splitlines()) == 1


@pytest.fixture
def plain_mae() -> PlainMaskedAutoencoder:
    torch.manual_seed(0)
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    return PlainMaskedAutoencoder(
        img_size=64, embed_dim=48, depth=2, num_heads=3, norm_pix_loss=True, **decoder
    )


def pixels(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[N, 16]` of patches as one of pixels `[N, 1, 64, 64]`."""
    return torch.nn.functional.interpolate(mask.view(-1, 1, 4, 4), scale_factor=16)


def test_plain_mae_predicts_every_patch_and_masks_the_share_asked_for(plain_mae):
    loss, pred, mask = plain_mae(torch.randn(2, 3, 64, 64), mask_ratio=0.75)
    assert loss.shape == ()
    assert pred.shape == (2, 16, 16 * 16 * 3)
    assert mask.shape == (2, 16)
    assert mask.sum(dim=1).tolist() == [12, 12]


def test_plain_mae_keeps_the_patches_of_the_smallest_noise(plain_mae):
    noise = torch.rand(2, 16)
    _, _, mask = plain_mae(torch.randn(2, 3, 64, 64), noise=noise)
    kept = noise.argsort(dim=1)[:, :4]
    assert mask.gather(1, kept).sum() == 0


def test_plain_mae_is_as_large_as_mae_base_by_default():
    # The published MAE-B: 111.9 million parameters, less the 197 rows of its two fixed tables.
    parameters = sum(p.numel() for p in PlainMaskedAutoencoder().parameters())
    assert parameters == 111_907_840 - 197 * (768 + 512)


def test_plain_mae_does_not_see_masked_pixels(plain_mae):
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    _, pred, mask = plain_mae(imgs, noise=noise)
    changed = imgs + pixels(mask) * torch.randn_like(imgs)
    assert torch.equal(plain_mae(changed, noise=noise)[1], pred)


def test_plain_mae_sees_visible_pixels(plain_mae):
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    _, pred, mask = plain_mae(imgs, noise=noise)
    changed = imgs + (1 - pixels(mask)) * torch.randn_like(imgs)
    assert not torch.allclose(plain_mae(changed, noise=noise)[1], pred)


def test_plain_mae_learns_a_batch(plain_mae):
    imgs, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 16)
    optimizer = torch.optim.AdamW(plain_mae.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss, _, _ = plain_mae(imgs, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
