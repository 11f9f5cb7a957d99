import importlib
import sys

import numpy as np
import pytest

from benchmarks import det_memory

SMALL = ["--config-file", "DET/configs/convmae_tiny_mask_rcnn_FPN_demo.py", "--image_size", "64"]


@pytest.fixture
def det_step():
    return pytest.importorskip(
        "benchmarks.det_step", reason="needs Detectron2", exc_type=ImportError
    )


def test_help_and_a_refusal_need_no_detectron2(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    program = importlib.reload(det_memory)
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert "--batch_sizes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        program.main(["--device", "cpu"])
    assert "Detectron2 is not installed" in capsys.readouterr().err


def completed(*argv):
    args = det_memory.get_args_parser().parse_args([*SMALL, *argv])
    det_memory.settle_options(args)
    return args


def test_a_row_says_memory_and_time_of_real_steps(det_step):
    result = det_step.measure(completed("--steps", "1", "--device", "cpu"), 2, True)
    assert result["mib"] > 100 and 0 < result["seconds"] < 60


def test_random_objects_lie_in_the_image_with_a_mask_that_fills_the_box(det_step):
    cfg = det_step.load(completed(), checkpointing=False)
    for sample in det_step.random_batch(cfg, 2, np.random.default_rng(0)):
        boxes, masks = sample["instances"].gt_boxes, sample["instances"].gt_masks
        assert sample["image"].shape == (3, 64, 64) and len(boxes) == det_step.OBJECTS
        assert boxes.tensor.min() >= 0 and boxes.tensor.max() <= 64
        np.testing.assert_allclose(masks.area(), boxes.area(), rtol=1e-4)


def test_checkpointing_is_switched_in_the_recipe(det_step):
    for switch in (False, True):
        cfg = det_step.load(completed(), switch)
        assert cfg.model.backbone.bottom_up.use_act_checkpoint is switch


def test_the_table_goes_on_with_checkpointing_where_memory_ends_without(monkeypatch, capsys):
    def measured(argv, batch_size, checkpointing):
        fits = batch_size <= (4 if checkpointing else 1)
        return {"mib": 1024 * batch_size, "seconds": 0.5} if fits else "out of memory"

    monkeypatch.setattr(det_memory, "measure_afresh", measured)
    det_memory.report(completed("--batch_sizes", "4", "1", "2"), SMALL)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == [
        ["1", "no", "1.0", "0.5"],
        ["2", "no", "out of memory", ""],
        ["1", "yes", "1.0", "0.5"],
        ["2", "yes", "2.0", "0.5"],
        ["4", "yes", "4.0", "0.5"],
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--limit_gb", "32", "--device", "cpu"], "limits the memory of a GPU"),
        (["--config-file", "none.py"], "there is no configuration none.py"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(argv, message, capsys, det_step):
    with pytest.raises(SystemExit) as exit_:
        det_memory.main([*SMALL, *argv])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
