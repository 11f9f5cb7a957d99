"""Folders of videos: files, and folders of frames; what else lies there is counted."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.data.classes import some
from util.data.folders import describe, walk
from util.data.images import IMAGE_EXTENSIONS
from util.errors import UsageError
from VideoConvMAE.decode import VIDEO_EXTENSIONS

# So many names tell what the pictures of a folder are.
_NAMES_TO_JUDGE = 100


@dataclass(frozen=True)
class VideoList:
    """Videos of one split.

    Attributes:
        source: the list or folder they come from.
        paths: files, or folders of pictures.
        labels: names of their classes; empty if not known.
        notes: lines that tell what was left out.
        unlabeled: why the labels are not known, if there is more to say than that there are none.
        numbered: whether the labels are the outputs' numbers, not names.
    """

    source: Path
    paths: list[str]
    labels: list[str]
    notes: tuple[str, ...] = ()
    unlabeled: str = ""
    numbered: bool = False

    @property
    def classes(self) -> list[str]:
        """Sorted names of the classes that occur; of numbers all from 0 to the highest."""
        if self.numbered and self.labels:
            return [str(i) for i in range(max(map(int, self.labels)) + 1)]
        return sorted(set(self.labels))


def list_folder(folder: Path) -> VideoList:
    """Every video file below a folder, and every folder of frames.

    Pictures that lie beside videos or above them are posters and thumbnails, no frames; below
    a folder that also has video files, frames are alike but for their numbers and have no video's
    name.

    Raises:
        UsageError: no video.
    """
    videos: list[str] = []
    pictures: dict[str, list[str]] = {}  # by folder, the first names
    endings: dict[str, Counter] = {}
    hidden: Counter[str] = Counter()
    for place, names in walk(folder, hidden):
        kinds = [os.path.splitext(name)[1].lower() for name in names]
        endings[place] = Counter(kind for kind in kinds if kind not in VIDEO_EXTENSIONS)
        found = zip(names, kinds, strict=True)
        videos += [os.path.join(place, name) for name, kind in found if kind in VIDEO_EXTENSIONS]
        first = [name for name, kind in zip(names, kinds, strict=True) if kind in IMAGE_EXTENSIONS]
        if first:
            pictures[place] = first[:_NAMES_TO_JUDGE]
    stems = {Path(path).stem for path in videos}
    frames = _innermost(
        [place for place, names in pictures.items() if not stems or _are_frames(names, stems)],
        videos,
    )
    for place in frames:
        for ending in IMAGE_EXTENSIONS:
            del endings[place][ending]
    left_out = hidden
    for kind, n in sum(endings.values(), Counter()).items():
        left_out[f"of {kind or 'unnamed type'}"] += n
    kinds = describe(left_out)
    paths = sorted([*videos, *frames])
    if not paths:
        raise UsageError(
            f"no video below {folder}: looked for {', '.join(VIDEO_EXTENSIONS)} and for folders "
            f"of pictures, but it holds {f'only other files ({kinds})' if kinds else 'no file'}"
        )
    note = f"{left_out.total()} files below {folder} are no videos: left out ({kinds})"
    parts = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    stray = [path for path, part in zip(paths, parts, strict=True) if len(part) == 1]
    labels = [] if stray else [part[0] for part in parts]
    why = ""
    if 0 < len(stray) < len(paths):
        why = f"{len(stray)} videos lie outside of its class folders (first: {stray[0]})"
    notes = [note] * bool(left_out)
    if labels:
        places = (os.path.relpath(place, folder).split(os.sep)[0] for place in endings)
        if empty := sorted({*places} - {*labels, "."}):
            notes.append(f"no video in {some(empty)} of {folder}: no class is made of that")
    return VideoList(folder, paths, labels, tuple(notes), why)


def _are_frames(names: Sequence[str], videos: set[str]) -> bool:
    """Pictures alike but for a number, and not named after videos."""
    stems = [os.path.splitext(name)[0] for name in names]
    patterns = {re.sub(r"\d+", "0", stem) for stem in stems}
    return len(patterns) == 1 and "0" in patterns.pop() and videos.isdisjoint(stems)


def _innermost(folders: Sequence[str], videos: Sequence[str]) -> list[str]:
    """Those folders that have neither a video nor another of the folders in them."""
    above = {str(parent) for path in (*folders, *videos) for parent in Path(path).parents}
    return [folder for folder in folders if folder not in above]
