"""Lists, annotations and folders of videos."""

import json

import pytest
from PIL import Image

from util.errors import UsageError
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
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4\n")
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
    assert videos.missing == 1


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


@pytest.mark.parametrize("content", ["{", "[1]", '[{"id": 1}]'])
def test_another_json_is_refused(tmp_path, content):
    touch(tmp_path, "1.mp4")
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UsageError, match=r"train\.json is no list of videos"):
        find_videos(tmp_path / "train.json")


def test_folders_by_class_of_files_and_of_frames(tmp_path):
    paths = touch(tmp_path, "jump/a.mp4", "jump/deep/b.AVI", "run/c.webm", ".hidden/d.mp4")
    frames = tmp_path / "run" / "d"
    frames.mkdir()
    Image.new("RGB", (8, 8)).save(frames / "0.jpg")
    videos = find_videos(tmp_path)
    assert videos.paths == [*paths[:3], str(frames)]
    assert videos.labels == ["jump", "jump", "run", "run"]


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    videos = find_videos(tmp_path)
    assert (len(videos.paths), videos.labels) == (2, [])
    with pytest.raises(UsageError, match="has no labels"):
        class_numbers(videos, ["a"])


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
