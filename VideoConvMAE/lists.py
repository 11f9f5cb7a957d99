"""Videos and their labels from lists, annotations and splits."""

import codecs
import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from util.data.classes import some
from util.data.files import read_file, reason_of
from util.data.folders import find_train_folder
from util.errors import UsageError
from VideoConvMAE.decode import VIDEO_EXTENSIONS
from VideoConvMAE.folders import VideoList, list_folder

LIST_EXTENSIONS = (".csv", ".txt", ".json")
TEST_SPLIT = ("val", "validation", "test")
_SPLIT_ENDINGS = ("", *LIST_EXTENSIONS)
# Heads of columns, in small letters.
_PATH_HEADS = ("path", "video_path", "file_path", "filepath", "file", "filename", "video", "name")
_LABEL_HEADS = ("label", "class", "target", "category", "class_name", "label_name", "action")
# All of a large list would take minutes on a network's file system.
_LOOKED_FOR = 100
_WHOLE_NUMBER = re.compile(r"-?\d+")
_WHOLE_FLOAT = re.compile(r"-?\d+\.0*")


def find_videos(source: Path, root: Path | None = None) -> VideoList:
    """The videos of a list, an annotation or a folder.

    Args:
        source: a folder, nested or flat, whose first level are the classes if there are any; a
            file: lines of a path, with a label or without, Kinetics' csv, Something-Something's
            json; or one video.
        root: what the list's paths are relative to; the list's own folder if None.

    Raises:
        UsageError: nothing there, or nothing in it.
    """
    if source.is_dir():
        return list_folder(source)
    if source.is_file() and source.suffix.lower() in VIDEO_EXTENSIONS:
        return VideoList(source, [str(source)], [])
    text = _read_text(source)
    root = root or source.parent
    if not root.is_dir():
        raise UsageError(f"--video_root {root} is not a folder")
    read = _from_json if source.suffix == ".json" else _from_lines
    try:
        return read(source, root, text)
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{source} is no list of videos: {reason}") from error


