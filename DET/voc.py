"""Boxes of Pascal VOC's XML files, which labelImg and others write, as COCO's json.

`python -m DET.voc IMAGES ANNOTATIONS --out DIR --lists train.txt val.txt`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from util.atomic import write_atomically
from util.data.classes import some
from util.data.folders import list_images
from util.errors import UsageError
from util.run.args import check_writable
from util.run.parser import Parser
from util.run.program import run_main

SIDES = ("xmin", "ymin", "xmax", "ymax")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m DET.voc",
        description="Write COCO's json from the XML files of Pascal VOC and labelImg, a file for "
        "each list; all have the same classes.",
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder of images: VOC's JPEGImages")
    add("annotations", type=Path, metavar="ANNOTATIONS", help="folder of XML files, named alike")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add(
        "--lists",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files with an image's name without ending a line, such as those of "
        "ImageSets/Main: each becomes DIR/<its name>.json (default: all images, DIR/all.json)",
    )
    return parser.parse_args(argv)


def read_voc(path: Path) -> dict:
    """Size and objects of a VOC file.

    Returns:
        `width`, `height` and `objects`, the class's name and `[left, top, width, height]` of
        each. VOC counts pixels from 1 and its sides belong to the box, as in Detectron2's reader.

    Raises:
        ValueError: a file that is none, saying why.
    """
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        objects = []
        for item in root.iter("object"):
            name = (item.findtext("name") or "").strip()
            left, top, right, bottom = (float(item.findtext(f"bndbox/{s}", "")) for s in SIDES)
            if not name:
                raise ValueError("an object has no name")
            objects.append((name, [left - 1, top - 1, right - left + 1, bottom - top + 1]))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no annotation of Pascal VOC: {error}") from error
    return {"width": width, "height": height, "objects": objects}


def read_list(path: Path) -> list[str]:
    """The names in a text file; of VOC's lists of a class, which go on with a number, the first.

    Raises:
        UsageError: a file that cannot be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list {path} cannot be read: {error}") from error
    names = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    if not names:
        raise UsageError(f"the list {path} is empty: it needs a name without ending a line")
    return names


def as_coco(files: Mapping[str, str], found: Mapping[str, dict], classes: Sequence[str]) -> dict:
    """The content of a json in COCO's format.

    Args:
        files: names of the image files by those of the annotations.
        found: what `read_voc` gives, by the same.
        classes: names, in the order of the category ids, from 1.
    """
    images, annotations = [], []
    for number, (name, file) in enumerate(files.items(), 1):
        entry = found[name]
        size = {side: entry[side] for side in ("width", "height")}
        images.append({"id": number, "file_name": file, **size})
        for label, box in entry["objects"]:
            category = classes.index(label) + 1
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category}
                | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(args: argparse.Namespace) -> None:
    """Read all XML files, then write a json for each list."""
    found, broken = {}, []
    for path in sorted(args.annotations.glob("*.xml")):
        try:
            found[path.stem] = read_voc(path)
        except ValueError as error:
            broken.append(str(error))
    if broken:
        raise UsageError(f"{len(broken)} files cannot be read: {some(broken)}")
    classes = sorted({name for entry in found.values() for name, _ in entry["objects"]})
    if not classes:
        raise UsageError(f"no object in the XML files of {args.annotations}")
    files = list_images(args.images)
    for paths in (files, args.lists or ()):
        stems = Counter(Path(path).stem for path in paths)
        if twice := [stem for stem, count in stems.items() if count > 1]:
            raise UsageError(f"files of one name cannot be told apart: {some(twice)}")
    images = {Path(file).stem: file for file in files}
    lists = {path.stem: read_list(path) for path in args.lists or ()} or {"all": list(images)}
    for title, names in lists.items():
        if absent := [n for n in names if n not in images or (args.lists and n not in found)]:
            raise UsageError(
                f"{len(absent)} names of the list {title} have no image in {args.images} or no "
                f"XML file in {args.annotations}: {some(absent)}"
            )
    check_writable(args.out, "--out")
    for title, names in lists.items():
        used = {n: str(Path(images[n]).relative_to(args.images)) for n in names if n in found}
        content = as_coco(used, found, classes)
        data = json.dumps(content).encode()
        write_atomically(args.out / f"{title}.json", lambda file, data=data: file.write(data))
        without = f", {len(names) - len(used)} without an XML file left out"
        print(
            f"{args.out / title}.json: {len(used):,} images, {len(content['annotations']):,} boxes "
            f"of {len(classes)} classes ({', '.join(classes)})"
            f"{without if len(used) < len(names) else ''}"
        )


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
