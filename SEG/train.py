"""Train a segmentation model: `python -m SEG.train CONFIG`, or torchrun for several processes."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from mmengine.config import Config

from SEG import options
from SEG.resume import check_resumable
from SEG.runner import Runner
from SEG.survey import check_data
from util.errors import UsageError
from util.run.distributed import print_once, world_size
from util.run.parser import Parser, complete_resume, positive_int
from util.run.program import run_main
from util.run.resume import last_counts
from util.run.setup import hold_output
from util.weights.checkpoint import load_file
from util.weights.read import read_weights, weights_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m SEG.train", description="Train UperNet on a ConvMAE, by MMSegmentation."
    )
    options.add_config_args(parser)
    options.add_data_args(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--pretrained",
        metavar="FILE",
        help="checkpoint to begin from, of pretraining or classification (default: the config's); "
        "none: random weights",
    )
    group.add_argument(
        "--work-dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="checkpoints and logs (default: the config's, else output/<name of the config>)",
    )
    group.add_argument(
        "--resume",
        default="none",
        metavar="FILE",
        help="checkpoint to go on from; auto, or no value: the last in --work-dir, if any; "
        "none: begin anew",
    )
    group.add_argument(
        "--iterations",
        type=positive_int,
        metavar="N",
        help="length of the run in optimizer steps; warm-up, schedule and the intervals of "
        "validations and checkpoints keep their shares of it (default: the config's)",
    )
    group.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        choices=("auto", "bf16", "fp16", "none"),
        help="mixed precision; auto: bf16 where the GPU has it, else fp16 on CUDA, none elsewhere "
        "(default: the config's)",
    )
    group.add_argument(
        "--accum-iter",
        "--accum_iter",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches of an optimizer step; the config's iterations and intervals stay "
        "those of steps",
    )
    return parser.parse_args(complete_resume(argv))


def set_length(config: Config, iterations: int | None, kept: Container[str] = ()) -> None:
    """Give a run another length; its schedule and intervals keep their shares of it.

    Args:
        config: changed in place.
        iterations: optimizer steps; None for the config's. If the schedule of the learning rate
            then ends elsewhere than the run, a line says so.
        kept: keys of `--cfg-options`, which stay as they are.

    Raises:
        UsageError: the config counts epochs.
    """
    length = config.train_cfg.get("max_iters")
    schedules = [s for s in config.get("param_scheduler") or () if not s.get("by_epoch", True)]
    if iterations is not None:
        if length is None:
            raise UsageError("--iterations is for configs that count them (train_cfg.max_iters)")
        if "train_cfg.max_iters" in kept:
            raise UsageError("--iterations and train_cfg.max_iters say the same: give the first")
        parts = {f"param_scheduler.{i}": part for i, part in enumerate(config.param_scheduler)}
        parts = {name: part for name, part in parts.items() if part in schedules}
        parts |= {"train_cfg": config.train_cfg}
        parts |= {"default_hooks.checkpoint": config.default_hooks.checkpoint}
        for name, part in parts.items():
            for key in {"begin", "end", "max_iters", "val_interval", "interval"} & part.keys():
                if part[key] and f"{name}.{key}" not in kept:
                    part[key] = max(1, round(part[key] * iterations / length))
            if part.get("begin") and "end" in part:
                part["begin"] = min(part["begin"], part["end"] - 1)
        length = iterations
    end = max((schedule.get("end", length) for schedule in schedules), default=length)
    if end != length:
        print_once(
            f"note: the schedule of the learning rate ends after {end:,} iterations, the run after "
            f"{length:,}: --iterations {length} sets both"
        )


def accumulate(config: Config, count: int) -> None:
    """Take each optimizer step over `count` micro-batches.

    mmengine counts micro-batches as iterations, so the length and all intervals are multiplied;
    the schedules of the learning rate are stepped with the optimizer instead, and stay.

    Raises:
        UsageError: the config accumulates already, or counts epochs.
    """
    if count == 1:
        return
    if "max_iters" not in config.train_cfg:
        raise UsageError(
            "--accum-iter is for configs that count iterations (train_cfg.max_iters), not epochs: "
            "give optim_wrapper.accumulative_counts as --cfg-options"
        )
    wrapper = config.optim_wrapper
    if wrapper.get("accumulative_counts", 1) != 1:
        raise UsageError(
            "--accum-iter and optim_wrapper.accumulative_counts say the same: give the first alone"
        )
    wrapper.accumulative_counts = count
    for name in {"max_iters", "val_interval"} & config.train_cfg.keys():
        config.train_cfg[name] *= count
    config.default_hooks.param_scheduler = dict(type="StepSchedulerHook")
    for hook in (*config.default_hooks.values(), *config.get("custom_hooks", [])):
        if "interval" in hook:
            hook["interval"] *= count


def begin_from(config: Config, pretrained: str | None, resume: str) -> int:
    """Set the weights that a run begins with.

    Args:
        config: changed in place.
        pretrained: `--pretrained`.
        resume: `--resume`: "none", "auto" or a file, see `last_counts`.

    Returns:
        The iterations that are done.

    Raises:
        UsageError: a checkpoint that is not there, or of another run.
    """
    last = None if resume == "none" else options.last_checkpoint(config.work_dir)
    if resume not in ("none", "auto") and not last_counts(resume, config.work_dir, bool(last)):
        last = Path(resume)
    backbone = config.model.backbone
    if last:
        content = load_file(last)
        check_resumable(last, content, config)
        if (line := options.use_stats(config, weights_of(content, last))).startswith("note"):
            raise UsageError(f"{last} is of another run: {line.removeprefix('note: ')}")
        config.load_from, config.resume, backbone.pretrained = str(last), True, None
        print_once(f"going on from {last}")
        return content["meta"]["iter"]
    if resume == "auto":
        print_once(f"no checkpoint in {config.work_dir} yet: from the beginning")
    if pretrained is not None:
        backbone.pretrained = None if pretrained == "none" else pretrained
    if backbone.get("pretrained") and not Path(backbone.pretrained).is_file():
        raise UsageError(
            f"the checkpoint to begin from, {backbone.pretrained}, does not exist: give another as "
            f"--pretrained FILE, or --pretrained none for random weights"
        )
    if backbone.get("pretrained"):
        options.use_stats(config, read_weights(backbone.pretrained))
    return 0


def check_batch(config: Config) -> None:
    """Say so if the batch is not the one that the config's learning rate is for."""
    batch = config.train_dataloader.batch_size * world_size()
    batch *= config.optim_wrapper.get("accumulative_counts", 1)
    meant = config.get("auto_scale_lr", {}).get("base_batch_size", batch)
    if batch != meant:
        print_once(
            f"note: {batch} images a step, the config's learning rate is for {meant}: set "
            f"train_dataloader.batch_size (per GPU), --accum-iter or optim_wrapper.optimizer.lr"
        )


def main(args: argparse.Namespace) -> None:
    """Read the config, then let mmengine train."""
    config = options.read_config(args)
    options.use_data(config, args)
    if args.work_dir is not None:
        config.work_dir = str(args.work_dir)
    set_length(config, args.iterations, args.cfg_options or {})
    accumulate(config, args.accum_iter)
    options.start(config, args.amp)
    hold_output(Path(config.work_dir), "--work-dir")
    first = begin_from(config, args.pretrained, args.resume)
    check_batch(config)
    with options.clear_errors():
        check_data({"training": config.train_dataloader, "validation": config.val_dataloader})
        runner = Runner.from_cfg(config)
    # runner.iter would build the loop, which may be what fails.
    with options.clear_errors(begun=lambda: getattr(runner._train_loop, "iter", 0) > first):
        runner.train()
    print_once(f"done: checkpoints and logs in {config.work_dir}")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
