import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin

from tests.pictures import decode, noisy, picture, write_pictures
from util.data.classes import check_classes
from util.data.datasets import ImageFiles, LabeledImages, seeded
from util.data.folders import find_train_folder, list_images
from util.data.images import load_image, open_image
from util.errors import TrainingError, UsageError

# What a camera does to an upright picture so that orientation 2…8 turns it back.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
NO_IMAGE = "it is no sound file of JPEG, PNG, PPM, BMP, TIFF, WEBP"
LOSSLESS = {"png": {}, "bmp": {}, "tiff": {}, "webp": {"lossless": True}, "ppm": {}}


def pixels(path: Path, in_chans: int = 3) -> np.ndarray:
    return np.asarray(load_image(path, in_chans))


# --- one file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", LOSSLESS)
def test_a_lossless_file_comes_back_exactly(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    picture().save(path, **LOSSLESS[ending])
    assert np.array_equal(pixels(path), np.asarray(picture()))


def test_a_jpeg_comes_back_nearly(tmp_path):
    picture().save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - np.asarray(picture())).max() <= 2


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_a_rotated_file_equals_its_upright_original(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{ending}"
    options = LOSSLESS.get(ending, {"quality": 100, "subsampling": 0})
    picture().transpose(STORED_AS[orientation]).save(path, exif=exif, **options)
    got = pixels(path).astype(int)
    assert got.shape == (24, 40, 3)
    assert np.abs(got - np.asarray(picture())).max() <= (2 if ending == "jpg" else 0)


def test_damaged_metadata_do_not_spoil_a_picture(tmp_path):
    picture().save(tmp_path / "a.png", exif=b"Exif\x00\x00 broken")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture()))


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (200, 0, 0, 255)
    rgba[:, 2:4] = (200, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")
    assert (got[:, :2] == 255).all()
    assert (got[:, 4:] == (200, 0, 0)).all()
    assert np.abs(got[:, 2:4].astype(int) - (227, 127, 127)).max() <= 1


def test_transparent_grayscale_is_white(tmp_path):
    gray = np.zeros((8, 8, 2), np.uint8)
    gray[:, 4:] = (90, 255)
    Image.fromarray(gray, "LA").save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")
    assert (got[:, :4] == 255).all() and (got[:, 4:] == 90).all()


def test_a_palette_gives_its_colours(tmp_path):
    palette = picture().quantize(256)
    palette.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture()))


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_s_transparent_colour_is_white(tmp_path, transparency):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (4, 0, 8, 8))
    palette.save(tmp_path / "a.png", transparency=transparency)
    got = pixels(tmp_path / "a.png")
    assert (got[:, :4] == 255).all() and (got[:, 4:] == (40, 50, 60)).all()


