"""The paper's claims on real photographs, small: `python -m benchmarks.proof --help`.

Pretrains each arm (the plain MAE, ConvMAE, ConvMAE without one of its parts) for several seeds
with the engine of `main_pretrain.py`, measures the encoders, and writes a page. What is done stays
done: after a kill the same command goes on within the epoch's checkpoint.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from benchmarks.measuring import environment
from benchmarks.proof.arms import ARMS, TEACHER
from benchmarks.proof.book import Book
from benchmarks.proof.data import prepare, write_cifar10
from benchmarks.proof.jobs import Job, all_jobs, finetunings, flops_of
from benchmarks.proof.page import duration, headline, write_page
from benchmarks.proof.workers import run_beside, run_here
from util.errors import UsageError
from util.layers.architecture import SIZES, Architecture
from util.run.distributed import init_processes, print_once, world_size
from util.run.parser import (
    ChoiceOf,
    Parser,
    device_name,
    non_negative_int,
    positive_float,
    positive_int,
)
from util.run.program import run_main
from util.run.setup import hold_output

# Blocks of a size that differ from `SIZES`: the paper's two in each convolution stage.
DEPTHS = {"tiny": [2, 2, 4]}
# Of two arms that differ less in computation one is enough.
SAME_COST = 0.05


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m benchmarks.proof",
        description="Replay the paper's claims on small pictures: pretrain ConvMAE, a plain MAE "
        "and ConvMAE without its parts, measure their encoders, write a page.",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data_path", type=Path, help="train/ and val/, a folder a class in each")
    add(
        "--cifar10",
        type=Path,
        metavar="FOLDER",
        help="torchvision's CIFAR-10, fetched if it is not there, from which a --data_path that "
        "does not exist is made",
    )
    add("--images", type=positive_int, metavar="N", help="training pictures (default: all)")
    add("--test_images", type=positive_int, metavar="N", help="to judge by (default: all)")
    add(
        "--tune",
        action="store_true",
        help="judge by a tenth of the training pictures, held out: to choose settings",
    )
    add("--num_workers", type=non_negative_int, metavar="N", help="as in main_pretrain.py")

    add = parser.add_argument_group("experiment").add_argument
    arm = ChoiceOf(ARMS)
    add("--arms", nargs="+", type=arm, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each arm")
    add("--epochs", type=positive_int, default=50, metavar="N", help="of pretraining")
    add("--model", type=ChoiceOf(SIZES), default="tiny", metavar="SIZE", help="of all arms")
    add(
        "--depth",
        type=positive_int,
        nargs=3,
        metavar="N",
        help="blocks of the three stages; a plain ViT has those of the last and one more (default: "
        "the size's, for tiny 2 2 4)",
    )
    add("--input_size", type=positive_int, default=32, metavar="PIXELS", help="side of a picture")
    add(
        "--patch_size",
        type=positive_int,
        nargs=3,
        default=[2, 2, 1],
        metavar="STRIDE",
        help="strides of the three stages",
    )
    add("--batch_size", type=positive_int, default=128, metavar="N", help="of any training")
    add("--lr", type=positive_float, default=2e-3, metavar="LR", help="peak, of pretraining")
    add("--finetune_lr", type=positive_float, default=1e-3, metavar="LR", help="peak, fine-tuning")
    add(
        "--shares",
        type=positive_float,
        nargs="*",
        default=[1.0, 10.0, 100.0],
        metavar="PERCENT",
        help="of the labels to fine-tune with; none: no fine-tuning",
    )
    add(
        "--finetune_epochs",
        type=positive_int,
        nargs="*",
        default=[100, 50, 20],
        metavar="N",
        help="of fine-tuning, one number for each of --shares",
    )
    add("--curve_points", type=positive_int, default=4, metavar="N", help="of accuracy over epochs")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=Path, required=True, help="runs, results; the same command goes on")
    add("--page", type=Path, help="Markdown file to write (default: PROOF.md in --output_dir)")
    add(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="trainings and measurements beside each other, each in a process; with several "
        "--num_workers is 0 if it is not given",
    )
    add(
        "--publish",
        action="store_true",
        help="train nothing: write the page of what results.json and reconstruction.png in "
        "--output_dir hold, also of an unfinished run, also on another machine",
    )
    add("--device", type=device_name, default="auto", help="auto, cuda, cuda:N, mps or cpu")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    args.page = args.page or args.output_dir / "PROOF.md"
    if args.data_path is None and not args.publish:
        parser.error("--data_path is missing: a folder with train/ and val/")
    if args.jobs > 1 and args.num_workers is None:
        args.num_workers = 0
    args.depth = args.depth or DEPTHS.get(args.model)
    if len(args.shares) != len(args.finetune_epochs):
        parser.error(
            f"--finetune_epochs: {len(args.finetune_epochs)} numbers for {len(args.shares)} "
            f"--shares: give one for each"
        )
    if any(share > 100 for share in args.shares):
        parser.error("--shares are percent: at most 100")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Settings that all runs of an output folder share."""
    return {
        "data_path": str(args.data_path.resolve()),
        "images": args.images,
        "test_images": args.test_images,
        "tune": args.tune,
        "epochs": args.epochs,
        "model": args.model,
        "input_size": args.input_size,
        "patch_size": args.patch_size,
        "depth": args.depth,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "finetune_lr": args.finetune_lr,
        "curve_points": args.curve_points,
        "finetunings": {f"{share:g}": epochs for share, epochs in finetunings(args).items()},
    }


