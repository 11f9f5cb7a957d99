"""Which videos there are and what they show: lists, annotations, folders."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.data.classes import some
from util.data.folders import find_train_folder, walk
from util.data.images import IMAGE_EXTENSIONS
from util.errors import UsageError
from VideoConvMAE.decode import VIDEO_EXTENSIONS

LIST_EXTENSIONS = (".csv", ".txt", ".json")
# `path label`, `path,label`, `path frames label`; a path may have blanks in it.
_LINE = re.compile(r"(?P<path>.+?)[,\s]+(?:(?P<frames>-?\d+)[,\s]+)?(?P<label>-?\d+)")


@dataclass(frozen=True)
class VideoList:
    """Videos of one split.

    Attributes:
        source: the list or folder they come from.
        paths: files, or folders of pictures.
        labels: names of their classes; empty if not known.
        missing: how many more an annotation names that are not there.
        numbered: whether the labels are the outputs' numbers, not names.
    """

    source: Path
    paths: list[str]
    labels: list[str]
    missing: int = 0
    numbered: bool = False

    @property
    def classes(self) -> list[str]:
        """Sorted names of the classes that occur; of numbers all from 0 to the highest."""
        if self.numbered and self.labels:
            return [str(i) for i in range(max(map(int, self.labels)) + 1)]
        return sorted(set(self.labels))


def find_videos(source: Path, root: Path | None = None) -> VideoList:
    """The videos of a list, an annotation or a folder.

    Args:
        source: a folder, nested or flat, whose first level are the classes if there are any; or a
            file: lines of `path label` or `path,label`, Kinetics' csv, Something-Something's json.
        root: what the list's paths are relative to; the list's own folder if None.

    Raises:
        UsageError: nothing there, or nothing in it.
    """
    if source.is_dir():
        return _from_folder(source)
    if not source.is_file():
        raise UsageError(f"{source} does not exist: give a folder of videos or a list of them")
    root = root or source.parent
    if not root.is_dir():
        raise UsageError(f"--video_root {root} is not a folder")
    read = _from_json if source.suffix == ".json" else _from_lines
    try:
        found = read(source, root)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{source} is no list of videos: {error!r}") from error
    if not found.paths:
        raise UsageError(
            f"{source} names {found.missing} videos, and none of them is below {root}: set "
            f"--video_root to the folder that holds them"
        )
    return found


def find_split(data_path: Path, names: Sequence[str], root: Path | None) -> VideoList:
    """One split of a data set: a folder or a list of that name.

    Args:
        data_path: the folder that holds it.
        names: of the split, the first that is there counts, such as "val", "validation".
        root: see `find_videos`.

    Raises:
        UsageError: there is none.
    """
    endings = ("", *LIST_EXTENSIONS)
    for path in (data_path / f"{name}{ending}" for name in names for ending in endings):
        if path.exists():
            return find_videos(path, root)
    wanted = ", ".join(names[0] + (ending or "/") for ending in endings)
    raise UsageError(f"--data_path {data_path} has none of {wanted}")


def find_unlabeled(data_path: Path, root: Path | None) -> VideoList:
    """The videos to pretrain on: a list, or a folder's train split or whole.

    Raises:
        UsageError: nothing there.
    """
    if data_path.is_dir() and find_train_folder(data_path) == data_path:
        lists = [data_path / f"train{ending}" for ending in LIST_EXTENSIONS]
        data_path = next((path for path in lists if path.exists()), data_path)
    return find_videos(find_train_folder(data_path), root)


def _from_folder(folder: Path) -> VideoList:
    """Every video file, and every folder that holds pictures."""
    paths = []
    for place, files in walk(folder):
        paths += [os.path.join(place, f) for f in files if f.lower().endswith(VIDEO_EXTENSIONS)]
        if any(name.lower().endswith(IMAGE_EXTENSIONS) for name in files):
            paths.append(place)
    if not paths:
        raise UsageError(
            f"no video below {folder}: looked for {', '.join(VIDEO_EXTENSIONS)} and for folders "
            f"of pictures"
        )
    paths.sort()
    classes = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    labeled = all(len(parts) > 1 for parts in classes)
    return VideoList(folder, paths, [parts[0] for parts in classes] if labeled else [])


def _from_lines(source: Path, root: Path) -> VideoList:
    """A list of lines, or Kinetics' annotation, which has a head."""
    with open(source, newline="", encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    if lines and "youtube_id" in lines[0]:
        return _from_kinetics(source, root, csv.DictReader(lines))
    matches = [_LINE.fullmatch(line) for line in lines]
    wrong = next((line for line, match in zip(lines, matches, strict=True) if not match), None)
    if wrong is not None:
        raise UsageError(f"{source}: a line is `path label` or `path,label`, not {wrong!r}")
    paths = [os.path.join(root, match["path"]) for match in matches]
    # All of a large list would take minutes on a network's file system.
    if not any(os.path.exists(path) for path in paths[:100]):
        return VideoList(source, [], [], len(paths))
    labels = [str(int(match["label"])) for match in matches]
    known = all(not label.startswith("-") for label in labels)
    return VideoList(source, paths, labels if known else [], numbered=True)


def _from_kinetics(source: Path, root: Path, rows: csv.DictReader) -> VideoList:
    """Kinetics' csv: the label, and the YouTube number and the seconds that name the file."""

    def names(row: Mapping[str, str]) -> Iterator[str]:
        times = (int(float(row[name])) for name in ("time_start", "time_end"))
        yield "_".join([row["youtube_id"], *(f"{time:06d}" for time in times)])
        yield row["youtube_id"]

    return _named(source, root, rows, names, lambda row: row["label"])


def _from_json(source: Path, root: Path) -> VideoList:
    """Something-Something's json: the number that names the file, and the label's template."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    return _named(
        source,
        root,
        rows,
        lambda row: [str(row["id"])],
        lambda row: re.sub(r"[\[\]]", "", row["template"]),
    )


def _named(
    source: Path,
    root: Path,
    rows: Iterator[Mapping[str, str]],
    names: Callable[[Mapping[str, str]], Iterator[str]],
    label: Callable[[Mapping[str, str]], str],
) -> VideoList:
    """Rows that name videos without their folder and ending; they are looked for below `root`."""
    there = {Path(path).stem: path for path in _from_folder(root).paths}
    paths, labels, missing = [], [], 0
    for row in rows:
        path = next((there[name] for name in names(row) if name in there), None)
        if path is None:
            missing += 1
        else:
            paths.append(path)
            labels.append(label(row))
    return VideoList(source, paths, labels, missing)


def class_numbers(videos: VideoList, classes: Sequence[str]) -> list[int]:
    """The labels as places in a list of classes.

    Raises:
        UsageError: no labels, or some that are no such class.
    """
    if not videos.labels:
        raise UsageError(
            f"{videos.source} has no labels: give a list with them, or a folder for each class"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    foreign = sorted(set(videos.labels) - numbers.keys())
    if foreign:
        raise UsageError(
            f"{videos.source} has {some(foreign)}, which is none of the {len(classes)} classes"
        )
    return [numbers[name] for name in videos.labels]
