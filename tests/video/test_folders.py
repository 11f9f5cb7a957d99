"""Folders of videos, with other files between them."""

import pytest
from PIL import Image

from tests.video.test_lists import touch
from util.errors import UsageError
from VideoConvMAE.folders import list_folder
from VideoConvMAE.lists import class_numbers


def test_folders_by_class_of_files_and_of_frames(tmp_path):
    paths = touch(tmp_path, "jump/a.mp4", "jump/deep/b.AVI", "run/c.webm", ".hidden/d.mp4")
    frames = tmp_path / "run" / "d"
    frames.mkdir()
    Image.new("RGB", (8, 8)).save(frames / "0.jpg")
    videos = list_folder(tmp_path)
    assert videos.paths == [*paths[:3], str(frames)]
    assert videos.labels == ["jump", "jump", "run", "run"]


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    videos = list_folder(tmp_path)
    assert (len(videos.paths), videos.labels) == (2, [])
    with pytest.raises(UsageError, match="has no labels"):
        class_numbers(videos, ["a"])


def test_posters_and_thumbnails_are_no_videos_and_drop_no_labels(tmp_path):
    paths = touch(tmp_path, "jump/a.mp4", "run/1.mp4", "run/2.mp4")
    touch(tmp_path, "poster.jpg", "jump/a.jpg", "jump/poster.png", "run/thumbs/1.jpg")
    touch(tmp_path, "run/thumbs/2.jpg", "jump/info/cover.jpg", "jump/a.srt", "README")
    videos = list_folder(tmp_path)
    assert videos.paths == paths
    assert videos.labels == ["jump", "run", "run"]
    (note,) = videos.notes
    assert note.startswith(f"8 files below {tmp_path} are no videos: left out (")
    for part in ("5 of .jpg", "1 of .png", "1 of .srt", "1 of unnamed type"):
        assert part in note


def test_folders_of_frames_are_videos_but_what_lies_above_them_is_not(tmp_path):
    frames = [f"{clip}/{i}.jpg" for clip in ("jump/x", "run/y", "run/z") for i in range(3)]
    touch(tmp_path, *frames, "cover.jpg", "run/poster.jpg", "run/z/times.txt")
    videos = list_folder(tmp_path)
    assert videos.paths == [str(tmp_path / clip) for clip in ("jump/x", "run/y", "run/z")]
    assert videos.labels == ["jump", "run", "run"]
    assert "3 files" in videos.notes[0]
    assert "2 of .jpg, 1 of .txt" in videos.notes[0]


def test_a_video_beside_the_class_folders_is_named_where_labels_are_needed(tmp_path):
    (stray, *_) = touch(tmp_path, "a.mp4", "jump/b.mp4", "run/c.mp4")
    videos = list_folder(tmp_path)
    assert len(videos.paths) == 3
    with pytest.raises(UsageError, match=rf"1 videos lie outside of its class.*{stray}"):
        class_numbers(videos, ["jump", "run"])


def test_a_class_folder_without_a_video_is_named(tmp_path):
    touch(tmp_path, "jump/a.mp4", "run/notes.txt")
    (tmp_path / "fly").mkdir()
    videos = list_folder(tmp_path)
    assert videos.classes == ["jump"]
    assert f"no video in fly, run of {tmp_path}" in videos.notes[-1]


def test_a_folder_of_other_files_is_refused_with_their_endings(tmp_path):
    touch(tmp_path, "a.txt", "b.txt", "c")
    with pytest.raises(UsageError, match=r"only other files \(2 of \.txt, 1 of unnamed type\)"):
        list_folder(tmp_path)
