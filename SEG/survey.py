"""All masks of a data set read once, before hours are spent on them: what fits, what is there."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from SEG.data import ImagesAndMasks
from SEG.masks import IGNORED, class_numbers, image_size, load_mask, show_ignored
from util.data.classes import some
from util.data.images import load_image
from util.errors import UsageError
from util.run.distributed import gather_objects, is_main_process, print_once, rank, world_size


@dataclass(frozen=True)
class Survey:
    """Masks that were read.

    Attributes:
        what: what they are for: "training", "validation" or "testing".
        classes: the names of the classes.
        pixels: `[classes + 1]`, pixels of each class, then the ignored ones.
        masks: `[classes]`, masks that have a pixel of a class.
        empty: masks whose pixels are all ignored.
        ignored: numbers that mean no class, beside 255.
        errors: one line for each mask, or image to be tested, that cannot be used.
    """

    what: str
    classes: list[str]
    pixels: np.ndarray
    masks: np.ndarray
    empty: list[str]
    ignored: tuple[int, ...]
    errors: list[str]

    @property
    def absent(self) -> list[str]:
        """The classes without a pixel."""
        return [name for name, count in zip(self.classes, self.pixels, strict=False) if not count]

    def notes(self) -> list[str]:
        """Sentences on what is odd, though it can be used."""
        notes = []
        if self.empty:
            notes.append(
                f"{len(self.empty)} masks for {self.what} have ignored pixels alone, such as "
                f"{self.empty[0]}"
            )
        if self.absent:
            effect = (
                "nothing is learned of them"
                if self.what == "training"
                else "the mean over classes (mIoU) is not defined"
            )
            if self.what == "validation":
                effect += ", and chooses no best checkpoint"
            notes.append(
                f"{len(self.absent)} of {len(self.classes)} classes have no pixel in the masks for "
                f"{self.what} ({some(self.absent, 20)}): {effect}{self._hint()}"
            )
        return notes

    def summary(self) -> str:
        """One line: how many classes there are, and how much is ignored."""
        ignored = self.pixels[-1] / max(int(self.pixels.sum()), 1)
        return (
            f"masks for {self.what}: {len(self.classes) - len(self.absent)} of "
            f"{len(self.classes)} classes, {ignored:.0%} of the pixels ignored"
        )

    def check(self) -> None:
        """Refuse masks that cannot be used.

        Raises:
            UsageError: masks that cannot be read or do not fit, or of fewer than two classes.
        """
        if self.errors:
            more = len(self.errors) - 1
            rest = f" (and {more} more, which python -m SEG.check names)" if more else ""
            raise UsageError(self.errors[0] + rest)
        if self.what == "training" and len(self.classes) - len(self.absent) < 2:
            there = [name for name in self.classes if name not in self.absent]
            found = f"no class but {there[0]}" if there else "ignored pixels alone"
            raise UsageError(f"the masks for training hold {found}{self._hint()}")

    def _hint(self) -> str:
        """Advice where 255 seems to mean a class."""
        if len(self.classes) != 2 or not self.absent or not self.pixels[-1]:
            return ""
        first, second = class_numbers(2, self.ignored)
        return (
            f"; {show_ignored(self.ignored)}: if 255 means a class, write the classes as {first} "
            f"and {second}"
        )


def check_data(loaders: Mapping[str, dict]) -> None:
    """Read all masks of data loaders' data sets, and say what is odd.

    Args:
        loaders: as `read_masks` takes them.

    Raises:
        UsageError: see `Survey.check`.
    """
    surveys = read_masks(loaders)
    for found in surveys:
        found.check()
    for found in surveys:
        print_once("\n".join([found.summary(), *(f"note: {note}" for note in found.notes())]))


def read_masks(loaders: Mapping[str, dict]) -> list[Survey]:
    """Read all masks of data loaders' data sets, each process its share.

    Data sets of other kinds than `ImagesAndMasks` are passed over, and named.

    Args:
        loaders: configs of data loaders by what they are for: "training", "validation" or
            "testing". Images of the latter two are decoded, as a damaged one ends a validation.

    Raises:
        UsageError: data sets that cannot be built.
    """
    init_default_scope("mmseg")
    surveys = []
    for what, loader in loaders.items():
        dataset = DATASETS.build(loader["dataset"])
        if not isinstance(dataset, ImagesAndMasks):
            print_once(f"note: the data for {what} are not checked: {type(dataset).__name__}")
            continue
        surveys.append(survey(dataset, what, loader.get("num_workers", 0)))
    return surveys


def survey(dataset: ImagesAndMasks, what: str, num_workers: int = 0) -> Survey:
    """Read the masks of a data set, each process its share; all get the whole result.

    Args:
        dataset: images and masks.
        what: what they are for; images but for "training" are decoded.
        num_workers: processes that read beside this one.
    """
    dataset.full_init()
    classes = dataset.metainfo["classes"]
    pixels = np.zeros(len(classes) + 1, np.int64)
    masks, empty, errors = np.zeros(len(classes), np.int64), [], []
    own = _Masks(dataset, range(rank(), len(dataset), world_size()), what != "training")
    rows = DataLoader(
        own, batch_size=None, num_workers=min(num_workers, len(own)), collate_fn=_as_it_is
    )
    title = f"masks for {what}"
    shown = tqdm(rows, title, leave=False, disable=None if is_main_process() else True)
    for path, counts, error in shown:
        if error:
            errors.append(error)
            continue
        pixels += counts
        masks += counts[:-1] > 0
        if not counts[:-1].any():
            empty.append(path)
    parts = gather_objects((pixels, masks, empty, errors))
    return Survey(
        what,
        list(classes),
        sum(part[0] for part in parts),
        sum(part[1] for part in parts),
        sorted(path for part in parts for path in part[2]),
        dataset.ignored,
        sorted(error for part in parts for error in part[3]),
    )


def _as_it_is(row: tuple) -> tuple:
    return row


class _Masks(Dataset):
    """Path, pixels of each class and the ignored ones, and what is wrong, of each mask."""

    def __init__(self, dataset: ImagesAndMasks, indices: range, decode_images: bool) -> None:
        self.dataset, self.indices, self.decode_images = dataset, indices, decode_images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, str]:
        sample = self.dataset.get_data_info(self.indices[index])
        counts = np.zeros(sample["num_classes"] + 1, np.int64)
        try:
            size = self._image_size(sample["img_path"])
            classes = np.bincount(load_mask(sample, size).ravel(), minlength=IGNORED + 1)
            counts[:-1], counts[-1] = classes[: len(counts) - 1], classes[IGNORED]
        except UsageError as error:
            return sample["seg_map_path"], counts, str(error)
        return sample["seg_map_path"], counts, ""

    def _image_size(self, path: str) -> tuple[int, int] | None:
        """Height and width; None for a damaged image to train on, which training leaves out."""
        try:
            return load_image(path).size[::-1] if self.decode_images else image_size(path)
        except OSError as error:
            if self.decode_images:
                raise UsageError(str(error)) from error
            return None
