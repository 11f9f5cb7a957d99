"""Lists, annotations and folders of videos."""

import csv
import io
import json
import os

import pytest

from util.errors import UsageError
from VideoConvMAE.datasets import Clips
from VideoConvMAE.lists import class_numbers, find_split, find_unlabeled, find_videos


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [str(root / name) for name in names]


@pytest.mark.parametrize("line", ["{} {}", "{},{}", "{}, {}", "{}\t{}", "{} 300 {}", "{},-1,{}"])
def test_lines_of_path_and_label(tmp_path, line):
    names = ["a.mp4", "sub/my film 7.webm", "c,d.mkv"]
    paths = touch(tmp_path, *names)
    (tmp_path / "train.csv").write_text(
        "".join(line.format(name, label) + "\n" for name, label in zip(names, (2, 0, 2)))  # noqa: B905
    )
    videos = find_videos(tmp_path / "train.csv")
    assert videos.paths == paths
    assert videos.labels == ["2", "0", "2"]
    assert videos.classes == ["0", "1", "2"]  # the output of a number is that number
    assert class_numbers(videos, videos.classes) == [2, 0, 2]


def test_paths_are_relative_to_the_lists_folder_or_the_root_that_is_given(tmp_path):
    touch(tmp_path / "videos", "a.mp4")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("a.mp4 0\n")
    videos = find_videos(tmp_path / "lists" / "train.txt", tmp_path / "videos")
    assert videos.paths == [str(tmp_path / "videos" / "a.mp4")]
    with pytest.raises(UsageError, match=r"names 1 videos, and none .* --video_root"):
        find_videos(tmp_path / "lists" / "train.txt")


