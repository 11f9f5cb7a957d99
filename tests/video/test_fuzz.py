"""Videos and lists damaged at random: read, or refused in a line; see `tests/test_fuzz.py`."""

import json
import os
import random
from collections import Counter

import pytest

from tests.mutations import ROUNDS, bounded_memory, mutations, watched
from tests.video.movies import write_movie
from tests.video.test_lists import touch
from util.errors import UsageError
from VideoConvMAE.decode import open_video
from VideoConvMAE.lists import class_numbers, find_videos

MOVIES = {
    "a.mp4": dict(g="4", bf="2"), "a.mkv": dict(g="4", bf="2"), "a.ts": dict(g="4"),
    "a.avi": dict(codec="mpeg4", g="4"), "a.mpg": dict(codec="mpeg2video", g="4"),
    "a.webm": {"codec": "libvpx", "g": "4", "deadline": "realtime"},
    "a.flv": dict(codec="flv1"), "a.h264": dict(g="4", bf="0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVIES)
def test_damaged_videos_give_frames_or_are_bad_files(name, tmp_path):
    path, outcomes = write_movie(tmp_path / name, 12, **MOVIES[name]), Counter()
    with bounded_memory():
        for case, data in mutations(path.read_bytes(), 60, head=600):
            path.write_bytes(data)
            with watched(case):
                try:
                    with open_video(path, short_side=32, max_pixels=10**6) as video:
                        chosen = sorted({0, len(video) // 2, len(video) - 1})
                        frames = video.frames(chosen)
                except OSError as error:
                    assert str(error).startswith(f"{path} cannot be decoded: ")
                    assert len(str(error).splitlines()) == 1
                    outcomes["error"] += 1
                else:
                    assert len(frames) == len(chosen) and frames.dtype == "uint8"
                    outcomes["frames"] += 1
    assert outcomes["error"] > 0 and outcomes["frames"] > 5


NAMES = ["a.mp4", "my, film 7.mp4", "sub/c.webm", os.fsdecode(b"caf\xe9.mkv"), "film 3", "1.mp4"]
KINETICS = "label,youtube_id,time_start,time_end,split\n" + "".join(
    f'"jump, high",{stem},1,11,train\n' for stem in ("a", "my, film 7", "1", "gone")
)
LISTS = {
    "a.csv": "".join(f'"{name}",{i % 3}\n' for i, name in enumerate(NAMES)),
    "b.txt": "".join(f"{name} {i % 3}\n" for i, name in enumerate(NAMES)),
    "c.csv": "path;label\r\n" + "".join(f'"{name}";run\r\n' for name in NAMES),
    "d.csv": "\n".join(NAMES),
    "e.txt": "".join(f"{name}\t30\t{i}\n" for i, name in enumerate(NAMES)),
    "kinetics.csv": KINETICS,
    "something.json": json.dumps([{"id": str(i), "template": "Put [it]"} for i in range(1, 4)]),
}


@pytest.mark.parametrize("name", LISTS)
def test_damaged_lists_are_read_or_refused_in_a_line(name, tmp_path):
    there, outcomes = set(touch(tmp_path, *NAMES)), Counter()
    whole = os.fsencode(LISTS[name])
    with bounded_memory():
        for case, data in mutations(whole, 120, head=40):
            (tmp_path / name).write_bytes(data)
            with watched(case):
                try:
                    videos = find_videos(tmp_path / name)
                    if videos.labels:
                        assert len(videos.labels) == len(videos.paths)
                        assert len(videos.classes) <= 1000
                        class_numbers(videos, videos.classes)
                except UsageError as error:
                    assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
                    outcomes["refused"] += 1
                else:
                    assert there & set(videos.paths)
                    outcomes["read"] += 1
    assert outcomes["read"] > 2 and outcomes["refused"] > 2


PARTS = ["a.mp4", "film 3", "gone.mp4", "0", "1", "-1", "2.0", "1e3", "nan", "9" * 30, "run", ""]
PARTS += [
    '"',
    '"a.mp4"',
    "#",
    "path",
    "label",
    "youtube_id",
    "\ufeff",
    "é",
    "\udce9",
    "\0",
    "/",
    "..",
]


def test_lists_of_odd_parts_are_read_or_refused_in_a_line(tmp_path):
    touch(tmp_path, *NAMES)
    for case in range(300 * ROUNDS):
        draw = random.Random(case)
        between, end = draw.choice([",", ";", " ", "\t", ", "]), draw.choice(["\n", "\r\n", "\r"])
        rows = [draw.choices(PARTS, k=draw.choice((1, 2, 2, 3))) for _ in range(draw.randint(1, 6))]
        text = end.join(between.join(row) for row in [["a.mp4", "1"], *rows])
        (tmp_path / "list.csv").write_text(text, "utf-8", "surrogateescape", newline="")
        with watched(f"case {case}: {text!r}"):
            try:
                videos = find_videos(tmp_path / "list.csv")
                assert not videos.labels or class_numbers(videos, videos.classes)
            except UsageError as error:
                assert len(str(error).splitlines()) == 1
