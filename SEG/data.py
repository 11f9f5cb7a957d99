"""Images and masks: any picture file, any number of classes, and what is wrong said clearly."""

import colorsys
import inspect
import os
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS
from mmseg.utils import get_classes, get_palette

from SEG.masks import IGNORED, MOST_CLASSES, ignored_numbers, load_mask
from util.data.classes import some
from util.data.folders import describe, kind_of, scan, walk
from util.data.images import load_image
from util.errors import UsageError
from util.run.distributed import print_once


def class_names(classes: int | str | Sequence[str], zero_ignored: bool | None = None) -> list[str]:
    """The names of classes.

    Args:
        classes: how many there are, a text file with a name a line, a data set that MMSegmentation
            knows (such as "ade20k"), or the names themselves.
        zero_ignored: whether masks are read with 0 ignored, to compare with what is known of the
            data set; None: not compared.

    Raises:
        UsageError: a file that cannot be read, no class, more than masks can hold, a name twice,
            or masks that would be read otherwise than the named data set's are written.
    """
    if isinstance(classes, int):
        _check_count(classes)
        names = [f"class {i}" for i in range(classes)]
    elif not isinstance(classes, str):
        names = [str(name) for name in classes]
    elif os.path.isfile(classes):
        try:
            lines = Path(classes).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"classes {classes} cannot be read as text: {error}") from error
        names = [name for line in lines if (name := line.strip())]
    else:
        try:
            names = list(get_classes(classes))
        except ValueError:
            raise UsageError(
                f"classes {classes!r}: give their number, or a text file with a name a line"
            ) from None
        if zero_ignored is not None:
            _check_known_set(classes, names, zero_ignored)
    _check_count(len(names))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"classes with one name cannot be told apart: {some(twice)}")
    return names


def _check_count(count: int) -> None:
    if not 2 <= count <= MOST_CLASSES:
        raise UsageError(f"{count} classes: there must be between 2 and {MOST_CLASSES}")


def _check_known_set(name: str, names: Sequence[str], zero_ignored: bool) -> None:
    """Compare with how MMSegmentation's own data sets of these classes read their masks."""
    every = DATASETS.module_dict.values()
    sets = [s for s in every if getattr(s, "METAINFO", {}).get("classes") == tuple(names)]
    written = {_ignores_zero(s) for s in sets}
    if not written or zero_ignored in written:
        return
    first = int(not zero_ignored)
    raise UsageError(
        f"in the masks of {name} classes are {first} … {len(names) + first - 1}"
        + (" and 0 is ignored: add --ignore-zero" if first else ": leave --ignore-zero away")
        + "; if yours are others, give the names in a text file"
    )


def _ignores_zero(dataset: type) -> bool:
    parameter = inspect.signature(dataset).parameters.get("reduce_zero_label")
    return parameter is not None and parameter.default is True


def class_colours(names: Sequence[str]) -> list[list[int]]:
    """A colour `[r, g, b]` for each class: ADE20K's own for its classes, else hues far apart.

    The same number of classes always has the same colours; one named "background" is dark.
    """
    if list(names) == get_classes("ade20k"):
        return get_palette("ade20k")
    # Steps of the golden ratio keep neighbouring hues apart, however many there are.
    hues = [(i * 0.618034 % 1, 1 - i % 3 * 0.25, 1 - i % 2 * 0.2) for i in range(len(names))]
    colours = [[round(255 * c) for c in colorsys.hsv_to_rgb(*hue)] for hue in hues]
    return [[32, 32, 32] if n == "background" else c for n, c in zip(names, colours, strict=True)]


