"""Test a segmentation model: `python -m SEG.test CONFIG CHECKPOINT` prints its mIoU."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.model import is_model_wrapper

from SEG import options
from SEG.runner import Runner
from SEG.survey import check_data
from util.errors import UsageError
from util.run.args import check_writable
from util.run.distributed import print_once
from util.run.parser import Parser
from util.run.program import run_main
from util.weights.load import load_weights
from util.weights.read import Weights


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m SEG.test", description="Test a segmentation model on a validation set."
    )
    options.add_config_args(parser)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="of SEG.train, or the published one"
    )
    options.add_data_args(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--tta", action="store_true", help="average over scales and mirror images: slow, better"
    )
    group.add_argument(
        "--show-dir", type=Path, metavar="DIR", help="write image, truth and prediction there"
    )
    group.add_argument(
        "--work-dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="logs (default: the config's, else output/<name of the config>)",
    )
    return parser.parse_args(argv)


def test(
    config: Config, weights: Weights, *, tta: bool = False, show_dir: Path | None = None
) -> dict[str, float]:
    """Test a model on the config's test data.

    Args:
        config: prepared by `options.start`; changed in place.
        weights: of a segmentor.
        tta: test-time augmentation, the config's `tta_pipeline` and `tta_model`.
        show_dir: where pictures of the results go; None for no pictures.

    Returns:
        mIoU, mAcc and aAcc, in percent.

    Raises:
        UsageError: weights or data that do not fit the config.
    """
    config.load_from, config.resume = None, False
    config.model.backbone.pretrained = None
    dataset = config.test_dataloader.dataset
    if tta:
        follow_scale(config.tta_pipeline, dataset.pipeline)
        dataset.pipeline = config.tta_pipeline
        config.model = dict(**config.tta_model, module=config.model)
    if show_dir:
        root = Path(dataset.data_root or ".") / dataset.data_prefix.img_path
        hook = dict(type="OverlayHook", folder=str(show_dir), root=str(root))
        config.custom_hooks = [*config.get("custom_hooks", []), hook]
    with options.clear_errors():
        check_data({"testing": config.test_dataloader})
        runner = Runner.from_cfg(config)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        print_once(load_weights(model.module if tta else model, weights))
        return runner.test()


def follow_scale(tta_pipeline: list[dict], test_pipeline: list[dict]) -> None:
    """Make the factors of augmented testing relative to the scale of plain testing.

    Args:
        tta_pipeline: its `Resize` steps have a `scale_factor`; changed in place.
        test_pipeline: with a `Resize` to a `scale` (longest and shortest side at most; one number
            for both) or by a `scale_factor`.

    Raises:
        UsageError: no `TestTimeAug` in the first.
    """
    plain = next((step for step in test_pipeline if step["type"] == "Resize"), None)
    augmented = next((step for step in tta_pipeline if step["type"] == "TestTimeAug"), None)
    if augmented is None:
        raise UsageError("--tta: the config's tta_pipeline has no TestTimeAug")
    for step in (step for choices in augmented["transforms"] for step in choices):
        if plain is None or step["type"] != "Resize" or "scale_factor" not in step:
            continue
        if plain.get("scale") is not None:
            factor, scale = step.pop("scale_factor"), plain["scale"]
            sides = (scale, scale) if isinstance(scale, int) else scale
            step["scale"] = tuple(round(side * factor) for side in sides)
        else:
            step["scale_factor"] *= plain["scale_factor"]


def main(args: argparse.Namespace) -> dict[str, float]:
    """Read config and checkpoint, test, print; returns the metrics, in percent."""
    config = options.read_config(args)
    options.use_data(config, args)
    if args.work_dir is not None:
        config.work_dir = str(args.work_dir)
    if args.tta and not ("tta_pipeline" in config and "tta_model" in config):
        raise UsageError(f"--tta: the config {args.config} has no tta_pipeline and tta_model")
    weights, meta = options.read_segmentor(args.checkpoint)
    options.use_trained_classes(config, args, meta)
    options.use_stats(config, weights)
    options.start(config)
    check_writable(Path(config.work_dir), "--work-dir")
    if args.show_dir:
        check_writable(args.show_dir, "--show-dir")
    metrics = test(config, weights, tta=args.tta, show_dir=args.show_dir)
    print_once("  ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    return metrics


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
