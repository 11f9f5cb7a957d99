"""Lists of images: text files with a path a line, or a single image."""

import os
from collections import Counter
from pathlib import Path
from typing import NoReturn

from util.data.folders import NumberedFiles
from util.data.images import IMAGE_EXTENSIONS
from util.errors import UsageError

LIST_EXTENSION = ".txt"


def is_list(path: str | os.PathLike, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """True if a data path means a list of images, or one image, of one of the endings."""
    return str(path).lower().endswith((LIST_EXTENSION, *endings)) and Path(path).is_file()


class ImageList(NumberedFiles):
    """The images that a list names, by number: what `ImageFolder` is for a folder.

    Args:
        path: a text file with the path of an image in each line, relative to its folder; or an
            image, for that alone.

    Raises:
        UsageError: an empty list, or one of which no image is there.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        root, paths = Path(path), [os.fspath(path)]
        if root.suffix.lower() == LIST_EXTENSION:
            try:
                text = root.read_text("utf-8-sig", errors="surrogateescape")
            except OSError as error:
                raise UsageError(f"list {path} cannot be read: {error.strerror}") from error
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            paths = [os.path.join(root.parent, line) for line in lines]
        if not any(map(os.path.isfile, paths)):
            first = f", such as {paths[0][:200]!r}" if paths else ""
            raise UsageError(
                f"list {path}: none of its {len(paths)} images is there{first}: a line is the path "
                f"of an image, relative to the list's folder"
            )
        super().__init__(root, paths, Counter())

    def read_classes(self) -> NoReturn:
        """A list has none.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"the images of {self.root} have no labels: give a folder a class")
