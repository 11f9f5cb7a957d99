"""Masked-autoencoder pretraining, of images and of videos: the run and its epochs."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, fields

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torchvision.utils import save_image

from models_convmae import MaskedAutoencoderConvViT
from models_teacher import Teacher, load_teacher
from util.data.array_views import split_nodata
from util.data.loader import Loader
from util.data.transforms import channel_stats
from util.errors import UsageError
from util.layers.architecture import Architecture
from util.layers.decoder import Decoder
from util.run.distributed import is_main_process, print_once, rank, world_size
from util.run.feed import Stopwatch
from util.run.geometry_args import described_architecture
from util.run.logger import count_parameters
from util.run.normalization import given_stats
from util.run.pictures import Drawing, save_loss_curve
from util.run.program import Stopped
from util.run.run import Run
from util.run.same_run import check_state
from util.run.setup import seed_everything
from util.weights.read import Weights
from util.weights.start import start_from

Factory = Callable[..., MaskedAutoencoderConvViT]
TEACHER = "teacher_seconds"  # its forward passes in the logs


def build_model(
    args: argparse.Namespace, models: Mapping[str, Factory]
) -> MaskedAutoencoderConvViT:
    """The model that the arguments describe.

    Raises:
        UsageError: a geometry that the model cannot have.
    """
    names = ("masking", "complementary", "class_token", "mimic_dim", "mimic_weight")
    names += tuple(field.name for field in fields(Decoder))
    flags = {name: vars(args).get(name) for name in names}
    kwargs = {name: value for name, value in flags.items() if value is not None}
    kwargs["norm_pix_loss"] = args.norm_pix_loss
    architecture = described_architecture(args, Architecture.named(args.model))
    try:
        return models[args.model](**architecture.encoder_kwargs(), **kwargs)
    except ValueError as error:
        raise UsageError(f"--model {args.model} with the sizes given: {error}") from error


def check_sizes(args: argparse.Namespace, models: Mapping[str, Factory]) -> None:
    """Refuse sizes that do not fit each other, before anything is read or built.

    The flags of the model that were not given become the model's. `--complementary` becomes what
    it is; None stands for no and for all patches to predict, as in older checkpoints.
    """
    with torch.device("meta"):
        model = build_model(args, models)
    # Of the models with complementary masks by their name False says no.
    by_name = args.complementary is False and args.model.startswith("fastconvmae")
    args.complementary = False if by_name else model.complementary or None
    args.class_token = args.class_token or None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    decoder = Decoder.from_shapes(shapes, {"decoder_num_heads": model.decoder_num_heads})
    architecture = described_architecture(args, Architecture.named(args.model))
    for name, value in {**architecture.flags(), **asdict(decoder)}.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    try:
        model.geometry.visible_patches(args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--input_size, --patch_size, --mask_ratio: {error}") from error
    if args.predict_share == 1:
        args.predict_share = None
    if args.predict_share is not None:
        try:
            model.geometry.predicted_patches(args.mask_ratio, args.predict_share)
        except ValueError as error:
            raise UsageError(f"--predict_share: {error}") from error


def build_run(
    args: argparse.Namespace,
    device: torch.device,
    loader: Loader,
    models: Mapping[str, Factory],
    program: str,
    start: tuple[Mapping | None, Weights | None] = (None, None),
) -> Run:
    """Model, optimizer and logs, set to the state to go on from.

    Args:
        args: completed arguments.
        device: where to run.
        loader: the training data.
        models: what `--model` names.
        program: what kind of run this is.
        start: the checkpoint to resume, or weights to start from, see `find_pretraining_start`.

    Raises:
        UsageError: a checkpoint of another run, or weights that do not fit.
    """
    content, weights = start
    if content:
        check_state(content, args, len(loader.dataset))
    seed_everything(args.seed)
    model = build_model(args, models)
    if weights and not content:
        print_once(start_from(model, weights, getattr(args, "inflate", None)))
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    losses = ("loss_reconstruction", "loss_mimic") if getattr(args, "mimic_dim", None) else ()
    return Run.prepare(
        args, device, loader, model, optimizer, content, program=program, losses=losses
    )


def build_teacher(args: argparse.Namespace, device: torch.device) -> Teacher | None:
    """The teacher that the arguments name; they get its width and the digest of its weights.

    Raises:
        UsageError: no such teacher, or flags of one without it.
    """
    args.teacher_digest = args.mimic_dim = None
    if args.teacher is None:
        given = [n for n in ("teacher_checkpoint", "mimic_weight") if getattr(args, n) is not None]
        if given:
            raise UsageError(f"--{given[0]} needs --teacher NAME")
        return None
    if getattr(args, "arrays", None):
        raise UsageError("--teacher sees 8-bit pictures: leave it away for arrays")
    teacher = load_teacher(args.teacher, args.teacher_checkpoint)
    args.teacher_digest, args.mimic_dim = teacher.digest(), teacher.width
    args.mimic_weight = 1.0 if args.mimic_weight is None else args.mimic_weight
    return teacher.to(device)


def title(run: Run) -> str:
    """One line on the model: name, parameters, input, visible patches."""
    geometry = run.model.geometry
    pixels = "x".join(map(str, geometry.img_size))
    ratio = run.args.mask_ratio
    masks = f" in each of {geometry.num_masks(ratio)} masks" if run.model.complementary else ""
    share = run.args.predict_share
    predicted = f", {geometry.predicted_patches(ratio, share)} predicted" if share else ""
    return (
        f"{run.args.model}: {count_parameters(run.model)}, {pixels} pixels, "
        f"{geometry.visible_patches(ratio)} of {geometry.num_patches} patches visible{predicted}"
        f"{masks}"
    )


def pretrain(
    run: Run,
    draw: Callable[[], Drawing] | None,
    teacher: Teacher | None = None,
    measure: Callable[..., dict[str, float] | None] | None = None,
) -> None:
    """Run the epochs, with a picture after every `--picture_freq` of them and the last.

    Args:
        run: set to where it begins.
        draw: gives a reconstruction; in the main process.
        teacher: whose tokens the model mimics.
        measure: gives numbers by name, after every `--knn_freq` epochs and the last; or None if
            its argument `stopping` became true.
    """
    run.describe(title(run) + (f"\nteacher {teacher.describe()}" if teacher else ""))
    if teacher:
        stats = given_stats(run.args) or channel_stats(run.model.in_chans)
        teacher.see_through(*stats, run.model.geometry.grid(3))
        if run.args.compile:
            teacher.compile(dynamic=False)
        if run.device.type != "mps":  # whose time this process does not see
            run.report.watches[TEACHER] = Stopwatch(run.device)
    drawing = None
    with closing(run.report.log) as log:
        for epoch, start in run.epochs():
            values = train_one_epoch(
                run, epoch, start, run.args.mask_ratio, run.args.predict_share or 1.0, teacher
            )
            last = epoch + 1 == run.args.epochs
            if is_main_process() and (last or is_due(epoch, run.args.picture_freq)):
                drawing = draw()
                show_reconstruction(run, epoch, drawing.picture)
            if measure and (last or is_due(epoch, run.args.knn_freq)):
                values |= measure_accuracy(run, epoch, measure)
            run.end_epoch(epoch, values)
    if is_main_process():
        folder = run.args.output_dir
        with log.unless_it_fails(folder / "loss.png"):
            save_loss_curve(folder / "log.txt", folder / "loss.png")
        print(f"done: checkpoint.pth, reconstruction.png, loss.png, log.txt in {folder}")
        if drawing:
            print(f"in reconstruction.png: {drawing.errors}")


def is_due(epoch: int, freq: int) -> bool:
    """True after every `freq` epochs, `epoch` counting from 0; never if that is 0."""
    return freq > 0 and (epoch + 1) % freq == 0


def show_reconstruction(run: Run, epoch: int, picture: Tensor) -> None:
    """Put a picture `[3, height, width]` in TensorBoard, and in the place of the last one's file.

    Args:
        run: that it is of.
        epoch: number of the epoch that is trained, from 0.
        picture: values in [0, 1].
    """
    run.report.log.picture(epoch + 1, "reconstruction", picture)
    path = run.args.output_dir / "reconstruction.png"
    with run.report.log.unless_it_fails(path):
        save_image(picture, path)


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
    run.report.log.scalars(epoch + 1, "test", values)
    numbers = "  ".join(f"{name} {value:.2f}%" for name, value in values.items())
    print_once(f"Epoch {epoch + 1}/{run.args.epochs}  {numbers}")
    return values


def train_one_epoch(
    run: Run,
    epoch: int,
    start_step: int,
    mask_ratio: float,
    predict_share: float = 1.0,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Pretrain for one epoch (paper section 3.2).

    Args:
        run: the run of a `MaskedAutoencoderConvViT`.
        epoch: number of the epoch, from 0.
        start_step: steps already done in it.
        mask_ratio: share of the blocks to remove.
        predict_share: share of the removed blocks to predict.
        teacher: whose tokens the visible ones mimic, none by default.

    Returns:
        The epoch's means.
    """
    run.model.train()
    watch = run.report.watches.get(TEACHER, nullcontext())
    for step in run.steps(epoch, start_step):
        for (imgs,) in step.micro_batches:
            noise = draw_noise(len(imgs), run.model.geometry.num_mask_units, imgs.device)
            options = {}
            if getattr(run.args, "arrays", None):
                imgs, options["valid"] = split_nodata(imgs)
            with step.autocast():
                if teacher:
                    with watch:
                        options["features"] = teacher(imgs)
                options["predict_share"] = predict_share
                loss, _, _, *parts = run.ddp_model(imgs, mask_ratio, noise, **options)
            step.backward(loss, *parts)
        step.update()
    return run.means(epoch)


def draw_noise(batch_size: int, units: int, device: torch.device) -> Tensor:
    """Draw the noise that decides the masks of this process: `[batch_size, units]`, uniform.

    Every process draws the noise of the whole batch and takes its rows, so that any number of
    processes mask alike.
    """
    noise = torch.rand(batch_size * world_size(), units, device=device)
    return noise[batch_size * rank() : batch_size * (rank() + 1)]
