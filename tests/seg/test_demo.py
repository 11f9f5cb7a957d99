"""The demo of segmentation, shortened."""

import re

import torch

from main_pretrain import DEMO
from models_convmae import MODELS
from tests.checks import assert_ok
from tests.runs import code_of


def shortened(folder, pretrained):
    from SEG import demo
    from util import demo_scenes

    demo_scenes.COUNT.update(training=8, validation=2)
    demo.LABELLED = 6
    demo.main(
        demo.parse_args(["--pretrained", pretrained, "--output_dir", folder, "--iterations", "2"])
    )
    raise SystemExit


def test_the_demo_shortened_prints_what_it_compares(programs, tmp_path):
    pretrained = tmp_path / "pretrained.pth"
    sizes = dict(patch_size=DEMO["patch_size"], img_size=DEMO["input_size"][0], in_chans=1)
    model = MODELS[DEMO["model"]](**sizes)
    args = {name: DEMO[name] for name in ("model", "input_size", "in_chans")}
    torch.save({"model": model.state_dict(), "args": args}, pretrained)
    before = code_of(shortened, folder=str(tmp_path), pretrained=str(pretrained))
    result = programs.launcher.run(program="SEG.demo", before=before, timeout=240)
    assert_ok(result)
    (line,) = re.findall(r"mIoU on held-out scenes: (\S+) from the pretrained .*", result.out)
    assert 0 < float(line) < 1
    assert (tmp_path / "seg" / "overlays.png").is_file()
    assert len(list((tmp_path / "seg" / "random" / "overlays").iterdir())) == 2
