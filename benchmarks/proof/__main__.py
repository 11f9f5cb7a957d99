"""The paper's claims on real photographs, small: `python -m benchmarks.proof --help`.

Pretrains each arm (the plain MAE, ConvMAE, ConvMAE without one of its parts) for several seeds
with the engine of `main_pretrain.py`, measures the encoders, and writes a page. What is done stays
done: after a kill the same command goes on within the epoch's checkpoint.
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals(is_run=True)

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import main_finetune
import main_pretrain
from benchmarks.measuring import environment
from benchmarks.proof import measures
from benchmarks.proof.arms import ARMS, Arm
from benchmarks.proof.data import prepare, write_cifar10
from benchmarks.proof.page import draw_reconstructions, duration, write_page
from benchmarks.steps import count_flops
from util.atomic import write_atomically
from util.errors import UsageError
from util.layers.architecture import SIZES, Architecture
from util.run.args import derive_args
from util.run.distributed import init_processes, print_once, world_size
from util.run.parser import (
    ChoiceOf,
    Parser,
    device_name,
    non_negative_int,
    positive_float,
    positive_int,
)
from util.run.program import Stopped, run_main
from util.run.resume import LAST
from util.run.setup import hold_output
from util.weights.read import read_weights

# Small pictures need no more regularisation than that, and short runs bear none.
FINETUNE = (
    *("--aa", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--drop_path", "0"),
    *("--layer_decay", "0.8", "--crop_scale", "0.4", "1"),
)
# Share of the epochs of any training that the learning rate rises.
WARMUP = 0.1
# Arms whose reconstructions are shown, the first that is there.
SHOWN = ("pixels", "convmae")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m benchmarks.proof",
        description="Replay the paper's claims on small pictures: pretrain ConvMAE, a plain MAE "
        "and ConvMAE without its parts, measure their encoders, write a page.",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data_path", type=Path, required=True, help="train/ and val/, a folder a class in each")
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
    add("--input_size", type=positive_int, default=32, metavar="PIXELS", help="side of a picture")
    add(
        "--patch_size",
        type=positive_int,
        nargs=3,
        default=[2, 2, 1],
        metavar="STRIDE",
        help="strides of the three stages",
    )
    add("--batch_size", type=positive_int, default=64, metavar="N", help="of any training")
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
    add("--device", type=device_name, default="auto", help="auto, cuda, cuda:N, mps or cpu")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    args.page = args.page or args.output_dir / "PROOF.md"
    if len(args.shares) != len(args.finetune_epochs):
        parser.error(
            f"--finetune_epochs: {len(args.finetune_epochs)} numbers for {len(args.shares)} "
            f"--shares: give one for each"
        )
    if any(share > 100 for share in args.shares):
        parser.error("--shares are percent: at most 100")
    return args


# ---- settings of a training ----------------------------------------------------------------------


def pretrain_args(args: argparse.Namespace, arm: Arm, seed: int) -> argparse.Namespace:
    """The command line of an arm's pretraining, as `main_pretrain.py` reads it."""
    epochs = epochs_of(args, arm)
    flags = [
        *("--data_path", args.output_dir / "data/all", "--input_size", args.input_size),
        *("--output_dir", folder_of(args, arm, seed) / "pretrain", "--norm_pix_loss"),
        *("--model", f"convmae_convvit_{args.model}_patch16"),
        *("--batch_size", min(args.batch_size, args.counts["all"]), "--lr", args.lr),
        *("--epochs", epochs, "--save_freq", max(1, epochs // args.curve_points), "--keep", 0),
        *common_flags(args, epochs, seed),
        *arm.flags,
    ]
    complete = main_pretrain.parse_args([str(flag) for flag in flags])
    complete.model = f"{arm.name}_{args.model}"
    derive_args(complete, torch.device(args.device).type, 1)
    return complete


def finetune_args(
    args: argparse.Namespace, arm: Arm, seed: int, share: float
) -> argparse.Namespace:
    """The command line of an arm's fine-tuning, as `main_finetune.py` reads it."""
    epochs = dict(zip(args.shares, args.finetune_epochs, strict=True))[share]
    name = f"labels-{share:g}"
    flags = [
        *("--data_path", args.output_dir / "data" / name, "--input_size", args.input_size),
        *("--output_dir", folder_of(args, arm, seed) / f"finetune-{share:g}", "--in_chans", 3),
        *("--batch_size", min(args.batch_size, args.counts[name]), "--lr", args.finetune_lr),
        *("--epochs", epochs, "--save_freq", epochs),
        *common_flags(args, epochs, seed),
        *FINETUNE,
    ]
    complete = main_finetune.parse_args([str(flag) for flag in flags])
    complete.model = f"{arm.name}_{args.model}"
    return complete


def common_flags(args: argparse.Namespace, epochs: int, seed: int) -> list[object]:
    """Flags that both have: the schedule's shape, the patches, the machine."""
    workers = [] if args.num_workers is None else ["--num_workers", args.num_workers]
    return [
        *("--warmup_epochs", WARMUP * epochs, "--seed", seed, "--device", args.device),
        *("--patch_size", *args.patch_size, "--print_freq", 1000),
        *workers,
    ]


def folder_of(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """The folder of an arm and seed."""
    return args.output_dir / "runs" / f"{arm.name}-{seed}"


def epochs_of(args: argparse.Namespace, arm: Arm) -> int:
    """Epochs of an arm's pretraining: those of ConvMAE, or as many as take its FLOPs.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if not arm.equal_cost:
        return args.epochs
    architecture = Architecture.named(args.model).with_flags(vars(args))
    imgs = torch.zeros(1, 3, *architecture.img_size)
    kwargs = architecture.encoder_kwargs()
    models = (a.factory(args.model)(**kwargs) for a in (ARMS["convmae"], arm))
    of_convmae, own = (count_flops(lambda model=model: model(imgs)[0]) for model in models)
    return max(1, round(args.epochs * of_convmae / own))


# ---- the jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One thing to do for an arm and a seed.

    Attributes:
        name: of the job in the results; up to "-" its kind.
        passes: pictures that go through the model, for the time left.
        run: does it; returns what goes into the results.
    """

    arm: Arm
    seed: int
    name: str
    passes: int
    run: Callable[[], dict]

    @property
    def kind(self) -> str:
        """Jobs of a kind take the same time a picture."""
        return self.name.partition("-")[0]


def jobs_of(args: argparse.Namespace, arm: Arm, seed: int, device: torch.device) -> list[Job]:
    """The jobs of an arm and a seed, in order."""
    folder = folder_of(args, arm, seed) / "pretrain"
    data, counts = args.output_dir / "data", args.counts
    pretraining = pretrain_args(args, arm, seed)
    checkpoint = folder / LAST if arm.pretrained else None
    looked_at = counts["all"] + counts["test"]

    def pretrain() -> dict:
        measures.pretrain(arm, pretraining, device)
        seconds = measures.seconds_an_epoch(folder)
        return {"epochs": pretraining.epochs, "seconds_an_epoch": seconds}

    def probe() -> dict:
        torch.manual_seed(seed)
        model = measures.encoder(arm, checkpoint, pretraining)
        return measures.probe(model, data / "all", pretraining, device)

    def curve() -> dict:
        return {"points": measures.curve(arm, folder, data / "all", pretraining, device)}

    def finetune(share: float) -> dict:
        settings = finetune_args(args, arm, seed, share)
        return {"accuracy": measures.finetune(arm, checkpoint, settings, device)}

    jobs = []
    if arm.pretrained:
        passes = counts["all"] * pretraining.epochs
        jobs = [
            Job(arm, seed, "pretrain", passes, pretrain),
            Job(arm, seed, "curve", looked_at * (args.curve_points - 1), curve),
        ]
    jobs.append(Job(arm, seed, "probe", looked_at, probe))
    if arm.finetuned:
        for share, epochs in zip(args.shares, args.finetune_epochs, strict=True):
            passes = counts[f"labels-{share:g}"] * epochs + counts["test"]
            jobs.append(Job(arm, seed, f"finetune-{share:g}", passes, partial(finetune, share)))
    return jobs


class Book:
    """Results of the jobs, in one file for each arm and seed, written after every job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict[int, dict[str, dict]]] = {}
        for path in sorted(folder.glob("runs/*/results.json")):
            name, _, seed = path.parent.name.rpartition("-")
            self.found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())

    def of(self, job: Job) -> dict[str, dict]:
        """Results of a job's arm and seed."""
        return self.found.get(job.arm.name, {}).get(job.seed, {})

    def add(self, job: Job, found: dict) -> None:
        """Note what a job found."""
        self.found.setdefault(job.arm.name, {}).setdefault(job.seed, {})[job.name] = found
        path = self.folder / "runs" / f"{job.arm.name}-{job.seed}" / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.of(job), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def time_left(self, jobs: Sequence[Job]) -> str:
        """The time that jobs will take by what those done took; of a kind not seen yet a guess."""
        spent: dict[str, list[float]] = {}
        for seeds in self.found.values():
            for entries in seeds.values():
                for name, entry in entries.items():
                    kind = name.partition("-")[0]
                    seconds, passes = spent.setdefault(kind, [0.0, 0.0])
                    spent[kind] = [seconds + entry["seconds"], passes + entry["passes"]]
        if not spent:
            return "time left unknown yet"
        everything = [sum(column) for column in zip(*spent.values(), strict=True)]
        left = 0.0
        for job in jobs:
            seconds, passes = spent.get(job.kind, everything)
            left += job.passes * seconds / max(passes, 1)
        return f"about {duration(left)} left"


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
        "batch_size": args.batch_size,
        "lr": args.lr,
        "finetune_lr": args.finetune_lr,
        "curve_points": args.curve_points,
        "finetunings": dict(
            zip((f"{s:g}" for s in args.shares), args.finetune_epochs, strict=True)
        ),
    }


def check_settings(path: Path, settings: dict[str, object]) -> None:
    """Compare an experiment's settings with those of its folder, and write them there.

    More arms, seeds and shares of the labels may come, but none with other settings.

    Raises:
        UsageError: the folder holds another experiment.
    """
    settings = dict(settings)
    if path.exists():
        known = json.loads(path.read_text())
        for name, value in settings.items():
            there = known.get(name)
            if isinstance(value, dict):
                value = {share: value[share] for share in value if share in there}
                there = {share: there[share] for share in value}
            if value != there:
                raise UsageError(
                    f"--output_dir {path.parent} holds an experiment with other settings ({name} "
                    f"{there}, now {value}): give the same, or another folder"
                )
        settings["finetunings"] = known["finetunings"] | settings["finetunings"]
    write_atomically(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))


def stop_between_trainings() -> None:
    """End with exit code 0 on SIGTERM and SIGUSR1 where no training handles them."""

    def stop(*_: object) -> None:
        raise Stopped("stopped by a signal: what is done is kept, the same command goes on")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def shown(argument: str) -> str:
    """An argument as the page shows it: no folders of this machine."""
    return f"/path/to/{Path(argument).name}" if Path(argument).is_absolute() else argument


def publish(args: argparse.Namespace, book: Book, device: torch.device) -> None:
    """Write the page of what has been found so far."""
    architecture = Architecture.named(args.model).with_flags(vars(args))
    settings = {
        **settings_of(args),
        "shares": args.shares,
        "counts": args.counts,
        "classes": args.classes,
        "size": "×".join(map(str, architecture.img_size)),
        "strides": " ".join(map(str, args.patch_size)),
    }
    surroundings = environment("proof", [shown(text) for text in args.argv], device.type)
    done = [name for name in SHOWN if "pretrain" in book.found.get(name, {}).get(0, {})]
    draw = partial(draw_of, args, ARMS[done[0]], device) if done else None
    write_page(args.page, book.found, settings, surroundings, draw)


def draw_of(args: argparse.Namespace, arm: Arm, device: torch.device, path: Path) -> str:
    """Draw the reconstructions of an arm's first seed; returns the caption."""
    settings = pretrain_args(args, arm, 0)
    architecture = Architecture.named(args.model).with_flags(vars(args))
    model = arm.factory(args.model)(
        **architecture.encoder_kwargs(), norm_pix_loss=settings.norm_pix_loss
    )
    model.load_state_dict(read_weights(folder_of(args, arm, 0) / "pretrain" / LAST).state)
    data = args.output_dir / "data/all"
    return draw_reconstructions(model, arm, settings, data, path)


def main(args: argparse.Namespace) -> None:
    """Lay out the data, do what is not done yet, write the page after each arm."""
    device = init_processes(args.device)
    if world_size() > 1:
        raise UsageError("the proof runs in one process: start it without a launcher")
    args.device = str(device)
    if args.cifar10 and not args.data_path.exists():
        print_once(f"writing CIFAR-10 to {args.data_path}")
        write_cifar10(args.cifar10, args.data_path)
    hold_output(args.output_dir)
    check_settings(args.output_dir / "settings.json", settings_of(args))
    try:
        Architecture.named(args.model).with_flags(vars(args))
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size: {error}") from error
    folder = args.output_dir / "data"
    selection = (args.images, args.test_images, args.shares, args.tune)
    args.counts = prepare(args.data_path, folder, *selection)
    args.classes = len(list((folder / "all/train").iterdir()))

    book = Book(args.output_dir)
    jobs = [
        job
        for seed in range(args.seeds)
        for arm in args.arms
        for job in jobs_of(args, ARMS[arm], seed, device)
    ]
    left = [job for job in jobs if job.name not in book.of(job)]
    for number, job in enumerate(left):
        stop_between_trainings()
        place = f"[{len(jobs) - len(left) + number + 1}/{len(jobs)}]"
        title = f"{job.arm.what}, seed {job.seed}: {job.name}"
        print_once(f"{place} {title}; {book.time_left(left[number:])}")
        began = time.perf_counter()
        found = job.run()
        cost = {"seconds": time.perf_counter() - began, "passes": job.passes}
        book.add(job, found | cost)
        following = left[number + 1 : number + 2]
        if not following or following[0].arm != job.arm:
            stop_between_trainings()
            publish(args, book, device)
    publish(args, book, device)
    print_once(f"done: {args.page}, and its pictures beside it")


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args(), is_run=True))
