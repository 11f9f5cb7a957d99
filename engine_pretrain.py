"""Masked-autoencoder pretraining, of images and of videos: the run and its epochs."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import closing

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torchvision.utils import save_image

from models_convmae import MaskedAutoencoderConvViT
from util.data.array_views import split_nodata
from util.data.loader import Loader
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.run.distributed import is_main_process, print_once, rank, world_size
from util.run.logger import count_parameters
from util.run.pictures import save_loss_curve
from util.run.program import Stopped
from util.run.resume import find_resumable
from util.run.run import Run
from util.run.same_run import check_program, check_state
from util.run.setup import seed_everything

Factory = Callable[..., MaskedAutoencoderConvViT]


def build_model(
    args: argparse.Namespace, models: Mapping[str, Factory]
) -> MaskedAutoencoderConvViT:
    """The model that the arguments describe.

    Raises:
        UsageError: a geometry that the model cannot have.
    """
    kwargs = {"norm_pix_loss": args.norm_pix_loss}
    if "masking" in args:
        kwargs["masking"] = args.masking
    try:
        architecture = Architecture.named(args.model).with_flags(vars(args))
        return models[args.model](**architecture.encoder_kwargs(), **kwargs)
    except ValueError as error:
        raise UsageError(f"--model {args.model}, --input_size, --patch_size: {error}") from error


def check_sizes(args: argparse.Namespace, models: Mapping[str, Factory]) -> None:
    """Refuse sizes that do not fit each other, before anything is read or built."""
    with torch.device("meta"):
        geometry = build_model(args, models).geometry
    try:
        geometry.visible_patches(args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size, --mask_ratio: {error}") from error


def build_run(
    args: argparse.Namespace,
    device: torch.device,
    loader: Loader,
    models: Mapping[str, Factory],
    program: str,
) -> Run:
    """Model, optimizer and logs, set to the state to go on from.

    Args:
        args: completed arguments.
        device: where to run.
        loader: the training data.
        models: what `--model` names.
        program: what kind of run this is.
    """
    content = find_resumable(args.resume, args.output_dir)
    if content:
        check_program(content, program)
        check_state(content, args, len(loader.dataset))
    seed_everything(args.seed)
    model = build_model(args, models).to(device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    return Run.prepare(args, device, loader, model, optimizer, content, program=program)


def title(run: Run) -> str:
    """One line on the model: name, parameters, input, visible patches."""
    geometry = run.model.geometry
    pixels = "x".join(map(str, geometry.img_size))
    visible = geometry.visible_patches(run.args.mask_ratio)
    return (
        f"{run.args.model}: {count_parameters(run.model)}, {pixels} pixels, "
        f"{visible} of {geometry.num_patches} patches visible"
    )


def pretrain(
    run: Run,
    draw: Callable[[], Tensor] | None,
    measure: Callable[..., dict[str, float] | None] | None = None,
) -> None:
    """Run the epochs, with a picture after each and at the end.

    Args:
        run: set to where it begins.
        draw: gives a reconstruction, `[3, height, width]` in [0, 1]; in the main process.
        measure: gives numbers by name, after every `--knn_freq` epochs and the last; or None if
            its argument `stopping` became true.
    """
    run.describe(title(run))
    with closing(run.report.log) as log:
        for epoch, start in run.epochs():
            values = train_one_epoch(run, epoch, start, run.args.mask_ratio)
            if is_main_process():
                log.image(epoch + 1, "reconstruction", draw())
            last = epoch + 1 == run.args.epochs
            if measure and (last or (epoch + 1) % run.args.knn_freq == 0):
                values |= measure_accuracy(run, epoch, measure)
            run.end_epoch(epoch, values)
    if is_main_process():
        folder = run.args.output_dir
        with log.unless_it_fails(folder / "loss.png"):
            save_loss_curve(folder / "log.txt", folder / "loss.png")
        with log.unless_it_fails(folder / "reconstruction.png"):
            save_image(draw(), folder / "reconstruction.png")
        print(f"done: checkpoint.pth, reconstruction.png, loss.png, log.txt in {folder}")


def measure_accuracy(
    run: Run, epoch: int, measure: Callable[..., dict[str, float] | None]
) -> dict[str, float]:
    """Measure what the features are good for, and log it; no random number is drawn.

    Args:
        run: of the model.
        epoch: number of the epoch that is trained, from 0.
        measure: gives numbers by name, or None if its argument `stopping` became true.

    Raises:
        Stopped: a signal came; the trained epoch is saved.
    """
    run.save_trained(epoch)
    values = measure(stopping=lambda: run.stop.received > 0)
    if values is None:
        raise Stopped(run.stopped_at(f"the evaluation of epoch {epoch + 1}"))
    run.report.log.scalars(epoch + 1, values)
    numbers = "  ".join(f"{name} {value:.2f}%" for name, value in values.items())
    print_once(f"Epoch {epoch + 1}/{run.args.epochs}  {numbers}")
    return values


def train_one_epoch(run: Run, epoch: int, start_step: int, mask_ratio: float) -> dict[str, float]:
    """Pretrain for one epoch (paper section 3.2).

    Args:
        run: the run of a `MaskedAutoencoderConvViT`.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        mask_ratio: share of the blocks to remove.

    Returns:
        The epoch's means.
    """
    run.model.train()
    for step in run.steps(epoch, start_step):
        for (imgs,) in step.micro_batches:
            noise = draw_noise(len(imgs), run.model.geometry.num_mask_units, imgs.device)
            options = {}
            if getattr(run.args, "arrays", None):
                imgs, options["valid"] = split_nodata(imgs)
            with step.autocast():
                loss, _, _ = run.ddp_model(imgs, mask_ratio, noise, **options)
            step.backward(loss)
        step.update()
    return run.means(epoch)


def draw_noise(batch_size: int, units: int, device: torch.device) -> Tensor:
    """Draw the noise that decides the masks of this process: `[batch_size, units]`, uniform.

    Every process draws the noise of the whole batch and takes its rows, so that any number of
    processes mask alike.
    """
    noise = torch.rand(batch_size * world_size(), units, device=device)
    return noise[batch_size * rank() : batch_size * (rank() + 1)]
