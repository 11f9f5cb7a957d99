"""The demo of segmentation, shortened."""

import re

from main_pretrain import DEMO
from tests.checks import assert_ok
from tests.runs import code_of
from tests.seg.small import save_pretrained


def shortened(folder, pretrained):
    """Five scenes to validate on, which have all classes."""
    from dataclasses import replace

    from SEG import demo
    from util.demo import scenes as demo_scenes

    demo_scenes.COUNT.update(training=8, validation=10)
    first, every = list(demo_scenes.scenes("validation")), demo_scenes.scenes
    some = [replace(first[i], name=f"{n:04d}") for n, i in enumerate((0, 1, 3, 6, 9))]
    demo_scenes.COUNT.update(validation=len(some))
    demo_scenes.scenes = lambda split: some if split == "validation" else every(split)
    demo.LABELLED = 6
    demo.main(
        demo.parse_args(["--pretrained", pretrained, "--output_dir", folder, "--iterations", "8"])
    )
    raise SystemExit


def test_the_demo_shortened_prints_what_it_compares(programs, tmp_path):
    (side,), patch_size = DEMO["input_size"], DEMO["patch_size"]
    pretrained = save_pretrained(tmp_path / "pretrained.pth", side, patch_size=patch_size)
    before = code_of(shortened, folder=str(tmp_path), pretrained=str(pretrained))
    result = programs.launcher.run(program="SEG.demo", before=before)
    assert_ok(result)
    (line,) = re.findall(r"mIoU on held-out scenes: (\S+) from the pretrained .*", result.out)
    assert 0 < float(line) < 1
    assert (tmp_path / "seg" / "overlays.png").is_file()
    assert len(list((tmp_path / "seg" / "random" / "overlays").iterdir())) == 5
