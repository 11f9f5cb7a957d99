"""Common options of this folder's programs: command line, config, processes, checkpoints."""

import argparse
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import CheckpointLoader

from SEG.data import class_names
from SEG.masks import ignored_numbers
from SEG.overrides import apply_overrides, nearest, registered
from util.data.classes import check_classes
from util.errors import TrainingError, UsageError
from util.run.distributed import init_processes, print_once, world_size
from util.run.normalization import agreed_stats
from util.run.optim_step import amp_dtype
from util.run.parser import Parser, non_negative_int, positive_int
from util.run.program import FULL
from util.weights.checkpoint import load_file
from util.weights.describe import show_stats
from util.weights.read import KINDS, Weights, read_weights, weights_of

ROOT = Path(__file__).parent.parent
OUR_FOLDERS = {ROOT, *(ROOT / "util").iterdir(), ROOT / "SEG"}
SPLITS = ("train", "val", "test")
NEEDED = ("model", *(f"{split}_dataloader" for split in SPLITS))


def add_config_args(parser: Parser) -> None:
    """The config, and what may be changed in it."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="one of SEG/configs, or yours")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings of the config to change, such as train_dataloader.batch_size=4",
    )
    parser.add_argument(
        "--crop-size",
        type=positive_int,
        nargs="+",
        metavar="PIXELS",
        help="size of the crops to train on and of the window that slides over test images: one "
        "number, or height and width (default: the config's)",
    )


def add_data_args(parser: Parser) -> None:
    """Your own images and masks."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        "--data_path",
        type=Path,
        metavar="DIR",
        help="folder with images/{training,validation} and annotations/{training,validation} "
        "(default: the config's)",
    )
    for split, what in (("train", "train on"), ("val", "validate and test on")):
        group.add_argument(
            f"--{split}-data",
            nargs=2,
            metavar=("IMAGES", "MASKS"),
            help=f"folders of the images to {what} and of their masks, below --data-path if that "
            f"is given (default: the config's)",
        )
    group.add_argument(
        "--classes",
        metavar="N|FILE",
        help="number of classes, or a text file with a name a line (default: the config's)",
    )
    group.add_argument(
        "--ignore",
        type=non_negative_int,
        action="extend",
        nargs="+",
        default=[],
        metavar="NUMBER",
        help="with --classes: numbers in the masks that mean no class, beside 255, which never "
        "does; classes are the others from 0 on",
    )
    group.add_argument(
        "--ignore-zero",
        dest="ignore",
        action="append_const",
        const=0,
        help="the same as --ignore 0: classes are 1 … N in the masks, as in ADE20K",
    )


def read_config(args: argparse.Namespace) -> Config:
    """The config that the command line names, with its changes.

    Raises:
        UsageError: a file that is no config, or changes that do not fit it.
    """
    if not args.config.is_file():
        raise UsageError(f"the config {args.config} does not exist or is not a file")
    try:
        values = Config.fromfile(args.config).to_dict()
    except Exception as error:  # A config is a program and may raise anything.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the config {args.config} cannot be read: {reason}") from error
    # mmengine writes the config into logs and checkpoints, and takes seconds to format it.
    config = Config(values, filename=str(args.config), format_python_code=False)
    lacking = [part for part in NEEDED if not isinstance(config.get(part), Mapping)]
    if lacking:
        raise UsageError(f"the config {args.config} lacks {', '.join(lacking)}")
    apply_overrides(config, args.cfg_options or {})
    if args.crop_size is not None:
        set_crop_size(config, args.crop_size)
    if config.get("work_dir") is None:
        config.work_dir = str(Path("output") / args.config.stem)
    return config


