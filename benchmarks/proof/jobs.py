"""The jobs of a proof: what is trained and measured for an arm and a seed, with which settings."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

import main_finetune
import main_pretrain
from benchmarks.proof import measures
from benchmarks.proof.arms import ARMS, TEACHER, Arm
from benchmarks.proof.book import kind_of
from benchmarks.proof.page import PICTURE, draw_reconstructions
from benchmarks.steps import count_flops
from engine_pretrain import build_model
from util.layers.architecture import Architecture
from util.run.args import derive_args
from util.run.resume import LAST
from util.weights.read import read_weights

# Small pictures need no more regularisation than that, and short runs bear none.
FINETUNE = (
    *("--aa", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--drop_path", "0"),
    *("--crop_scale", "0.4", "1"),
)
# Of weights that were pretrained, and of random ones, which have nothing to keep.
LAYER_DECAY = {True: "0.8", False: "1"}
# Share of the epochs of any training that the learning rate rises.
WARMUP = 0.1
# Arms whose reconstructions are drawn, and those measured without their position table, too.
DRAWN = ("convmae", "pixels")
TABLE_TESTED = ("convmae", "mae")


# ---- settings of a training ----------------------------------------------------------------------


def pretrain_args(args: argparse.Namespace, arm: Arm, seed: int) -> argparse.Namespace:
    """The command line of an arm's pretraining, as `main_pretrain.py` reads it.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    epochs = epochs_of(args, arm)
    flags = [
        *("--data_path", args.output_dir / "data/all", "--input_size", args.input_size),
        *("--output_dir", folder_of(args, arm, seed) / "pretrain", "--norm_pix_loss"),
        *("--model", f"convmae_convvit_{args.model}_patch16"),
        *("--batch_size", min(args.batch_size, args.counts["all"]), "--lr", args.lr),
        *("--epochs", epochs, "--save_freq", max(1, epochs // args.curve_points), "--keep", 0),
        *common_flags(args, arm, epochs, seed),
        *arm.flags,
    ]
    if arm.mimics:
        flags += ["--teacher", folder_of(args, ARMS[TEACHER], seed) / "finetune-100" / LAST]
    complete = main_pretrain.parse_args([str(flag) for flag in flags])
    complete.model = f"{arm.name}_{args.model}"
    derive_args(complete, torch.device(args.device).type, 1)
    return complete


def finetune_args(
    args: argparse.Namespace, arm: Arm, seed: int, share: float
) -> argparse.Namespace:
    """The command line of an arm's fine-tuning, as `main_finetune.py` reads it."""
    epochs = finetunings(args)[share]
    name = f"labels-{share:g}"
    flags = [
        *("--data_path", args.output_dir / "data" / name, "--input_size", args.input_size),
        *("--output_dir", folder_of(args, arm, seed) / f"finetune-{share:g}", "--in_chans", 3),
        *("--batch_size", min(args.batch_size, args.counts[name]), "--lr", args.finetune_lr),
        *("--epochs", epochs, "--save_freq", epochs, "--layer_decay", LAYER_DECAY[arm.pretrained]),
        *common_flags(args, arm, epochs, seed),
        *FINETUNE,
    ]
    complete = main_finetune.parse_args([str(flag) for flag in flags])
    complete.model = f"{arm.name}_{args.model}"
    return complete


def finetunings(args: argparse.Namespace) -> dict[float, int]:
    """Epochs of fine-tuning by the share of the labels in percent."""
    return dict(zip(args.shares, args.finetune_epochs, strict=True))


def common_flags(args: argparse.Namespace, arm: Arm, epochs: int, seed: int) -> list[object]:
    """Flags that both have: the schedule's shape, the patches, the machine.

    In full precision and not compiled on any device: such small models wait for their launches,
    which autocast makes more of, and compile for longer than they train.
    """
    workers = [] if args.num_workers is None else ["--num_workers", args.num_workers]
    return [
        *("--warmup_epochs", WARMUP * epochs, "--seed", seed, "--device", args.device),
        *("--patch_size", *args.patch_size, "--print_freq", 1000, "--amp", "none", "--no_compile"),
        *workers,
        *depth_flags(arm.depth or args.depth),
    ]


def depth_flags(depth: Sequence[int] | None) -> list[object]:
    """The flag of a depth; none where it is the size's."""
    return ["--depth", *depth] if depth else []


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
    return max(1, round(args.epochs * flops_of(args, ARMS["convmae"]) / flops_of(args, arm)))


def flops_of(args: argparse.Namespace, arm: Arm) -> int:
    """FLOPs of a picture in an arm's pretraining, forward and backward, without a teacher's.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    depth = tuple(arm.depth or args.depth or ())
    return _count_flops(arm.name, args.model, args.input_size, tuple(args.patch_size), depth)


@cache
def _count_flops(
    name: str, model: str, size: int, strides: tuple[int, ...], depth: tuple[int, ...]
) -> int:
    arm, full = ARMS[name], f"convmae_convvit_{model}_patch16"
    flags = ["--data_path", ".", "--model", full, "--input_size", size, "--patch_size", *strides]
    flags += [*depth_flags(depth), *arm.flags]
    args = main_pretrain.parse_args([str(flag) for flag in flags])
    autoencoder = build_model(args, {full: arm.factory(model)})
    imgs = torch.zeros(1, 3, *autoencoder.geometry.img_size)
    return count_flops(lambda: autoencoder(imgs, args.mask_ratio)[0])


# ---- the jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One thing to do for an arm and a seed.

    Attributes:
        name: of the job in the results; up to "-" its kind.
        passes: pictures that go through the model, for the time left.
        run: does it; returns what goes into the results.
        needs: arm, seed and name of the jobs that come before.
    """

    arm: Arm
    seed: int
    name: str
    passes: int
    run: Callable[[], dict]
    needs: tuple[tuple[str, int, str], ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """Names of the arm, the seed and the job."""
        return self.arm.name, self.seed, self.name

    @property
    def kind(self) -> str:
        """Jobs of a kind take the same time a picture."""
        return kind_of(self.name)

    @property
    def title(self) -> str:
        """The job in words."""
        return f"{self.arm.what}, seed {self.seed}: {self.name}"


def jobs_of(args: argparse.Namespace, arm: Arm, seed: int, device: torch.device) -> list[Job]:
    """The jobs of an arm and a seed, in order.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    folder = folder_of(args, arm, seed) / "pretrain"
    data, counts = args.output_dir / "data/all", args.counts
    pretraining = pretrain_args(args, arm, seed)
    checkpoint = folder / LAST if arm.pretrained else None
    needs = ((arm.name, seed, "pretrain"),) if arm.pretrained else ()
    looked_at = counts["all"] + counts["test"]

    def pretrain() -> dict:
        measures.pretrain(arm, pretraining, device)
        seconds = measures.seconds_an_epoch(folder)
        return {
            "epochs": pretraining.epochs,
            "seconds_an_epoch": seconds,
            "mflops": flops_of(args, arm) / 1e6,
        }

    def probe() -> dict:
        torch.manual_seed(seed)
        model = measures.encoder(arm, checkpoint, pretraining)
        return measures.probe(model, data, pretraining, device, bare=arm.name in TABLE_TESTED)

    def curve() -> dict:
        return {"points": measures.curve(arm, folder, data, pretraining, device)}

    def finetune(share: float) -> dict:
        return measures.finetune(arm, checkpoint, finetune_args(args, arm, seed, share), device)

    def picture() -> dict:
        architecture = Architecture.named(args.model).with_flags(vars(pretraining))
        model = arm.factory(args.model)(
            **architecture.encoder_kwargs(), norm_pix_loss=pretraining.norm_pix_loss
        )
        model.load_state_dict(read_weights(checkpoint).state)
        path = args.output_dir / PICTURE
        return {"caption": draw_reconstructions(model, arm, pretraining, data, path)}

    jobs = []
    if arm.pretrained:
        passes, before = counts["all"] * pretraining.epochs, ()
        if arm.mimics:
            before = ((TEACHER, seed, "finetune-100"),)
        jobs.append(Job(arm, seed, "pretrain", passes, pretrain, before))
    jobs.append(Job(arm, seed, "probe", looked_at, probe, needs))
    epochs = finetunings(args)
    for share in arm.shares(epochs):
        passes = counts[f"labels-{share:g}"] * epochs[share] + counts["test"]
        run = partial(finetune, share)
        jobs.append(Job(arm, seed, f"finetune-{share:g}", passes, run, needs))
    if arm.pretrained and arm.main and args.curve_points > 1:
        passes = looked_at * (args.curve_points - 1)
        jobs.append(Job(arm, seed, "curve", passes, curve, needs))
    if seed == 0 and arm.name == next((name for name in DRAWN if name in args.arms), None):
        jobs.append(Job(arm, seed, "picture", counts["test"], picture, needs))
    return jobs


def all_jobs(args: argparse.Namespace, device: torch.device) -> list[Job]:
    """All jobs of an experiment, what matters most first.

    The main arms with all seeds, then seed by seed the ablations.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    order = [
        (not ARMS[name].main, seed, number, name)
        for seed in range(args.seeds)
        for number, name in enumerate(args.arms)
    ]
    arms = [(ARMS[name], seed) for _, seed, _, name in sorted(order)]
    return [job for arm, seed in arms for job in jobs_of(args, arm, seed, device)]