@DATASETS.register_module()
class ImagesAndMasks(BaseSegDataset):
    """Two folders alike: images of any format in one, a PNG mask for each in the other.

    The mask of `a/b.jpg` is `a/b.png`. A pixel of a mask is the number of its class: classes are
    0 … N - 1 without the numbers that are ignored, of which 255 always is one.

    Args:
        classes: their names, a file of them, or how many there are.
        data_root: what `ann_file` and the folders of `data_prefix` (`img_path`, `seg_map_path`)
            are relative to.
        ignored: numbers in the masks that mean no class, beside 255.
        reduce_zero_label: 0 is one, as in ADE20K.
        ann_file: a text file with the images to take, a name without its ending a line, as Pascal
            VOC has it; all of them if it is empty.
        img_suffix: how the names of images end; those of any picture if it is empty.
        seg_map_suffix: how the name of a mask ends, in place of the image's `img_suffix`.
        **kwargs: the rest of `BaseSegDataset`'s arguments.

    Raises:
        UsageError: no image, images without a mask or two with one mask; a list that cannot be
            read or names what is not there.
    """

    def __init__(
        self,
        classes: int | str | Sequence[str],
        ignored: Sequence[int] = (),
        img_suffix: str = "",
        **kwargs,
    ) -> None:
        names = class_names(classes, kwargs.get("reduce_zero_label", False))
        ignored = [ignored] if isinstance(ignored, int) else ignored
        if not all(type(number) is int and number >= 0 for number in ignored):
            raise UsageError(f"ignored={ignored} must be whole numbers from 0 on")
        if kwargs.get("ignore_index", IGNORED) != IGNORED:
            raise UsageError(
                f"ignore_index={kwargs['ignore_index']}: give ignored=[{kwargs['ignore_index']}], "
                f"or --ignore on the command line"
            )
        self.ignored = ignored_numbers({**kwargs, "ignored": ignored})
        others = [number for number in self.ignored if number]  # 0 is in reduce_zero_label
        meta = dict(classes=names, palette=class_colours(names), ignored=others)
        super().__init__(metainfo=meta, img_suffix=img_suffix, **kwargs)

    def _name(self, image: Path, folder: Path) -> str:
        """The name that an image and its mask share: the place below a folder, without ending."""
        name = str(image.relative_to(folder))
        return name.removesuffix(self.img_suffix or image.suffix)

    def load_data_list(self) -> list[dict]:
        """Each image with its mask and what is needed to read it."""
        images, masks = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        files, left_out = scan(images)
        ours = [file for file in files if file.endswith(self.img_suffix)]
        if len(ours) < len(files):
            left_out["ending otherwise"] += len(files) - len(ours)
        names = {image: self._name(image, images) for image in map(Path, ours)}
        if self.ann_file:
            names = _listed(Path(self.ann_file), names)
        pairs: dict[Path, Path] = {}
        missing = []
        for image, name in names.items():
            mask = masks / f"{name}{self.seg_map_suffix}"
            if not mask.is_file():
                missing.append((image, mask))
            if (other := pairs.setdefault(mask, image)) != image:
                raise UsageError(f"{other} and {image} would have one mask, {mask}: rename one")
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(names)} images have no mask: {missing[0][0]} needs "
                f"{missing[0][1]}"
            )
        _tell_left_out(images, left_out)
        if not self.ann_file:  # the others are of the images that are not listed
            _tell_left_out(masks, _other_files(masks, pairs))
        shared = {"num_classes": len(self.metainfo["classes"]), "ignored": self.ignored}
        return [
            {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], **shared}
            for mask, image in pairs.items()
        ]


def _listed(path: Path, names: Mapping[Path, str]) -> dict[Path, str]:
    """The images that a text file lists by their names, in its order.

    Raises:
        UsageError: a list that cannot be read, is empty or names what is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of images {path} cannot be read: {error}") from error
    wanted = dict.fromkeys(name for line in lines if (name := line.strip()))
    images = {name: image for image, name in names.items()}
    absent = [name for name in wanted if name not in images]
    if absent or not wanted:
        what = f"{len(absent)} images that are not there: {some(absent)}" if absent else "no image"
        raise UsageError(f"the list {path} names {what} (a name without its ending a line)")
    return {images[name]: name for name in wanted}


def _other_files(masks: Path, wanted: Container[Path]) -> Counter[str]:
    """Numbers of the files of a folder that are no image's mask, by their kinds."""
    others: Counter[str] = Counter()
    for folder, names in walk(masks, others):
        for name in names:
            if Path(folder, name) not in wanted:
                others["without an image" if name.endswith(".png") else kind_of(name)] += 1
    return others


@cache
def _tell_once(line: str) -> None:
    print_once(line)


def _tell_left_out(folder: Path, left_out: Counter[str]) -> None:
    if left_out:
        _tell_once(f"note: files of {folder} are left out: {describe(left_out)}")


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Read any image file as a viewer shows it: upright, 8 bits, transparency over white.

    Adds `img` `[H, W, 3]` (uint8, BGR as MMSegmentation expects it), `img_shape` and `ori_shape`.

    Args:
        skip_bad: leave out a file that cannot be decoded, and name it; another takes its place.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self._bad: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """Read `results["img_path"]`."""
        path = results["img_path"]
        try:
            image = np.asarray(load_image(path))
        except OSError as error:
            if not self.skip_bad:
                raise UsageError(str(error)) from error
            if path not in self._bad:
                self._bad.add(path)
                print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None
        results["img"] = np.ascontiguousarray(image[..., ::-1])
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadMask(BaseTransform):
    """Read the mask of an image of `ImagesAndMasks` and check it.

    Adds `gt_seg_map` `[H, W]`, uint8: the class, or 255 where ignored.
    """

    def transform(self, results: dict) -> dict:
        """Read `results["seg_map_path"]`."""
        results["gt_seg_map"] = load_mask(results, results["ori_shape"])
        results["seg_fields"].append("gt_seg_map")
        return results