def set_crop_size(config: Config, crop_size: Sequence[int]) -> None:
    """Give training and sliding windows another size; windows overlap by a third.

    Raises:
        UsageError: more than two numbers.
    """
    if len(crop_size) > 2:
        raise UsageError(f"--crop-size takes one or two numbers, not {len(crop_size)}")
    size = tuple(crop_size) if len(crop_size) == 2 else (*crop_size, *crop_size)
    model = config.model
    model.data_preprocessor.size = model.backbone.img_size = model.test_cfg.crop_size = size
    model.test_cfg.stride = tuple(side * 2 // 3 for side in size)
    for step in config.train_dataloader.dataset.pipeline:
        if step.type == "RandomCrop":
            step.crop_size = size


def use_data(config: Config, args: argparse.Namespace) -> None:
    """Point a config at other images and masks, see `add_data_args`.

    Raises:
        UsageError: arguments that do not go together, or classes that cannot be read.
    """
    if args.ignore and args.classes is None:
        raise UsageError("--ignore and --ignore-zero go with --classes: say how many there are")
    changes: dict[str, object] = {}
    if args.data_path is not None:
        changes["data_root"] = str(args.data_path)
    if args.classes is not None:
        classes = int(args.classes) if args.classes.isdecimal() else args.classes
        names = class_names(classes, 0 in args.ignore)
        changes |= {"classes": names, **_as_arguments(args.ignore)}
        set_num_classes(config, len(names))
    for split in SPLITS:
        dataset = config[f"{split}_dataloader"].dataset
        dataset.update(changes)
        folders = args.train_data if split == "train" else args.val_data
        if folders is not None:
            dataset.data_prefix = dict(zip(("img_path", "seg_map_path"), folders, strict=True))
            if args.data_path is None:
                dataset.data_root = "."


def _as_arguments(ignored: Iterable[int]) -> dict[str, object]:
    """Ignored numbers as the arguments of `ImagesAndMasks`."""
    ignored = {*ignored}
    return {"reduce_zero_label": 0 in ignored, "ignored": sorted(ignored - {0})}


def show_ignore(ignored: Sequence[int]) -> str:
    """The flag that says which numbers are ignored, with a preposition."""
    if not ignored:
        return "without --ignore"
    return f"with --ignore {' '.join(map(str, ignored))}"


def trained_classes(meta: object) -> tuple[list[str], tuple[int, ...] | None] | None:
    """The classes that a checkpoint of MMSegmentation was trained on.

    Args:
        meta: of a checkpoint.

    Returns:
        The names of the classes, and the numbers that are ignored in the masks beside 255 (None
        if it does not say); None without names.
    """
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    names = data.get("classes") if isinstance(data, Mapping) else None
    if not names:
        return None
    told = data.get("reduce_zero_label") is not None or "ignored" in data
    return [str(name) for name in names], ignored_numbers(data) if told else None


def use_trained_classes(config: Config, args: argparse.Namespace, meta: object) -> None:
    """Test with the classes of a checkpoint, whatever the config's are.

    Args:
        config: changed in place.
        args: its `--classes` and `--ignore`, if given, must be those of its `checkpoint`.
        meta: of that checkpoint, see `read_segmentor`.

    Raises:
        UsageError: saying what differs.
    """
    trained = trained_classes(meta)
    if trained is None:
        return
    names, ignored = trained
    dataset = config.test_dataloader.dataset
    if args.classes is not None:
        given = class_names(dataset.classes)
        if args.classes.isdecimal() and len(given) == len(names):
            given = names  # a number says nothing of the names
        check_classes(names, given, str(args.checkpoint), "--classes")
        if ignored is not None and {*ignored} != {*args.ignore}:
            raise UsageError(f"{args.checkpoint} was trained {show_ignore(ignored)}: test it so")
    elif dataset.get("type") != "ImagesAndMasks":
        return
    dataset.classes = names
    if ignored is not None:
        dataset.update(_as_arguments(ignored))
    set_num_classes(config, len(names))


def set_num_classes(config: Config, num_classes: int) -> None:
    """Give all heads another number of classes."""
    for head in ("decode_head", "auxiliary_head"):
        if head in config.model:
            config.model[head].num_classes = num_classes


def use_stats(config: Config, weights: Weights) -> str:
    """Normalise images as the run did that a model begins with, and tell it.

    A mean and a deviation of the config stay if they are not ImageNet's.

    Args:
        config: changed in place.
        weights: of that run.

    Returns:
        The line that was printed, see `agreed_stats`.
    """
    preprocessor, line = config.model.get("data_preprocessor") or {}, ""
    mean, std = (preprocessor.get(name) for name in ("mean", "std"))
    if mean is None and weights.stats:
        line = (
            f"note: the config normalises no images (model.data_preprocessor.mean); those of "
            f"{weights.path} were by {show_stats(weights.stats)}"
        )
    elif mean and std and len(mean) == len(std):  # mmengine refuses others
        own = tuple(tuple(value / 255 for value in values) for values in (mean, std))
        stats, line = agreed_stats(own, weights)
        if stats is not own:
            for name, values in zip(("mean", "std"), stats, strict=True):
                preprocessor[name] = [255 * value for value in values]
    if line:
        print_once(line)
    return line


def start(config: Config, amp: str | None = None) -> torch.device:
    """Join the processes of the run and fit the config to the device.

    On a CPU SyncBN becomes BN (its statistics are those of each process's batch).

    Args:
        config: changed in place.
        amp: precision, as `amp_dtype` takes it; None for the config's, which on a CPU is full
            precision.

    Returns:
        This process's device.

    Raises:
        UsageError: a precision that the device does not have.
    """
    device = init_processes()
    several = world_size() > 1
    config.launcher = "pytorch" if several else "none"
    if device.type != "cuda":
        config.model = without_sync_bn(config.model)
        if several:
            config.model_wrapper_cfg = dict(
                type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False
            )
    _set_precision(config.optim_wrapper, device, amp)
    # mmengine reads with plain unpickling what cannot be read safely.
    CheckpointLoader.register_scheme("", load_safely, force=True)
    return device


def _set_precision(wrapper: dict, device: torch.device, amp: str | None) -> None:
    if amp in ("bf16", "fp16") and device.type != "cuda":
        raise UsageError(
            f"--amp {amp}: mmengine has mixed precision on GPUs only: leave --amp away, or none"
        )
    mixed = wrapper.type == "AmpOptimWrapper"
    given = wrapper.pop("dtype", None) if mixed else None
    wrapper.pop("loss_scale", None)
    if amp is None and given is not None and device.type == "cuda":
        dtype = getattr(torch, given)
    else:
        dtype = amp_dtype(amp or ("auto" if mixed else "none"), device)
    wrapper.type = "OptimWrapper" if dtype is None else "AmpOptimWrapper"
    if dtype is not None:
        # Only fp16 needs its gradients scaled.
        wrapper.loss_scale = "dynamic" if dtype == torch.float16 else 1.0
        wrapper.dtype = str(dtype).removeprefix("torch.")


def without_sync_bn(value: object) -> object:
    """A model's config with BN for every SyncBN."""
    if isinstance(value, dict):
        changed = {key: without_sync_bn(item) for key, item in value.items()}
        return {**changed, "type": "BN"} if changed.get("type") == "SyncBN" else changed
    if isinstance(value, list | tuple):
        return type(value)(map(without_sync_bn, value))
    return value


def load_safely(filename: str, map_location: object) -> dict:
    """A checkpoint's contents, for mmengine: nothing in the file can run code.

    Raises:
        UsageError: a file that is refused, with the reason.
    """
    content = load_file(filename)
    meta = content.get("meta", {})
    if not isinstance(meta, dict):
        raise UsageError(f"checkpoint {filename} is of no run to go on with: its meta is no dict")
    meta.pop("config", None)  # mmengine would run the text of one
    return content


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the latest iteration in a run's folder, None if there is none."""
    found = {int(n[1]): p for p in Path(folder).glob("iter_*.pth") if (n := _NUMBER.search(p.name))}
    return found[max(found)] if found else None


_NUMBER = re.compile(r"^iter_(\d+)\.pth$")


@contextmanager
def clear_errors(begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what config and data bring about within mmengine into one line of this project.

    Args:
        begun: whether the run is under way. From then on an error that is not of the data keeps
            its traceback.

    Raises:
        UsageError: bad use, found as parts were built, in the first step or in a data loader's
            worker.
        TrainingError: the run cannot go on.
    """
    try:
        yield
    except (UsageError, TrainingError) as error:
        raise type(error)(_last_line(error)) from error
    except Exception as error:  # configs name programs, which raise anything
        full = isinstance(error, OSError) and error.errno in FULL
        if full or (begun() and not isinstance(error, ValueError)):
            raise
        raise UsageError(_explain(error)) from error


def _last_line(error: Exception) -> str:
    """An error's message without what is put in front: a worker's traceback, a class's name."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^(util\.errors\.\w+: )?(class `\w+` in \S+: )*", "", text)


def _explain(error: Exception) -> str:
    """One line on an error that a library raised: what it says, and where that was."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = text.strip().splitlines()
    in_worker = bool(lines) and lines[0].startswith("Caught ")
    if in_worker and "util.errors.UsageError: " in lines[-1]:
        return lines[-1].split("util.errors.UsageError: ", 1)[1]
    text = lines[-1] if in_worker else " ".join(" ".join(lines).split())
    text = re.sub(r"^(class `\w+` in \S+: )*['\"]?", "", text)
    if found := re.match(r"(\S+) is not in the (?:\S+::)?([^:]+) registry", text):
        name, group = found.groups()
        return f"there is no {group} {name}{nearest(name, registered(group))}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and Path(where.filename).parent in OUR_FOLDERS:
        return text
    place = f"{Path(where.filename).name}, line {where.lineno}"
    shown = text if len(text) <= 300 else f"{text[:300]}…"
    return f"the config or the data cannot be used: {shown} ({type(error).__name__}; {place})"


def read_segmentor(path: Path) -> tuple[Weights, object]:
    """The weights of a trained segmentor, and mmengine's `meta` in the file (None without it).

    Raises:
        UsageError: a file of something else.
    """
    if path.suffix == ".safetensors":  # weights alone
        weights, meta = read_weights(path), None
    else:
        content = load_file(path)
        weights, meta = weights_of(content, path), content.get("meta")
    if weights.kind != "segmentor":
        _ = weights.architecture  # refuses what is no ConvViT's
        raise UsageError(
            f"checkpoint {path} is {KINDS[weights.kind]}, no trained segmentation model: "
            f"train one from it by python -m SEG.train CONFIG --pretrained {path}"
        )
    return weights, meta
