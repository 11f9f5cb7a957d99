"""Image data: any file to one picture, any folder to a data set, one order for any split.

What a sample looks like depends on the seed that comes with its index and on nothing else: not on
the number of workers or processes, nor on where a run was resumed.
"""

import logging
import multiprocessing.connection
import os
import random
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from util.errors import TrainingError, UsageError

_logger = logging.getLogger(__name__)  # Prints warnings even if nobody sets it up.

IMAGE_EXTENSIONS = IMG_EXTENSIONS

# Files that may fail one after the other before a sample is given up.
MAX_TRIES = 10
# How often workers may be lost in an epoch before the run is given up.
MAX_LOST_WORKERS = 3

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A picture of 100 megapixels is large, not an attack; twice Pillow's limit is still an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(path: str | os.PathLike, in_chans: int = 3) -> Image.Image:
    """The picture that a viewer shows for a file, upright and with 8 bits a channel.

    Transparency is composited over white, as viewers and browsers show it on their page, unless
    the alpha channel is asked for.

    Args:
        path: an image file.
        in_chans: 1 for grayscale, 3 for RGB, 4 for RGB with alpha.

    Raises:
        UsageError: another number of channels.
        OSError: a file that cannot be read or decoded, whatever the reason.
    """
    mode = _channel_mode(in_chans)
    try:
        with Image.open(path) as file:
            file.load()
            return _upright(_to_8_bit(file, mode), file)
    except Exception as error:  # A damaged file can make a decoder raise nearly anything.
        raise OSError(f"{path} cannot be decoded: {error}") from error


def _channel_mode(in_chans: int) -> str:
    if in_chans not in _MODES:
        raise UsageError(
            f"images of {in_chans} channels are not supported: "
            f"use 1 (grayscale), 3 (RGB) or 4 (RGB and alpha)"
        )
    return _MODES[in_chans]


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """Any image to one of the modes in `_MODES`."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _narrow(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _narrow(image: Image.Image) -> Image.Image:
    """Grayscale of 16 or 32 bits to "L"; Pillow's own conversion would clip at 255.

    16-bit values keep their upper byte, as Pillow does it for 16-bit colour. Values that are not
    of 16 bits have no agreed range, so the darkest becomes black and the brightest white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        values = (values - low) * (65535 / ((high - low) or 1))
    return Image.fromarray((values // 256).astype(np.uint8))


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """Turn and mirror `image` as the metadata of the loaded `file` it came from say."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Damaged metadata raise anything, and do not spoil the picture.
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def find_train_folder(root: str | os.PathLike) -> Path:
    """`root/train` where that folder exists (the ImageNet layout), else `root` itself."""
    train = Path(root) / "train"
    return train if train.is_dir() else Path(root)


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all image files below a folder.

    Links are followed and a folder that several lead to counts once. Hidden files and folders are
    left out: they hold thumbnails, checkpoints of editors and what macOS packs into archives.

    Raises:
        UsageError: no such folder, one that cannot be read, or no image in it.
    """
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise UsageError(f"the data path {root} {what}: give a folder of images")
    images, others = [], Counter()
    for folder, files in _walk(root):
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS):
                images.append(os.path.join(folder, name))
            else:
                others[os.path.splitext(name)[1] or "unnamed type"] += 1
    if not images:
        found = ", ".join(f"{count} of {ending}" for ending, count in others.most_common(5))
        raise UsageError(
            f"no image below {root}: looked for files that end in {', '.join(IMAGE_EXTENSIONS)}, "
            f"but it holds {f'only other files ({found})' if found else 'no file at all'}"
        )
    return sorted(images)


def _walk(root: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """Each visible folder from `root` on, once, with the names of its visible files."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read the data folder {error.filename}: {error.strerror}")

    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # A link to a parent would never end.
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, [name for name in files if not name.startswith(".")]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with `torch`, `numpy` and `random` seeded on the CPU, then restore their states.

    `torch.manual_seed` would also seed the generators of the accelerators, which are not ours.
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class ImageFiles(Dataset):
    """All images below a folder, without labels.

    An item's key is `(index, seed)`, as `StepSampler` gives it. The item is `(image, bad)`: what
    `transform` made of the file, and the indices of files that could not be decoded. Another
    image, drawn by the same seed, takes the place of such a file.

    Args:
        root: a folder, nested or flat; of `train/` in it only that is read.
        transform: PIL image to `[C, H, W]`; may draw from `torch`, `numpy` and `random`.
        in_chans: 1, 3 or 4, see `load_image`.

    Raises:
        UsageError: a folder without images, see `list_images`, or another number of channels.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[Image.Image], Tensor],
        in_chans: int = 3,
    ) -> None:
        _channel_mode(in_chans)
        self.transform = transform
        self.in_chans = in_chans
        # One array, because workers would copy a list bit by bit as they touch its strings.
        self._paths = np.array([os.fsencode(path) for path in list_images(find_train_folder(root))])

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """The file behind an index."""
        return os.fsdecode(self._paths[index])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
        image, _, bad = self.read(*key)
        return image, bad

    def read(self, index: int, seed: int) -> tuple[Tensor, int, tuple[int, ...]]:
        """Decode and transform one image.

        Args:
            index: the file wanted.
            seed: what decides the augmentation, and the substitute of a bad file.

        Returns:
            image: `[C, H, W]`.
            index: the file it came from.
            bad: the files that failed before.

        Raises:
            TrainingError: `MAX_TRIES` files failed.
        """
        draw, bad = random.Random(seed), []
        while len(bad) < MAX_TRIES:
            try:
                image = load_image(self.path(index), self.in_chans)
            except OSError as error:
                bad.append(index)
                index, reason = draw.randrange(len(self)), error
                continue
            with seeded(seed):
                return self.transform(image), index, tuple(bad)
        raise TrainingError(f"{MAX_TRIES} files in a row cannot be decoded, the last: {reason}")