def test_absolute_paths_stay_as_they_are(tmp_path):
    (path,) = touch(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text(f"{path} 1\n")
    assert find_videos(tmp_path / "list.txt", tmp_path).paths == [path]


def test_minus_one_is_no_label(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0 -1\n")
    assert find_videos(tmp_path / "list.txt").labels == []


def test_a_line_without_label_is_refused_with_the_line(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\na.mp4 1\nb.mp4\n")
    with pytest.raises(UsageError, match=r"`path label`.*not 'b\.mp4'"):
        find_videos(tmp_path / "list.txt")


def test_kinetics_annotation(tmp_path):
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    rows = ["abseiling,-7kbO0v4hag,107,117,val,0", '"a, b",xyz,5,15,val,0', "zumba,gone,1,11,val,0"]
    (tmp_path / "val.csv").write_text(head + "\n".join(rows) + "\n")
    paths = touch(tmp_path / "v", "abseiling/-7kbO0v4hag_000107_000117.mp4", "xyz.webm")
    videos = find_videos(tmp_path / "val.csv", tmp_path / "v")
    assert videos.paths == paths
    assert videos.labels == ["abseiling", "a, b"]
    assert videos.classes == ["a, b", "abseiling"]
    assert videos.notes == (f"1 videos of {tmp_path / 'val.csv'} are not there: left out",)


def test_something_something_annotation(tmp_path):
    rows = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something] next to [it]"},
        {"id": "42326", "label": "putting", "template": "Approaching [something]"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    paths = touch(tmp_path / "v", "78687.webm", "42326.webm")
    videos = find_videos(tmp_path / "train.json", tmp_path / "v")
    assert videos.paths == paths
    assert videos.labels == ["Holding something next to it", "Approaching something"]


def test_annotations_of_tests_have_no_labels(tmp_path):
    paths = touch(tmp_path, "1.webm", "abc_000001_000011.mp4")
    (tmp_path / "test.json").write_text('[{"id": "1"}]')
    table = "youtube_id,time_start,time_end,split\nabc,1,11,test\n"
    (tmp_path / "test.csv").write_text(table, encoding="utf-8-sig")
    for name, path in zip(("test.json", "test.csv"), paths, strict=True):
        videos = find_videos(tmp_path / name)
        assert (videos.paths, videos.labels) == ([path], [])


def test_an_annotation_with_labels_for_some_is_refused(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "train.json").write_text('[{"id": 1, "template": "x"}, {"id": 2}]')
    with pytest.raises(UsageError, match="1 of 2 rows have no template"):
        find_videos(tmp_path / "train.json")


def test_files_of_one_name_are_counted(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.webm")
    (tmp_path / "train.json").write_text('[{"id": 1, "template": "x"}]')
    videos = find_videos(tmp_path / "train.json")
    assert len(videos.paths) == 1
    assert any("1 files below" in note for note in videos.notes)


# ---- Lists as programs write them ----------------------------------------------------------------


def written(folder, content, encoding="utf-8"):
    """The videos of a list; `{0}` and `{1}` in it are their names."""
    names = ("a.mp4", "my, film 7.mp4")
    paths = touch(folder, *names)
    (folder / "list.csv").write_text(content.format(*names), encoding=encoding, newline="")
    videos = find_videos(folder / "list.csv")
    assert videos.paths == paths
    return videos


@pytest.mark.parametrize("head", ["", "path,label\n"])
def test_a_csv_is_read_as_csv_writes_it(tmp_path, head):
    text = io.StringIO()
    csv.writer(text).writerows([("a.mp4", 3), ("my, film 7.mp4", 0)])
    videos = written(tmp_path, head + text.getvalue())
    assert (videos.labels, videos.numbered) == (["3", "0"], True)


@pytest.mark.parametrize(
    "content",
    [
        '"{0}";"0"\r\n"{1}";"1"\r\n',  # a spreadsheet where the comma is decimal
        "Label;Path\n0;{0}\n1;{1}\n",
        '"{0}" 0\n"{1}" 1\n',
        '"{0}",0\r"{1}",1\r',
        'clip,verb\n{0},0\n"{1}",1\n',
        'id,video_path,duration,class\n7,{0},1.5,0\n8,"{1}",2,1\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_quotes_heads_and_byte_order_marks(tmp_path, content, encoding):
    assert written(tmp_path, content, encoding).labels == ["0", "1"]


def test_names_are_labels(tmp_path):
    videos = written(tmp_path, '{0},playing chess\n"{1}","high jump, backwards"\n')
    assert videos.classes == ["high jump, backwards", "playing chess"]
    assert class_numbers(videos, videos.classes) == [1, 0]


def test_names_that_are_no_utf_8_are_read_and_written_again(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    (path,) = touch(tmp_path, name)
    (tmp_path / "list.csv").write_bytes(b"caf\xe9.mp4,d\xe9j\xe0 vu\n")
    videos = find_videos(tmp_path / "list.csv")
    assert (videos.paths, videos.labels) == ([path], [os.fsdecode(b"d\xe9j\xe0 vu")])
    assert os.path.exists(Clips(videos, lambda frames: frames, length=2).path(0))


def test_whole_numbers_written_as_floats_are_numbers(tmp_path):
    videos = written(tmp_path, '{0},11.0\n"{1}",0.0\n')
    assert (videos.labels, videos.numbered, len(videos.classes)) == (["11", "0"], True, 12)


def test_a_word_among_numbers_is_told_as_it_makes_names_of_all(tmp_path):
    videos = written(tmp_path, '{0},3\n"{1}",jump\n')
    assert videos.classes == ["3", "jump"]
    assert "1 of 2 labels" in videos.notes[0] and "first: jump" in videos.notes[0]


def test_videos_that_are_named_again_are_counted(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\na.mp4 0\na.mp4 1\n")
    (note,) = find_videos(tmp_path / "list.txt").notes
    assert "2 lines" in note and "a.mp4" in note and "1 of them with another label" in note


def test_a_list_that_cannot_be_read_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(UsageError, match=r"list\.csv cannot be read: it is a FIFO"):
        find_videos(tmp_path / "list.csv")


@pytest.mark.parametrize("content", ["{0}\n{1}\n", 'path\n{0}\n"{1}"\n', '"{0}"\n"{1}"\n'])
def test_a_list_of_paths_alone_has_no_labels(tmp_path, content):
    assert written(tmp_path, content).labels == []


def test_a_path_that_ends_in_a_number_keeps_it(tmp_path):
    names = ("sub/film 7", "sub/film 12", "sub/film 3")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "list.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    videos = find_videos(tmp_path / "list.txt")
    assert videos.paths == [str(tmp_path / name) for name in names]
    assert videos.labels == ["0", "1", "2"]


def test_frames_are_read_where_the_whole_list_has_them(tmp_path):
    for name in ("film 7", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "list.txt").write_text("film 7 300 1\nother 20 0\n")
    videos = find_videos(tmp_path / "list.txt")
    assert videos.paths == [str(tmp_path / "film 7"), str(tmp_path / "other")]
    (tmp_path / "list.txt").write_text("film 7 300 1\nother 20 0\nother 0\n")
    with pytest.raises(UsageError, match="a line is `path frames label`, not 'other 0'"):
        find_videos(tmp_path / "list.txt")


@pytest.mark.parametrize("label", ["1000000000", "1000", "9" * 5000])
def test_a_label_out_of_proportion_is_refused_and_nothing_is_allocated(tmp_path, label):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.txt").write_text(f"a.mp4 0\nb.mp4 {label}\n")
    with pytest.raises(UsageError, match=r"is too high for the 2 classes .*below 1000"):
        find_videos(tmp_path / "list.txt")


def test_classes_without_a_video_are_counted_and_named(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 5\n")
    videos = find_videos(tmp_path / "list.txt")
    assert len(videos.classes) == 6
    assert "4 classes" in videos.notes[0]
    assert "1, 2, 3 and 1 more" in videos.notes[0]


BINARY = bytes(range(256)) * 400
KINETICS = b"youtube_id,time_start,time_end,label\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", b""), ("l.csv", b"\n \n"), ("l.csv", BINARY), ("l.csv", b"\0" * 50),
        ("l.csv", b'"a.mp4,0\n"'), ("l.csv", b"path,label\na.mp4\n"), ("l.csv", b"path,label\n"),
        ("l.csv", b"path,label\na.mp4,\n"), ("l.csv", b'path,label\n"a.mp4,0\n'),
        ("l.csv", b"x" * 300000), ("l.csv", b'"' + b"x" * 300000 + b'"'), ("l.csv", b", 0\n"),
        ("l.csv", KINETICS + b"x,inf,1,a\n"), ("l.csv", KINETICS + b"x\n"),
        ("l.csv", b"youtube_id\nx\n"), ("l.csv", "path,label\nb.mp4,0\n".encode("utf-16")),
        ("l.json", b"[" * 100000), ("l.json", b"{}"), ("l.json", b'{"id": 1}'), ("l.json", b"null"),
        ("l.json", b'[{"id": 1, "template": 5}]'), ("l.json", b"[[1]]"), ("l.json", BINARY),
        ("l.json", b'[{"template": "x"}]'),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_odd_lists_are_one_line(tmp_path, name, content):
    touch(tmp_path, "a.mp4", "1.mp4")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        find_videos(tmp_path / name)
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_another_json_is_refused(tmp_path, content):
    touch(tmp_path, "1.mp4")
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UsageError, match=r"train\.json is no list of videos"):
        find_videos(tmp_path / "train.json")


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_videos(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no video below"):
        find_videos(tmp_path)


def test_a_class_that_is_none_of_the_models_is_named(tmp_path):
    touch(tmp_path, "jump/a.mp4", "fly/b.mp4")
    with pytest.raises(UsageError, match=r"has fly, which is none of the 2 classes"):
        class_numbers(find_videos(tmp_path), ["jump", "run"])


def test_a_split_is_a_folder_or_a_list(tmp_path):
    touch(tmp_path, "train/jump/a.mp4", "b.mp4")
    (tmp_path / "validation.txt").write_text("b.mp4 0\n")
    assert find_split(tmp_path, ("train",), None).labels == ["jump"]
    assert find_split(tmp_path, ("val", "validation"), None).labels == ["0"]
    with pytest.raises(UsageError, match=r"has none of test/, test\.csv, test\.txt, test\.json"):
        find_split(tmp_path, ("test",), None)


def test_pretraining_reads_the_train_split_if_there_is_one(tmp_path):
    paths = touch(tmp_path, "a.mp4", "val/b.mp4")
    assert find_unlabeled(tmp_path, None).paths == paths
    (tmp_path / "train.csv").write_text("a.mp4,-1\n")
    assert find_unlabeled(tmp_path, None).paths == paths[:1]
    (train,) = touch(tmp_path, "train/x/c.mp4")
    assert find_unlabeled(tmp_path, None).paths == [train]
    assert find_unlabeled(tmp_path / "train.csv", None).paths == paths[:1]
