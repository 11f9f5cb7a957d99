"""The pictures of the proof: a part of ImageNet's layout as links, and CIFAR-10 in that layout."""

import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchvision.datasets import CIFAR10

from util.data.folders import ImageFolder
from util.errors import UsageError

# Share of the training pictures of each class that `--tune` holds out.
HELD_OUT = 0.1


def write_cifar10(source: Path, folder: Path) -> None:
    """Write torchvision's CIFAR-10 as `folder/train/<class>/NNNNN.png` and `folder/val/…`.

    Args:
        source: the folder that torchvision keeps it in; fetched where it is not there.
        folder: a new one.

    Raises:
        UsageError: it is not there and cannot be fetched, or is damaged.
    """
    half = folder.with_name(folder.name + ".part")  # a kill leaves no half of it under the name
    shutil.rmtree(half, ignore_errors=True)
    for split in ("train", "val"):
        try:
            dataset = CIFAR10(source, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"--cifar10 {source}: torchvision's CIFAR-10 is not there and cannot be fetched "
                f"({error}): put cifar-10-batches-py there, or give --data_path alone"
            ) from error
        for number, (image, label) in enumerate(dataset):
            path = half / split / dataset.classes[label] / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    half.rename(folder)


def read_split(root: Path) -> dict[str, list[str]]:
    """Paths of a split's pictures by class, in a random order that is always the same.

    Raises:
        UsageError: no such folder, or not a folder a class.
    """
    files = ImageFolder(root)
    classes, labels = files.read_classes()
    found = {name: [] for name in classes}
    for index, label in enumerate(labels):
        found[classes[label]].append(files.path(index))
    for name, paths in found.items():
        random.Random(name).shuffle(paths)
        if not paths:
            raise UsageError(f"{root}: no image in {name}: fill or remove the folder")
    return found


def first(classes: Mapping[str, list[str]], count: int | None) -> dict[str, list[str]]:
    """The first pictures of each class, `count` in all; None for all.

    As many of each as there are, and at least one.
    """
    if count is None:
        return dict(classes)
    turns = sorted((turn, name) for name, paths in classes.items() for turn in range(len(paths)))
    taken = Counter(name for _, name in turns[: max(count, len(classes))])
    return {name: paths[: taken[name]] for name, paths in classes.items()}


def count(classes: Mapping[str, Sequence[str]]) -> int:
    """Number of pictures."""
    return sum(map(len, classes.values()))


def link(classes: Mapping[str, Sequence[str]], root: Path, folder: Path) -> None:
    """Make a folder of class folders that hold links to the pictures below `root`."""
    for name, paths in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            # Pictures of several folders of a class may have one name.
            target = folder / name / "_".join(Path(path).relative_to(root / name).parts)
            if not target.is_symlink():
                target.symlink_to(path)


def prepare(
    source: Path,
    folder: Path,
    images: int | None,
    test_images: int | None,
    shares: Sequence[float],
    tune: bool,
) -> dict[str, int]:
    """Lay out the pictures of a proof: `all`, and one folder for each share of the labels.

    Each has `train/` and `val/` with links, so that every program of the repository takes it. A
    smaller share is part of each larger one.

    Args:
        source: ImageNet's layout.
        folder: gets the folders.
        images: training pictures in all; None for all that are there.
        test_images: pictures to judge by; None for all.
        shares: of the labels, in percent.
        tune: judge by training pictures, which are then held out of all training.

    Returns:
        The number of training pictures in each folder, and of those to judge by, as "test".

    Raises:
        UsageError: folders that are missing or differ in their classes.
    """
    roots = {split: (source / split).absolute() for split in ("train", "val")}
    train = read_split(roots["train"])
    if tune:
        roots["val"] = roots["train"]
        ends = {name: max(1, round(len(paths) * HELD_OUT)) for name, paths in train.items()}
        test = first({name: paths[: ends[name]] for name, paths in train.items()}, test_images)
        train = {name: paths[ends[name] :] for name, paths in train.items()}
    else:
        test = first(read_split(roots["val"]), test_images)
    if train.keys() != test.keys():
        raise UsageError(f"--data_path {source}: train/ and val/ do not have the same classes")
    if not all(train.values()):
        raise UsageError(f"--data_path {source}: --tune takes at least two pictures of each class")
    train = first(train, images)
    counts = {"test": count(test)}
    for name, share in {"all": 100.0, **{f"labels-{share:g}": share for share in shares}}.items():
        part = first(train, max(1, round(count(train) * share / 100)))
        link(part, roots["train"], folder / name / "train")
        counts[name] = count(part)
        if name == "all":
            link(test, roots["val"], folder / name / "val")
        elif not (val := folder / name / "val").exists():
            val.symlink_to(Path("..") / "all/val")
    return counts