def _read_text(source: Path) -> str:
    """A list's text: UTF-8 or, with its mark, UTF-16; names may hold any other bytes.

    Raises:
        UsageError: no such file, none that can be read, or no text.
    """
    try:
        data = read_file(source).read()
    except FileNotFoundError as error:
        raise UsageError(
            f"{source} does not exist: give a folder of videos or a list of them"
        ) from error
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {reason_of(error, str(source))}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise UsageError(f"{source} is no list of videos: it is no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find_split(data_path: Path, names: Sequence[str], root: Path | None) -> VideoList:
    """One split of a data set: a folder or a list of that name.

    Args:
        data_path: the folder that holds it.
        names: of the split, the first that is there counts, such as "val", "validation".
        root: what a list's paths are relative to; the list's own folder if None.

    Raises:
        UsageError: there is none.
    """
    path = find_path(data_path, names)
    if path is None:
        wanted = ", ".join(names[0] + (ending or "/") for ending in _SPLIT_ENDINGS)
        raise UsageError(f"--data_path {data_path} has none of {wanted}")
    return find_videos(path, root)


def find_path(data_path: Path | None, names: Sequence[str]) -> Path | None:
    """The folder or list of a split, if there is one; see `find_split`."""
    paths = (Path(data_path or ".") / f"{name}{end}" for name in names for end in _SPLIT_ENDINGS)
    return next((path for path in paths if path.exists()), None) if data_path else None


def find_unlabeled(data_path: Path, root: Path | None) -> VideoList:
    """The videos to pretrain on: a list, or a folder's train split or whole.

    Raises:
        UsageError: nothing there.
    """
    if data_path.is_dir() and find_train_folder(data_path) == data_path:
        lists = [data_path / f"train{ending}" for ending in LIST_EXTENSIONS]
        data_path = next((path for path in lists if path.exists()), data_path)
    return find_videos(find_train_folder(data_path), root)


# --- lists ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Style:
    """Format of the lines of a list.

    Attributes:
        delimiter: between fields; " " is any white space, "" none at all: a line is a path.
        after: fields after the path; the last is the label, one before it a number of frames.
    """

    delimiter: str
    after: int

    def split(self, line: str) -> list[str] | None:
        """The path and what is after it; None for a line that cannot be read so."""
        if '"' in line:
            delimiter = self.delimiter or "\x1f"
            fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
            end = len(fields) - self.after
            parts = [delimiter.join(fields[:end]), *fields[end:]]
        elif self.after:
            parts = line.rsplit(None if self.delimiter == " " else self.delimiter, self.after)
        else:
            parts = [line]
        parts = [part.strip() for part in parts]
        if len(parts) != 1 + self.after or not all(parts):
            return None
        return None if self.after == 2 and not _WHOLE_NUMBER.fullmatch(parts[1]) else parts

    def __str__(self) -> str:
        delimiter = {"\t": "<tab>", "": ""}.get(self.delimiter, self.delimiter)
        return f"`{delimiter.join(['path', 'frames', 'label'][:: 3 - self.after or 1])}`"


_STYLES = [_Style("", 0), *(_Style(d, n) for n, d in product((1, 2), ("\t", ",", ";", " ")))]


def _from_lines(source: Path, root: Path, text: str) -> VideoList:
    """A list of lines; or a table with a head, Kinetics' annotation among them."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{source} is empty: a line is `path label`, `path,label` or a path")
    delimiter = next((d for d in ("\t", ";", ",") if d in lines[0]), " ")
    head = next(csv.reader([lines[0].lower()], delimiter=delimiter, skipinitialspace=True))
    if "youtube_id" in head:
        rows = csv.DictReader([",".join(head), *lines[1:]], skipinitialspace=True)
        return _named(source, root, rows, _kinetics_names, "label")
    column = next((head.index(name) for name in _PATH_HEADS if name in head), None)
    if column is not None and not _is_there(root, lines[0]):
        return _from_table(source, root, lines, delimiter, column, head)
    return _from_plain_lines(source, root, lines)


def _from_table(
    source: Path, root: Path, lines: Sequence[str], delimiter: str, column: int, head: Sequence[str]
) -> VideoList:
    """Rows under a head that names the columns of paths and of labels."""
    rows = list(csv.reader(lines[1:], delimiter=delimiter, skipinitialspace=True, strict=True))
    label = next((head.index(name) for name in _LABEL_HEADS if name in head), None)
    for row in rows:
        if len(row) != len(head):
            raise UsageError(
                f"{source}: the head names {len(head)} columns, {delimiter.join(row)!r} has "
                f"{len(row)}"
            )
    labels = [] if label is None else [row[label].strip() for row in rows]
    return _listed(source, root, [row[column].strip() for row in rows], labels)


def _from_plain_lines(source: Path, root: Path, lines: Sequence[str]) -> VideoList:
    """Lines without a head, all read in the way that finds the most videos."""
    sample = lines[:_LOOKED_FOR]

    def found(style: _Style) -> int:
        parts = (style.split(line) for line in sample)
        return sum(_is_there(root, part[0]) for part in parts if part)

    hits = {style: found(style) for style in _STYLES}
    style = max(_STYLES, key=hits.get)
    if not hits[style]:
        raise UsageError(
            f"{source} names {len(lines)} videos, and none of the first {len(sample)} is below "
            f"{root} (first line: {lines[0][:200]!r}): a line is `path label`, `path,label` or a "
            f"path; set --video_root to the folder that holds them"
        )
    parts = [style.split(line) for line in lines]
    notes = ()
    if style.after and len(lines) > 1 and _is_head(root, parts[0], parts[1:]):
        lines, parts = lines[1:], parts[1:]
        notes = (f"the first line of {source} names no video: taken for a head",)
    wrong = next((i for i, part in enumerate(parts) if part is None), None)
    if wrong is not None:
        raise UsageError(f"{source}: a line is {style}, not {lines[wrong][:200]!r}")
    labels = [part[-1] for part in parts] if style.after else []
    listed = _listed(source, root, [part[0] for part in parts], labels)
    return replace(listed, notes=(*notes, *listed.notes))


def _is_there(root: Path, path: str) -> bool:
    """A list's path, relative to `root`, is a file or folder."""
    try:
        return os.path.exists(os.path.join(root, path))
    except ValueError:  # a path with a zero byte
        return False


def _is_head(root: Path, first: list[str] | None, others: Sequence[list[str] | None]) -> bool:
    """No video, nor a line like the others: words where they have numbers, or no such ending."""
    if first is None:
        return True
    if _is_there(root, first[0]) or first[0].lower().endswith(VIDEO_EXTENSIONS):
        return False
    labels = {part[-1] for part in others if part}
    numbers = all(map(_WHOLE_NUMBER.fullmatch, labels))
    return first[-1] not in labels and (not numbers or not _WHOLE_NUMBER.fullmatch(first[-1]))


def _listed(source: Path, root: Path, paths: Sequence[str], labels: list[str]) -> VideoList:
    """Paths with labels: numbers of outputs if all are whole numbers, else names.

    Raises:
        UsageError: numbers that would make many more classes than occur, or an empty label.
    """
    paths = [os.path.join(root, path) for path in paths]
    if not any(os.path.exists(path) for path in paths[:_LOOKED_FOR]):
        raise UsageError(
            f"{source} names {len(paths)} videos, and none of the first "
            f"{min(len(paths), _LOOKED_FOR)} is below {root}: set --video_root to the folder that "
            f"holds them"
        )
    if all(map(_WHOLE_FLOAT.fullmatch, labels)):  # as tables write numbers with gaps in them
        labels = [label.partition(".")[0] for label in labels]
    notes = _named_again(source, paths, labels)
    named = [label for label in labels if not _WHOLE_NUMBER.fullmatch(label)]
    if named:
        if "" in labels:
            raise UsageError(
                f"{source} has no label for {paths[labels.index('')]} ({labels.count('')} such "
                f"lines of {len(labels)})"
            )
        if len(named) < len(labels):
            notes.append(
                f"{len(labels) - len(named)} of {len(labels)} labels of {source} are numbers and "
                f"the others not (first: {named[0][:40]}): all are taken for names"
            )
        return VideoList(source, paths, labels, tuple(notes))
    unknown = sum(label.startswith("-") for label in labels)
    if unknown:
        why = f"{unknown} of {len(labels)} are below 0"
        return VideoList(source, paths, [], tuple(notes), unlabeled=why)
    distinct = set(labels)
    highest = max(distinct, key=lambda label: (len(label.lstrip("0")), label), default="0")
    # Subsets of a data set leave numbers out; a number out of proportion is another thing's.
    most = max(1000, 10 * len(distinct))
    if len(highest.lstrip("0")) > 9 or int(highest) >= most:
        raise UsageError(
            f"{source}: label {highest[:40]} is too high for the {len(distinct)} classes that "
            f"occur: number them from 0 (below {most}), or give names"
        )
    labels = [str(int(label)) for label in labels]
    empty = sorted(set(range(int(highest))) - set(map(int, labels))) if labels else []
    if empty:
        names = some([str(i) for i in empty])
        notes.append(f"{len(empty)} classes of {source} have no video: {names}")
    return VideoList(source, paths, labels, tuple(notes), numbered=True)


def _named_again(source: Path, paths: Sequence[str], labels: Sequence[str]) -> list[str]:
    """A line for people on videos that a list names more than once; none if there are none."""
    first: dict[str, int] = {}
    again = [(first[p], i) for i, p in enumerate(paths) if first.setdefault(p, i) != i]
    if not again:
        return []
    other = sum(labels[a] != labels[b] for a, b in again) if labels else 0
    note = f"{len(again)} lines of {source} name a video again (first: {paths[again[0][1]]})"
    return [f"{note}, {other} of them with another label" if other else note]


# --- annotations ---------------------------------------------------------------------------------


def _kinetics_names(row: Mapping[str, str]) -> list[str]:
    """Names by which a file of Kinetics may go: its YouTube number and seconds, or the number."""
    times = (int(float(row[name])) for name in ("time_start", "time_end"))
    return ["_".join([row["youtube_id"], *(f"{t:06d}" for t in times)]), row["youtube_id"]]


def _from_json(source: Path, root: Path, text: str) -> VideoList:
    """Something-Something's json: the number that names the file, and the label's template."""
    rows = json.loads(text)
    plain = [
        {**row, "template": re.sub(r"[\[\]]", "", row["template"])} if "template" in row else row
        for row in rows
    ]
    return _named(source, root, plain, lambda row: [str(row["id"])], "template")


def _named(
    source: Path,
    root: Path,
    rows: Iterable[Mapping[str, str]],
    names: Callable[[Mapping[str, str]], Sequence[str]],
    label: str,
) -> VideoList:
    """Rows that name videos without their folder and ending; they are looked for below `root`.

    Args:
        source: the annotation.
        root: folder of the videos.
        rows: of the annotation.
        names: those by which a row's file may go.
        label: key of a row's class; annotations of tests have none.

    Raises:
        UsageError: no row's video is there, or some rows have a label and some not.
    """
    folder = list_folder(root)
    there, twice = {}, 0
    for path in folder.paths:
        twice += there.setdefault(Path(path).stem, path) != path
    paths, labels, missing = [], [], 0
    for row in rows:
        path = next((there[name] for name in names(row) if name in there), None)
        if path is None:
            missing += 1
        else:
            paths.append(path)
            labels.append(row.get(label))
    if not paths:
        raise UsageError(
            f"{source} names {missing} videos, and none of them is below {root}: set "
            f"--video_root to the folder that holds them"
        )
    known = [name for name in labels if name]
    if known and len(known) < len(labels):
        lacking = len(labels) - len(known)
        raise UsageError(f"{source}: {lacking} of {len(labels)} rows have no {label}")
    notes = list(folder.notes)
    if missing:
        notes.append(f"{missing} videos of {source} are not there: left out")
    if twice:
        notes.append(f"{twice} files below {root} have the name of another one: left out")
    return VideoList(source, paths, known, tuple(notes))


def class_numbers(videos: VideoList, classes: Sequence[str]) -> list[int]:
    """The labels as places in a list of classes.

    Raises:
        UsageError: no labels, or some that are no such class.
    """
    if not videos.labels:
        reason = f" ({videos.unlabeled})" if videos.unlabeled else ""
        raise UsageError(
            f"{videos.source} has no labels{reason}: give a list with them, or a folder for each "
            f"class; without any, --eval takes them with --predictions"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    foreign = sorted(set(videos.labels) - numbers.keys())
    if foreign:
        raise UsageError(
            f"{videos.source} has {some(foreign)}, which is none of the {len(classes)} classes"
        )
    return [numbers[name] for name in videos.labels]