def shown(argument: str) -> str:
    """An argument as the page shows it: no folders of this machine."""
    return f"/path/to/{Path(argument).name}" if Path(argument).is_absolute() else argument


def setting_of(args: argparse.Namespace, device: torch.device, book: Book) -> dict[str, object]:
    """The facts of the experiment that the page tells beside its settings.

    The seeds that were asked for by earlier commands remain so.
    """
    asked = book.setting.get("asked", {})
    architecture = Architecture.named(args.model).with_flags(vars(args))
    return {
        "counts": args.counts,
        "classes": args.classes,
        "size": "×".join(map(str, architecture.img_size)),
        "strides": " ".join(map(str, args.patch_size)),
        "depth": architecture.depth,
        "jobs": args.jobs,
        "asked": {name: max(args.seeds, asked.get(name, 0)) for name in args.arms},
        "environment": environment("proof", [shown(text) for text in args.argv], device.type),
    }


def check_arms(args: argparse.Namespace, book: Book) -> None:
    """Leave out arms that would be others once more; refuse a student without its teacher.

    Raises:
        UsageError: sizes that do not fit each other, or a teacher that is not trained.
    """
    try:
        for name in [name for name in args.arms if ARMS[name].equal_cost]:
            cost = flops_of(args, ARMS[name]) / flops_of(args, ARMS["convmae"])
            if abs(cost - 1) < SAME_COST:
                args.arms.remove(name)
                print_once(
                    f"{name} is left out: an epoch costs {cost:.0%} of ConvMAE's FLOPs, so as many "
                    f"epochs are as much computation"
                )
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size, --depth: {error}") from error
    for name in [name for name in args.arms if ARMS[name].mimics]:
        trained = {*args.shares} if TEACHER in args.arms else {}
        there = all("finetune-100" in book.of(TEACHER, seed) for seed in range(args.seeds))
        if 100 not in trained and not there:
            raise UsageError(
                f"--arms {name} needs {TEACHER} among --arms and 100 among --shares: its teacher "
                f"is that encoder, trained with all labels"
            )


def main(args: argparse.Namespace) -> None:
    """Lay out the data, do what is not done yet, write the page."""
    if args.publish:
        publish(args)
        return
    device = init_processes(args.device)
    if world_size() > 1:
        raise UsageError("the proof is no run of several processes: start it without a launcher")
    args.device = str(device)
    if args.cifar10 and not args.data_path.exists():
        print_once(f"writing CIFAR-10 to {args.data_path}")
        write_cifar10(args.cifar10, args.data_path)
    hold_output(args.output_dir)
    book = Book(args.output_dir)
    book.check(settings_of(args))
    check_arms(args, book)
    folder = args.output_dir / "data"
    selection = (args.images, args.test_images, args.shares, args.tune)
    args.counts = prepare(args.data_path, folder, *selection)
    args.classes = len(list((folder / "all/train").iterdir()))
    book.begin(settings_of(args), setting_of(args, device, book))

    jobs = all_jobs(args, device)
    done = {job.key for job in jobs if job.name in book.of(*job.key[:2])}
    left = {job.key: job for job in jobs if job.key not in done}
    numbers = count(len(done) + 1)

    def begin(job: Job) -> None:
        seconds = book.seconds_of([(j.kind, j.passes) for j in left.values()])
        time_left = "time left unknown yet"
        if seconds is not None:
            time_left = f"about {duration(seconds / args.jobs)} left"
        print_once(f"[{next(numbers)}/{len(jobs)}] {job.title}; {time_left}")

    todo = list(left.values())
    run = run_beside(args, todo, done, begin) if args.jobs > 1 else run_here(todo, begin)
    for job, found in run:
        book.add(*job.key, found)
        del left[job.key]
    publish(args)


def publish(args: argparse.Namespace) -> None:
    """Write the page of what has been found so far.

    Raises:
        UsageError: nothing has been.
    """
    book = Book(args.output_dir)
    if not book.found:
        raise UsageError(f"{book.path} is not there or holds no results: run the experiment first")
    write_page(args.page, book)
    shares = [float(share) for share in book.settings["finetunings"]]
    print_once(f"{headline(book.found, shares)}\ndone: {args.page}, and its pictures beside it")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