def test_alpha_is_kept_when_four_channels_are_asked_for(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    picture().save(tmp_path / "opaque.png")
    assert np.array_equal(pixels(tmp_path / "a.png", 4), rgba)
    assert (pixels(tmp_path / "opaque.png", 4)[..., 3] == 255).all()


def test_a_cmyk_jpeg_shows_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    got = pixels(tmp_path / "red.jpg").astype(int)
    assert np.abs(got - (255, 0, 0)).max() <= 3


def test_grayscale_is_the_same_in_all_three_channels(tmp_path):
    gray = picture().convert("L")
    gray.save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")
    assert np.array_equal(got, np.repeat(np.asarray(gray)[..., None], 3, axis=2))


def test_black_and_white_is_read(tmp_path):
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png", 1), np.eye(8, dtype=np.uint8) * 255)


def test_colour_becomes_grayscale_when_one_channel_is_asked_for(tmp_path):
    picture().save(tmp_path / "a.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "white.jpg")
    assert np.array_equal(pixels(tmp_path / "a.png", 1), np.asarray(picture().convert("L")))
    assert (pixels(tmp_path / "white.jpg", 1) >= 253).all()


@pytest.mark.parametrize("ending", ["png", "tiff"])
@pytest.mark.parametrize("factor", [256, 257])
def test_a_16_bit_file_equals_its_8_bit_version(tmp_path, ending, factor):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray.astype(np.uint16) * factor).save(tmp_path / f"a.{ending}")
    assert Image.open(tmp_path / f"a.{ending}").mode == "I;16"
    assert np.array_equal(pixels(tmp_path / f"a.{ending}", 1), gray)


def test_big_endian_16_bit_is_read(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    big = Image.frombytes("I;16B", (16, 16), (gray.astype(">u2") * 257).tobytes())
    big.save(tmp_path / "a.tiff")
    assert np.array_equal(pixels(tmp_path / "a.tiff", 1), gray)


def test_a_16_bit_netpbm_file_equals_its_8_bit_version(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    body = (gray.astype(">u2") * 257).tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + body)
    assert np.array_equal(pixels(tmp_path / "a.pgm", 1), gray)


@pytest.mark.parametrize(
    "values", [np.linspace(0, 1, 256, dtype=np.float32), np.arange(256, dtype=np.int32) * 8000000]
)
def test_values_without_an_agreed_range_span_black_to_white(tmp_path, values):
    Image.fromarray(values.reshape(16, 16)).save(tmp_path / "a.tiff")
    got = pixels(tmp_path / "a.tiff", 1).reshape(-1).astype(int)
    assert np.abs(got - np.arange(256)).max() <= 1


def test_other_numbers_of_channels_are_refused(tmp_path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"2 channels are not supported: use 1 .* 3 .* or 4"):
        load_image(tmp_path / "a.png", 2)


def test_a_large_profile_or_note_within_a_file_spoils_no_picture(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("history", "x" * 3_000_000, zip=True)
    picture().save(tmp_path / "a.png", pnginfo=note, icc_profile=bytes(3_000_000))
    assert np.array_equal(load_image(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("ending", ["jpg", *LOSSLESS])
def test_a_truncated_file_is_an_error(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.save(path, **LOSSLESS.get(ending, {}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"a\.\w+ cannot be decoded"):
        load_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"no picture, but text", b"\x89PNG\r\n\x1a\n" + b"x" * 99]
)
def test_a_file_that_is_no_image_is_an_error(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"a\.jpg cannot be decoded"):
        load_image(tmp_path / "a.jpg")


def test_a_larger_image_than_allowed_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_pixels=960).size == (40, 24)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(OSError, match=r"40 x 24 pixels are more than --max_pixels 959$"):
        load_image(tmp_path / "a.png", max_pixels=959)


def test_the_default_takes_what_cameras_make_and_no_bomb(tmp_path):
    for name, size in {"camera": (12000, 9000), "bomb": (13000, 13000)}.items():
        Image.new("1", size).save(tmp_path / f"{name}.png")
    with open(tmp_path / "camera.png", "rb") as file:
        assert open_image(file).size == (12000, 9000)
    with open(tmp_path / "bomb.png", "rb") as file, pytest.raises(OSError, match="13000 x 13000"):
        open_image(file)


def test_more_pixels_than_pillow_takes_can_be_allowed(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    with open(tmp_path / "large.png", "rb") as file:
        assert open_image(file, 200_000_000).size == (20000, 10000)
    with pytest.raises(Image.DecompressionBombError):  # who opens it otherwise is as safe as before
        Image.open(tmp_path / "large.png")


@pytest.mark.parametrize("name", ["EPS", "GIF", "PDF", "ICO", "TGA"])
def test_content_of_another_format_is_refused_whatever_the_ending(tmp_path, monkeypatch, name):
    picture().save(tmp_path / "photo.jpg", name)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program"))
    with pytest.raises(OSError, match=f"photo.jpg cannot be decoded: {NO_IMAGE}"):
        load_image(tmp_path / "photo.jpg")


def test_the_content_counts_and_not_the_ending(tmp_path):
    picture().save(tmp_path / "photo.jpg", "PNG")
    assert np.array_equal(pixels(tmp_path / "photo.jpg"), np.asarray(picture()))


def test_a_high_transparent_image_is_composited_as_pillow_does_it(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (700, 5, 4), np.uint8)
    image = Image.fromarray(rgba)
    image.save(tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for mode, in_chans in (("RGB", 3), ("L", 1)):
        assert np.array_equal(pixels(tmp_path / "a.png", in_chans), white.convert(mode))


def test_a_high_16_bit_image_keeps_its_upper_bytes(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (700, 5), np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png", 1), values // 256)


# --- a folder ----------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_and_sorted(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/deep/er/x.webp", "c.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", ".hidden.png", "a/._b.jpg"):
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)]
    assert found == ["a/deep/er/x.webp", "a/z.JPG", "b.png", "c.tiff"]


def test_links_are_followed_and_loops_end(tmp_path):
    write_pictures(tmp_path / "elsewhere", 3)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    assert [Path(path).name for path in list_images(root)] == ["000.png", "001.png", "002.png"]


def test_train_is_read_where_it_exists(tmp_path):
    write_pictures(tmp_path / "train" / "cat", 2)
    write_pictures(tmp_path / "val" / "cat", 5)
    assert find_train_folder(tmp_path) == tmp_path / "train"
    assert find_train_folder(tmp_path / "val") == tmp_path / "val"
    assert len(ImageFiles(find_train_folder(tmp_path), decode)) == 2


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone does not exist: give a folder of images"):
        list_images(tmp_path / "gone")


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "data.tar").touch()
    with pytest.raises(UsageError, match=r"data\.tar is not a folder"):
        list_images(tmp_path / "data.tar")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.tar", "b.tar", "sub/c.npy"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"\.jpg, .*\.webp, but .* \(2 of \.tar, 1 of \.npy\)"):
        list_images(tmp_path)


def test_a_folder_of_empty_folders_says_so(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="it holds no file at all"):
        list_images(tmp_path)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    write_pictures(tmp_path / "locked", 1)

    def scandir(path, real=os.scandir):
        if str(path).endswith("locked"):  # `chmod` would not stop a test that runs as root.
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"cannot read .*locked: Permission denied"):
        list_images(tmp_path)


def test_files_that_are_left_out_are_counted_by_their_endings(tmp_path):
    write_pictures(tmp_path / "a", 2)
    (tmp_path / "a" / ".cache").mkdir()
    for name in ("x.gif", "y.gif", "a/.DS_Store", "a/notes", "z.HEIC", "a/.cache/b.png"):
        (tmp_path / name).touch()
    line = ImageFiles(tmp_path, decode).left_out
    assert line.startswith(f"left out of {tmp_path}: ")
    counts = set(line.removeprefix(f"left out of {tmp_path}: ").split(", "))
    assert counts == {"2 of .gif", "2 hidden", "1 without an ending", "1 of .HEIC"}


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    assert ImageFiles(write_pictures(tmp_path, 2), decode).left_out == ""


def test_names_that_are_no_utf_8_are_read_and_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    write_pictures(Path(os.fsdecode(folder)), 2)
    os.rename(folder + b"/001.png", folder + b"/\xff.png")
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"")
    data = LabeledImages(tmp_path, decode)
    assert data.classes == ["caf\udce9"]
    *_, bad = data[1, 0]
    assert bad[0] == (1, NO_IMAGE) and os.fsencode(data.path(1)) == folder + b"/\xff.png"


# --- an item -----------------------------------------------------------------------------------


def test_an_item_is_a_function_of_index_and_seed(tmp_path):
    data = ImageFiles(write_pictures(tmp_path, 3), noisy)
    first, bad = data[1, 7]
    assert bad == ()
    assert torch.equal(first, data[1, 7][0])
    assert not torch.equal(first, data[1, 8][0])
    assert not torch.equal(first, data[2, 7][0])


def test_an_item_leaves_the_random_state_alone(tmp_path):
    data = ImageFiles(write_pictures(tmp_path, 3), noisy)

    def draw(read: bool) -> list[float]:
        with seeded(3):
            values = []
            for _ in range(3):
                if read:
                    data[1, 7]
                values += [torch.rand(1).item(), np.random.rand(), random.random()]
            return values

    assert draw(read=True) == draw(read=False)


def test_the_random_state_is_restored_after_an_error():
    with seeded(3):
        expected = torch.rand(1), np.random.rand(), random.random()
    with seeded(3):
        with pytest.raises(KeyError), seeded(9):
            raise KeyError
        assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_a_bad_file_is_replaced_by_the_same_image_for_the_same_seed(tmp_path):
    data = ImageFiles(write_pictures(tmp_path, 8), decode)
    (tmp_path / "002.png").write_bytes(b"")
    image, bad = data[2, 5]
    assert bad[0] == (2, NO_IMAGE)
    assert torch.equal(image, data[2, 5][0])
    good = [data[i, 0][0] for i in range(8) if i != 2]
    assert any(torch.equal(image, other) for other in good)
    substitutes = [data[2, seed][0] for seed in range(8)]
    assert any(not torch.equal(image, other) for other in substitutes)


def test_a_folder_of_nothing_but_bad_files_is_given_up(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"10 files in a row .*a\.png cannot be decoded"):
        ImageFiles(tmp_path, decode)[0, 0]


def test_an_error_of_the_transform_is_not_taken_for_a_bad_file(tmp_path):
    def broken(file):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ImageFiles(write_pictures(tmp_path, 1), broken)[0, 0]


# --- class folders -------------------------------------------------------------------------------


def write_classes(folder: Path, **counts: int) -> Path:
    for name, count in counts.items():
        write_pictures(folder / name, count)
    return folder


def test_labels_are_the_places_of_the_sorted_folder_names(tmp_path):
    data = LabeledImages(write_classes(tmp_path, cat=2, ant=1, bee=3), decode)
    assert data.classes == ["ant", "bee", "cat"]
    assert [(Path(data.path(i)).parent.name, label) for i, label in enumerate(data.labels)] == [
        *[("ant", 0)], *[("bee", 1)] * 3, *[("cat", 2)] * 2,
    ]  # fmt: skip


def test_images_below_a_class_folder_have_its_label(tmp_path):
    write_classes(tmp_path, ant=1)
    write_pictures(tmp_path / "bee" / "black" / "small", 2)
    assert LabeledImages(tmp_path, decode).labels.tolist() == [0, 1, 1]


def test_hidden_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, ant=1)
    write_pictures(tmp_path / ".ipynb_checkpoints", 1)
    assert LabeledImages(tmp_path, decode).classes == ["ant"]


def test_a_labeled_item_says_which_index_it_is(tmp_path):
    data = LabeledImages(write_classes(tmp_path, ant=1, bee=1), decode)
    image, label, index, bad = data[1, 0]
    assert (label, index, bad) == (1, 1, ())
    assert np.array_equal(image.movedim(0, -1), np.asarray(picture(0)))


def test_a_substitute_comes_with_its_own_label(tmp_path):
    data = LabeledImages(write_classes(tmp_path, ant=1, bee=1), decode)
    (tmp_path / "ant" / "000.png").write_bytes(b"no picture")
    label, index, bad = next(item[1:] for seed in range(9) for item in [data[0, seed]])
    assert (label, index, set(bad)) == (1, 0, {(0, NO_IMAGE)})


def test_relative_and_dotted_paths_have_labels_too(tmp_path, monkeypatch):
    write_classes(tmp_path / "data", ant=1, bee=1)
    monkeypatch.chdir(tmp_path / "data")
    for root in (".", "../data", "./"):
        assert LabeledImages(root, decode).labels.tolist() == [0, 1]


def test_a_folder_without_class_folders_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no class folders"):
        LabeledImages(write_pictures(tmp_path, 2), decode)


def test_images_beside_the_class_folders_are_refused(tmp_path):
    write_pictures(write_classes(tmp_path, ant=1), 2)
    with pytest.raises(UsageError, match=r"2 images of .* outside .*\(first: .*000\.png\)"):
        LabeledImages(tmp_path, decode)


def test_a_class_without_images_is_named(tmp_path):
    data = LabeledImages(write_classes(tmp_path, ant=1, bee=0), decode)
    with pytest.raises(UsageError, match="no image in bee"):
        data.check_complete()


def test_equal_classes_are_accepted():
    check_classes(["a", "b"], ["a", "b"], "the model", "val")


@pytest.mark.parametrize(
    ("known", "found", "message"),
    [
        ("abc", "ab", r"2 here, 3 there; it lacks c \(an empty folder stands"),
        ("ab", "abc", "3 here, 2 there; it has c, which are not there"),
        ("abc", "abd", "it lacks c; it has d, which are not there"),
        ("abc", "acb", "same names in another order.*output 1 is b there, c here"),
        ("abcdef", "a", "it lacks b, c, d and 2 more"),
    ],
)
def test_other_classes_are_refused_with_the_difference(known, found, message):
    with pytest.raises(
        UsageError, match=f"val does not hold the classes of the model: .*{message}"
    ):
        check_classes(known, found, "the model", "val")
