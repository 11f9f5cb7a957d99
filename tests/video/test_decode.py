"""Decoding: the frames asked for, from any kind of file."""

import contextlib
import errno
import os
import resource
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image

from tests.pictures import picture
from tests.video.movies import numbered_frames, numbers, write_movie
from util.data import files
from util.errors import TrainingError
from VideoConvMAE import decode
from VideoConvMAE.decode import frame_names, open_video, write_mp4

FILES = {
    "mp4 with B-frames": ("a.mp4", dict(g="12", bf="3")),
    "mp4 with open groups": ("a.mp4", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "mp4 of one group": ("a.mp4", dict(g="1000", bf="2")),
    "mp4 of keyframes": ("a.mp4", dict(g="1")),
    "matroska": ("a.mkv", dict(g="12", bf="3")),
    "mpeg-ts": ("a.ts", dict(g="12", bf="3")),
    "webm": ("a.webm", dict(codec="libvpx-vp9", g="12", deadline="realtime")),
    "webm of vp8": ("a.webm", {"codec": "libvpx", "g": "12", "auto-alt-ref": "1"}),
    "avi": ("a.avi", dict(codec="mpeg4", g="12", bf="2")),
    "raw h264, which has no times": ("a.h264", dict(g="12", bf="3")),
}  # fmt: skip
every_file = pytest.mark.parametrize(("name", "options"), FILES.values(), ids=FILES)


@pytest.fixture(scope="session")
def movie(tmp_path_factory):
    """Writes a kind of file once."""
    folder, made = tmp_path_factory.mktemp("movies"), {}

    def write(name, options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = write_movie(folder / str(len(made)) / name, **options)
        return made[key]

    return write


def decode_all(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@every_file
@pytest.mark.parametrize(
    "indices", [[0, 4, 8, 12], [39], [25, 3, 3, 38, 17], list(range(40)), [13, 14]], ids=str
)
def test_frames_are_those_of_a_full_decode(movie, name, options, indices):
    path = movie(name, options)
    everything = decode_all(path)
    assert numbers(everything) == list(range(40))
    with open_video(path) as video:
        assert len(video) == 40
        frames = video.frames(indices)
        assert np.array_equal(frames, everything[indices])
        assert np.array_equal(video.frames(indices[::-1]), everything[indices[::-1]])


CODECS = {
    "h264 mp4": ("a.mp4", dict(codec="libx264", preset="ultrafast")),
    "h264 mkv": ("a.mkv", dict(codec="libx264", preset="ultrafast")),
    "hevc mp4": ("a.mp4", dict(codec="libx265", preset="ultrafast")),
    "vp9 webm": ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}),
}
LENGTHS = (1, 2, 3, 4, 5, 12, 13, 14, 22, 25, 26, 37, 38, 60)


@pytest.mark.parametrize(("name", "options"), CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("group", ["4", "12", "1000"])
def test_any_length_is_decoded_whatever_its_last_group(tmp_path, name, options, b_frames, group):
    lengths = LENGTHS
    if options["codec"] == "libx265":
        hevc = f"log-level=none:pools=1:keyint={group}:bframes={b_frames}"
        options = options | {"x265-params": hevc}
        # One or two frames get undefined times from this encoder, which cannot always be written.
        lengths = LENGTHS[2:]
    elif options["codec"] == "libx264":
        options = options | {"g": group, "bf": b_frames}
    else:  # VP9 has hidden frames in the place of B-frames
        options = options | {"g": group, "lag-in-frames": "10" if b_frames != "0" else "0"}
    for count in lengths:
        path = write_movie(tmp_path / str(count) / name, count, **options)
        everything = decode_all(path)
        with open_video(path) as video:
            assert len(video) == len(everything) == count
            for indices in ([count - 1], range(count), [0, count // 2], [count - 1, 0]):
                frames = video.frames(list(indices))
                assert np.array_equal(frames, everything[list(indices)]), (count, indices)


def test_files_joined_end_to_end_are_read_to_their_end(movie, tmp_path):
    path = movie("a.ts", dict(g="12", bf="0"))
    (tmp_path / "twice.ts").write_bytes(path.read_bytes() * 2)
    with open_video(tmp_path / "twice.ts") as video:
        assert len(video) == 80
        assert numbers(video.frames([3, 39, 40, 79])) == [3, 39, 0, 39]


def test_a_format_that_is_not_read_is_told(tmp_path):
    picture(0).save(tmp_path / "a.mp4", "PNG")
    with pytest.raises(OSError, match=r"a\.mp4 cannot be decoded: it is of no format of mov, "):
        open_video(tmp_path / "a.mp4")


def test_only_the_frames_needed_are_decoded(movie, monkeypatch):
    path, taken = movie("a.mp4", dict(g="12", bf="3")), []
    with open_video(path) as video:
        decode = video._from

        def count(time):
            for item in decode(time):
                taken.append(item)
                yield item

        monkeypatch.setattr(video, "_from", count)
        assert numbers(video.frames([2, 38])) == [2, 38]
    assert len(taken) == 3 + 3  # from the keyframes 0 and 36 on


def test_gray_frames(movie):
    path = movie("a.mp4", dict(g="12", bf="3"))
    with open_video(path, 3) as colour, open_video(path, 1) as gray:
        rgb, luma = colour.frames([5, 6]), gray.frames([5, 6])
    assert luma.shape == (2, 32, 48, 1)
    assert np.abs(rgb[..., :1].astype(int) - luma).max() <= 2


@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"),
    reason="this PyAV cannot write a rotation",
)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_upright_as_a_player_shows_them(tmp_path, rotation):
    straight = write_movie(tmp_path / "a.mp4", 4)
    turned = write_movie(tmp_path / "b.mp4", 4, rotation=rotation)
    with open_video(straight) as a, open_video(turned) as b:
        expected = np.rot90(a.frames([2])[0], rotation // 90)
        assert np.abs(b.frames([2])[0].astype(int) - expected).mean() < 2


def test_a_folder_of_pictures_is_a_video_in_the_order_of_its_numbers(tmp_path):
    frames = numbered_frames(12)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"img_{i}.png")
    (tmp_path / "notes.txt").touch()
    with open_video(tmp_path) as video:
        assert len(video) == 12
        assert np.array_equal(video.frames([11, 2, 10]), frames[[11, 2, 10]])
    with open_video(tmp_path, 1) as video:
        assert video.frames([3]).shape == (1, 32, 48, 1)


def test_names_are_sorted_by_their_numbers():
    names = ["b10.jpg", "b9.jpg", "a.png", "b10.txt", ".b1.jpg", "b009b.jpg"]
    assert frame_names(names) == ["a.png", "b9.jpg", "b009b.jpg", "b10.jpg"]


@pytest.mark.parametrize("damage", ["empty", "text", "no end", "no video"])
def test_a_broken_file_is_an_os_error_that_names_it(tmp_path, damage):
    path = tmp_path / "broken.mp4"
    if damage == "no video":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        whole = write_movie(tmp_path / "whole.mp4").read_bytes()
        kept = {"empty": b"", "text": b"no video", "no end": whole[: len(whole) // 2]}
        path.write_bytes(kept[damage])
    with pytest.raises(OSError, match=r"broken\.mp4 cannot be decoded"):
        open_video(path)


def test_frames_lost_within_a_file_are_those_shown_in_their_place_or_an_error(tmp_path):
    path = write_movie(tmp_path / "a.mp4", g="12", bf="0")
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    try:
        with open_video(path) as video:
            assert video.frames(range(len(video))).shape[1:] == (32, 48, 3)
    except OSError as error:
        assert "a.mp4 cannot be decoded" in str(error)


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {path}\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{path}'
    "</BaseURL></MPD>",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("content", PLAYLISTS.values(), ids=PLAYLISTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a.ts"])
def test_a_list_of_other_files_is_no_video(tmp_path, name, content):
    other = write_movie(tmp_path / "other.ts", 8)
    (tmp_path / name).write_text(content.format(path=other.name))
    with pytest.raises(OSError, match=r"cannot be decoded"):
        open_video(tmp_path / name)


@pytest.mark.parametrize("address", ["concat:a.ts|b.ts", "http://127.0.0.1:9/a.mp4", "pipe:0"])
def test_an_address_is_taken_for_a_file_that_is_not_there(tmp_path, monkeypatch, address):
    write_movie(tmp_path / "a.ts", 8)
    write_movie(tmp_path / "b.ts", 8)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        open_video(address)


def test_a_file_may_have_the_name_of_an_address(tmp_path, monkeypatch):
    movie = write_movie(tmp_path / "a.mp4", 5).rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    with open_video(movie.name) as video:
        assert numbers(video.frames([4])) == [4]


def test_the_content_tells_the_format_not_the_ending(tmp_path):
    movie = write_movie(tmp_path / "a.mkv", 5).rename(tmp_path / "a.avi")
    with open_video(movie) as video:
        assert numbers(video.frames(range(5))) == [0, 1, 2, 3, 4]


def test_a_name_that_is_no_text_is_opened(tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    movie = write_movie(tmp_path / "a.mp4", 5).rename(tmp_path / name)
    with open_video(movie) as video:
        assert len(video) == 5


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")  # opening it would wait for ever
    for path, kind in ((tmp_path / "a.mp4", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"it is {kind}"):
            open_video(path)


def test_large_frames_are_scaled_down_as_they_are_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    ramp = np.linspace(0, 255, 640)[None, :, None] * np.linspace(0, 1, 360)[:, None, None]
    frames = np.repeat(np.repeat(ramp, 3, 2)[None], 4, 0).astype(np.uint8)
    write_mp4(path, frames, 8, crf="1")
    with open_video(path, short_side=90) as video:
        small = video.frames([0, 3])
    assert small.shape == (2, 90, 160, 3)
    expected = np.asarray(Image.fromarray(frames[0]).resize((160, 90), Image.Resampling.BILINEAR))
    assert np.abs(small[0].astype(int) - expected).mean() < 2
    with open_video(path, short_side=360) as same, open_video(path) as plain:
        assert np.array_equal(same.frames([1]), plain.frames([1]))


def test_clips_of_1080p_cost_no_more_than_their_scaled_frames(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(path, np.zeros((16, 1080, 1920, 3), np.uint8), 8, preset="ultrafast")
    with open_video(path, short_side=320) as video:
        tracemalloc.start()
        frames = video.frames(range(16))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert frames.shape == (16, 320, 569, 3)
    assert peak < 3 * frames.nbytes < 16 * 1080 * 1920 * 3 / 3


def test_frames_of_more_pixels_than_allowed_are_refused_before_they_are_decoded(movie, tmp_path):
    path = movie("a.mp4", dict(g="12", bf="3"))
    with open_video(path) as video:
        height, width = video.frames([0]).shape[1:3]
    open_video(path, max_pixels=height * width).__exit__()
    refused = rf"a\.mp4 cannot be decoded: its {width} x {height} pixels are more than --max_pixels"
    with pytest.raises(OSError, match=refused):
        open_video(path, max_pixels=height * width - 1)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    with pytest.raises(OSError, match="pixels are more than"):
        open_video(tmp_path, max_pixels=1000).frames([0])


def test_upright_frames_keep_their_shorter_side(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.zeros((2, 64, 32, 3), np.uint8), 8)
    with open_video(tmp_path / "a.mp4", short_side=16) as video:
        assert video.frames([1]).shape == (1, 32, 16, 3)


def test_large_pictures_of_a_folder_are_scaled_down(tmp_path):
    Image.new("RGB", (80, 40), "red").save(tmp_path / "0.png")
    with open_video(tmp_path, short_side=20) as video:
        frames = video.frames([0])
    assert frames.shape == (1, 20, 40, 3)
    assert (frames == [255, 0, 0]).all()


def test_no_such_file_and_a_folder_without_pictures_are_os_errors(tmp_path):
    with pytest.raises(OSError, match=r"nothing\.mp4 cannot be decoded"):
        open_video(tmp_path / "nothing.mp4")
    with pytest.raises(OSError, match="folder without pictures"):
        open_video(tmp_path)


def test_frames_of_different_sizes_are_an_os_error(tmp_path):
    for i, side in enumerate((8, 16)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    with open_video(tmp_path) as video, pytest.raises(OSError, match="different sizes"):
        video.frames([0, 1])


def test_what_is_written_is_read_again(tmp_path):
    frames = numbered_frames(10)
    write_mp4(tmp_path / "a.mp4", frames, 8, crf="10")
    with open_video(tmp_path / "a.mp4") as video:
        again = video.frames(range(10))
    assert np.abs(again.astype(int) - frames).mean() < 3


# --- errors of the storage -----------------------------------------------------------------------


class Failing:
    """A file whose storage answers some reads from a place on with an error."""

    def __init__(self, file, place, failures, number):
        self.file, self.place, self.failures, self.number = file, place, failures, number

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size):
        if self.failures and self.file.tell() + size > self.place:
            self.failures.pop()
            raise OSError(self.number, os.strerror(self.number))
        return self.file.read(size)


@pytest.fixture
def storage(monkeypatch):
    """Has the storage fail so many times behind a byte; returns the seconds that were waited."""
    slept = []
    monkeypatch.setattr(files.time, "sleep", slept.append)

    def fail(times, number, place=0):
        failures, opened = [number] * times, files.open_regular
        monkeypatch.setattr(
            decode, "open_regular", lambda path: Failing(opened(path), place, failures, number)
        )
        return slept

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_a_storage_that_fails_for_a_while_changes_no_frame(movie, storage, name, number):
    path = movie(name, dict(codec="mpeg4", g="12"))
    everything = decode_all(path)
    slept = storage(2, number, place=path.stat().st_size // 2)
    with open_video(path) as video:
        assert np.array_equal(video.frames([39, 3]), everything[[39, 3]])
    assert slept == [0.5, 1]


def test_a_storage_that_fails_between_opening_and_reading_changes_no_frame(movie, storage):
    path = movie("a.mp4", dict(g="12", bf="3"))
    everything = decode_all(path)
    with open_video(path) as video:
        slept = storage(2, errno.EIO)
        video.__exit__()
        assert np.array_equal(video.frames([20]), everything[[20]])
    assert slept == [0.5, 1]


def test_a_storage_that_goes_on_failing_is_no_damaged_video(movie, storage):
    path = movie("a.mp4", dict(g="12", bf="3"))
    storage(99, errno.EIO)
    with pytest.raises(TrainingError, match=r"a\.mp4 cannot be read, tried 7 times.*\(EIO\)"):
        open_video(path)


def test_too_many_open_files_are_no_damaged_video(movie, monkeypatch):
    path, soft = movie("a.mp4", dict(g="12", bf="3")), resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(files, "RETRY_DELAYS", (0,))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft[0]), soft[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(open(os.devnull))  # noqa: SIM115
        with pytest.raises(TrainingError, match=r"a\.mp4 cannot be read.*raise the limit of open"):
            open_video(path)
        taken.pop().close()
        with open_video(path) as video:
            assert numbers(video.frames([7])) == [7]
    finally:
        for file in taken:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