def collate(items: Sequence[tuple]) -> tuple:
    """Items `(image, …, bad)` to a batch `([N, C, H, W], …, bad)`.

    `bad` is the sorted list of the indices that any of the items reports.
    """
    *columns, bad = zip(*items, strict=True)
    return *(default_collate(column) for column in columns), sorted(set().union(*bad))


class StepSampler:
    """Batch sampler that yields lists of `(index, seed)`, the same images however they are split.

    A step is one of the optimizer and takes `batch_size * accum_iter * world_size` images, a
    contiguous part of the epoch's permutation. Its micro-batches are contiguous parts of that,
    and what a process gets is a contiguous part of a micro-batch. So several processes or
    accumulation see the images of one process with all of the batch, in the same order. The rest
    of an epoch that fills no step is dropped.

    Args:
        num_samples: images in the data set.
        batch_size: images of a micro-batch and process.
        accum_iter: micro-batches of a step.
        rank: which of the processes this is.
        world_size: number of processes.
        seed: of the run, not negative.
        shuffle: permute; else the order is that of the data set.

    Raises:
        UsageError: fewer images than one step takes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accum_iter: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accum_iter = accum_iter
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"{num_samples} images are fewer than one step of "
                f"{batch_size} x {accum_iter} x {world_size} = "
                f"{batch_size * accum_iter * world_size} (batch size x accumulation x processes): "
                f"lower --batch_size or --accum_iter"
            )
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.num_samples // (self.batch_size * self.accum_iter * self.world_size)

    def set_epoch(self, epoch: int, start_step: int = 0, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: decides the permutation, together with the seed.
            start_step: steps of the epoch to leave out.
            start_batch: further micro-batches to leave out.

        Raises:
            UsageError: a step beyond the epoch's end.
        """
        if start_step > self.steps_per_epoch:
            raise UsageError(
                f"cannot go on at step {start_step} of an epoch of {self.steps_per_epoch} steps: "
                f"use the data and batch size of the run that is resumed"
            )
        self.epoch = epoch
        self.first_batch = start_step * self.accum_iter + start_batch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accum_iter - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seeds = self._draw_epoch()
        for batch in range(self.first_batch, self.first_batch + len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))

    def _draw_epoch(self) -> tuple[Tensor, Tensor]:
        """The epoch's order of the images and the seed of each place in it, both `[num_samples]`.

        Seeds belong to places, not to images, so that an image looks different in each epoch.
        """
        # Hashed, because with a sum the next epoch would be the next seed's.
        epoch_seed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(epoch_seed[0]))
        seeds = torch.randint(2**63 - 1, (self.num_samples,), generator=generator)
        if not self.shuffle:
            return torch.arange(self.num_samples), seeds
        return torch.randperm(self.num_samples, generator=generator), seeds


class BadImages:
    """The files of a run that could not be decoded; each is named once.

    Args:
        warn: takes a line for the user.
    """

    def __init__(self, warn: Callable[[str], object] = _logger.warning) -> None:
        self.warn = warn
        self.paths: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Number of different files."""
        return len(self.paths)

    def add(self, indices: Iterable[int], dataset: ImageFiles) -> None:
        """Take note of what a batch of `dataset` reports as bad."""
        for index in indices:
            if index not in self.paths:
                self.paths[index] = dataset.path(index)
                self.warn(f"{self.paths[index]} cannot be decoded: skipped")

    def check(self, total: int, num_files: int, max_share: float) -> None:
        """Stop a run on damaged data.

        Args:
            total: bad files of all processes.
            num_files: files of the data set.
            max_share: share of them that may be bad.

        Raises:
            TrainingError: more are.
        """
        if total > max_share * num_files:
            first = next((f"; first: {path}" for path in self.paths.values()), "")
            raise TrainingError(
                f"{total} of {num_files} images cannot be decoded, "
                f"more than --max_bad_images {max_share} allows{first}"
            )


class Loader:
    """Micro-batches of an epoch, through worker processes of which some may be lost.

    A worker that dies (the out-of-memory killer likes them) costs a warning and a restart of the
    workers; no batch is lost or given twice.

    Args:
        dataset: takes the sampler's keys.
        sampler: which samples make up which batch.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: put batches where a GPU can fetch them from.
        warn: takes a line for the user.
    """

    def __init__(
        self,
        dataset: ImageFiles,
        sampler: StepSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        warn: Callable[[str], object] = _logger.warning,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.warn = warn
        self._new_dataloader = partial(
            DataLoader,
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own, because each epoch draws a number from it that is of no use here.
            generator=torch.Generator(),
        )
        self._dataloader = self._new_dataloader()
        self._workers: list[multiprocessing.Process] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple]:
        """Yield what `collate` made of each micro-batch from `start_step` on.

        Raises:
            TrainingError: too many workers were lost, or a sample was given up.
        """
        delivered = lost = 0
        batches = None
        while True:
            try:
                if batches is None:
                    self.sampler.set_epoch(epoch, start_step, delivered)
                    batches = self._start()
                batch = next(batches, None)
            except TrainingError as error:
                # torch puts the worker's stack before the message.
                raise TrainingError(str(error).rsplit("TrainingError: ")[-1].strip()) from error
            except Exception as error:
                if not self._lost_worker():
                    raise
                lost += 1
                self._report_lost_worker(lost, error)
                self._dataloader, batches = self._new_dataloader(), None
                continue
            if batch is None:
                return
            delivered += 1
            yield batch

    def _start(self) -> Iterator[tuple]:
        batches = iter(self._dataloader)
        if self._dataloader.num_workers > 0:
            self._workers = batches._workers
            _let_only_fetching_raise()
        return batches

    def _lost_worker(self) -> bool:
        """Whether a worker has ended. An error can be seen a moment before its cause."""
        sentinels = [worker.sentinel for worker in self._workers]
        return bool(sentinels and multiprocessing.connection.wait(sentinels, timeout=1))

    def _report_lost_worker(self, lost: int, error: Exception) -> None:
        if lost > MAX_LOST_WORKERS:
            raise TrainingError(
                f"{lost} data workers were lost in this epoch, probably for want of memory "
                f"or of shared memory (/dev/shm): lower --num_workers, or give the job more memory"
            ) from error
        self.warn(
            "a data worker was killed or crashed: starting the workers again, no image is lost"
        )


def _let_only_fetching_raise() -> None:
    """Remove the signal handler by which torch reports a lost worker.

    It raises wherever the main thread happens to be, in an optimizer step, say. Without it the
    loss is noticed, within seconds, when the worker's batch is waited for.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def channel_stats(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for values in [0, 1]: ImageNet's.

    Raises:
        UsageError: a number of channels other than 1, 3 or 4.
    """
    _channel_mode(in_chans)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if in_chans == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    alpha = (0.5,) * (in_chans - 3)
    return mean + alpha, std + alpha


def pretrain_transform(
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.2, 1.0),
) -> Callable[[Image.Image], Tensor]:
    """The augmentation of pretraining: random resized crop and flip, then normalise.

    Args:
        img_size: (H, W).
        in_chans: channels of the images.
        hflip: mirror every second image; not for digits, letters or the like.
        scale: share of the image's area that a crop takes.

    Returns:
        PIL image to `[in_chans, H, W]`, float32.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(img_size, scale=scale, interpolation=bicubic, antialias=True)
    flip = [v2.RandomHorizontalFlip()] if hflip else []
    return v2.Compose([crop, *flip, *_to_normalized(in_chans)])


def eval_transform(img_size: tuple[int, int], in_chans: int = 3) -> Callable[[Image.Image], Tensor]:
    """The largest centred part of the proportions H : W, resized to (H, W) and normalised.

    Returns:
        PIL image to `[in_chans, H, W]`, float32.
    """
    height, width = img_size
    fit = partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BICUBIC)
    return v2.Compose([fit, *_to_normalized(in_chans)])


def _to_normalized(in_chans: int) -> list[torch.nn.Module]:
    """The end of every transform: PIL image to a plain, normalised tensor."""
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*channel_stats(in_chans)),
        v2.ToPureTensor(),
    ]


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalisation, for viewing: `[…, C, H, W]` to the same shape within [0, 1]."""
    mean, std = (
        images.new_tensor(values).view(-1, 1, 1) for values in channel_stats(images.shape[-3])
    )
    return (images * std + mean).clamp(0, 1)
