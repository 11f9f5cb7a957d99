import io
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.pictures import photo
from util.data import files
from util.data.arrays import ChannelsError, open_picture
from util.data.crop import Box
from util.errors import TrainingError, UsageError

BOX = Box(3, 5, 20, 30)
TYPES = ["u1", "u2", ">u2", "i2", "u4", "i8", "f2", "f4", ">f4", "f8", "?"]


def bands(kind: str = "u2", channels: int = 7) -> np.ndarray:
    """A photograph of so many channels, `[40, 60, channels]`."""
    rgb = np.asarray(photo(40, 60)).astype("u2")
    stacked = np.concatenate([rgb, rgb[::-1] + 1, rgb[:, ::-1] // 2], axis=-1)[..., :channels]
    return stacked.astype(kind) if kind == "?" else (stacked // 2).astype(kind)


def part(array: np.ndarray) -> np.ndarray:
    """`BOX` of an array `[H, W, C]`, as `Picture.read` gives it."""
    return np.moveaxis(array, -1, 0)[:, 3:23, 5:35]


def read(path: Path, in_chans: int = 7, **options: object) -> np.ndarray:
    with open(path, "rb") as file:
        return open_picture(file, in_chans, **options).read(BOX, options.get("bands"))


def refused(error: type[Exception], match: str, path: Path, in_chans: int = 7, **options: object):
    with pytest.raises(error, match=match) as caught:
        read(path, in_chans, **options)
    assert "\n" not in str(caught.value)


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_part_of_an_npy_is_numpys(kind, tmp_path):
    array = bands(kind)
    for stored in (array, np.moveaxis(array, -1, 0).copy(), np.asfortranarray(array)):
        np.save(tmp_path / "a.npy", stored)
        np.testing.assert_array_equal(read(tmp_path / "a.npy"), part(array))


def test_bands_are_chosen_and_ordered(tmp_path):
    array = bands()
    for stored in (array, np.moveaxis(array, -1, 0)):
        np.save(tmp_path / "a.npy", stored)
        got = read(tmp_path / "a.npy", 4, bands=(3, 2, 1, 7))
        np.testing.assert_array_equal(got, part(array)[[2, 1, 0, 6]])


TIFFS = {
    "pixels": dict(planarconfig="contig"),
    "planes": dict(planarconfig="separate"),
    "pages": dict(),
    "big endian": dict(planarconfig="contig", byteorder=">"),
    "BigTIFF": dict(planarconfig="contig", bigtiff=True),
    "tiles": dict(planarconfig="contig", tile=(16, 32)),
    "LZW": dict(planarconfig="contig", compression="lzw", predictor=True),
    "deflate": dict(compression="zlib"),
}


@pytest.mark.parametrize("layout", TIFFS)
@pytest.mark.parametrize("kind", ["u1", "i2", "f4"])
def test_a_part_of_a_tiff_is_tifffiles(layout, kind, tmp_path):
    array, options = bands(kind), TIFFS[layout]
    stored = array if options.get("planarconfig") == "contig" else np.moveaxis(array, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), part(array))


def test_pages_that_pillow_wrote_are_channels(tmp_path):
    array = bands("u1", 3)
    pages = [Image.fromarray(np.ascontiguousarray(array[..., c])) for c in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read(tmp_path / "a.tif", 3), part(array))


def test_a_tiff_of_pillow_without_compression_has_its_values(tmp_path):
    image = np.asarray(photo(40, 60).convert("F")) * 1.7
    Image.fromarray(image).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif", 1), part(image[..., None]))


def test_gray_png_of_16_bits_loses_nothing(tmp_path):
    array = bands("u2", 1) * 257 + 3
    Image.fromarray(array[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), part(array))


def test_colour_png_of_16_bits_loses_nothing(tmp_path):
    cv2 = pytest.importorskip("cv2")
    array = bands("u2", 3) * 257 + 3
    cv2.imwrite(str(tmp_path / "a.png"), array[..., ::-1])
    np.testing.assert_array_equal(read(tmp_path / "a.png", 3), part(array))


@pytest.mark.parametrize("largest", [255, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pgm_and_ppm_keep_their_numbers(largest, channels, tmp_path):
    array = bands("u2", channels).clip(0, largest)
    kind, width = f"P{5 if channels == 1 else 6}", ("u1" if largest < 256 else ">u2")
    header = f"{kind}\n# of a microscope\n60 40\n# and\n{largest}\n".encode()
    (tmp_path / "a.pgm").write_bytes(header + array.astype(width).tobytes())
    np.testing.assert_array_equal(read(tmp_path / "a.pgm", channels), part(array))


def test_a_pgm_of_pillow_keeps_16_bits(tmp_path):
    array = bands("u2", 1) * 257 + 3
    Image.fromarray(array[..., 0]).save(tmp_path / "a.pgm")
    np.testing.assert_array_equal(read(tmp_path / "a.pgm", 1), part(array))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_numbers_of_a_palette_are_its_colours(name, tmp_path):
    photo(40, 60).quantize(16).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(
            read(tmp_path / name, 3), part(np.asarray(image.convert("RGB")))
        )
    refused(ChannelsError, "it has 3 channels, not --in_chans 1", tmp_path / name, 1)


TAGS = {"-9999": -9999, " 0 ": 0, "-3.4028234663852886e+38": -3.4028234663852886e38, "none": None}


@pytest.mark.parametrize("text", TAGS)
@pytest.mark.parametrize("options", [dict(tile=(16, 32)), dict(compression="zlib")])
def test_a_geotiff_says_what_stands_for_no_data(text, options, tmp_path):
    tag = (42113, "s", 0, text, True)  # GDAL's
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        options = options | dict(metadata=None, photometric="minisblack", planarconfig="contig")
        tiff.write(bands("i2"), extratags=[tag], **options)
        tiff.write(bands("i2")[::2, ::2], subfiletype=1, **options)  # an overview
    with open(tmp_path / "a.tif", "rb") as file:
        picture = open_picture(file, 7)
        assert picture.nodata == TAGS[text] and picture.size == (60, 40)


def test_a_jpeg_is_an_array_of_8_bits(tmp_path):
    photo(40, 60).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read(tmp_path / "a.jpg", 3), part(np.asarray(image)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_one_array_needs_no_key_and_one_of_several_does(save, tmp_path):
    array = bands()
    save(tmp_path / "one.npz", array)
    save(tmp_path / "two.npz", scene=array, mask=array[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "one.npz"), part(array))
    np.testing.assert_array_equal(read(tmp_path / "two.npz", array_key="scene"), part(array))
    refused(ChannelsError, "2 arrays .mask, scene.: --array_key", tmp_path / "two.npz")
    refused(ChannelsError, "no array x, but", tmp_path / "two.npz", array_key="x")


def test_content_decides_and_not_the_name(tmp_path):
    array = bands()
    with open(tmp_path / "a.tif", "wb") as file:
        np.save(file, array)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), part(array))


def test_axes_of_length_1_are_left_away(tmp_path):
    array = bands()
    np.save(tmp_path / "a.npy", array[None])
    np.testing.assert_array_equal(read(tmp_path / "a.npy"), part(array))


class Counting(io.FileIO):
    """A file that counts the bytes read of it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.total += count
        return count


@pytest.mark.parametrize("shape", [(40_000, 36_000, 7), (7, 40_000, 36_000)])
def test_a_crop_of_a_sparse_file_of_10_gb_reads_the_crop(shape, tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape, dtype=object)))
    raw = Counting(tmp_path / "a.npy")
    with io.BufferedReader(raw) as file:
        picture = open_picture(file, 7, max_pixels=2_000_000_000)
        crop = picture.read(Box(39_000, 20_000, 224, 224))
    assert crop.shape == (7, 224, 224)
    # What the buffer reads beyond each row is all that is too much.
    assert raw.total <= crop.nbytes + 7 * 224 * 2 * io.DEFAULT_BUFFER_SIZE < 30e6


# --- what is refused -----------------------------------------------------------------------------


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.save(tmp_path / "a.npy", np.array([Hostile()] * 3, object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([Hostile()] * 3, object))
    for name in ("a.npy", "a.npz"):
        refused(OSError, "pickled Python objects, which are not loaded", tmp_path / name)
    assert not (tmp_path / "ran").exists()


SHAPES = {
    "either way": ((7, 40, 7), {}, "may be channels first or last: --layout chw or hwc"),
    "neither way": ((40, 60, 5), {}, "has no 7 channels first or last"),
    "bands in no shortest axis": ((40, 40, 40), {"bands": (1, 2)}, "has no 2 bands or more"),
    "a band that is not there": ((40, 60, 4), {"bands": (1, 5)}, "4 channels, and no band 5"),
    "one channel": ((40, 60), {}, "1 channels, not --in_chans 7"),
    "four axes": ((2, 7, 40, 60), {}, "is not one of rows, columns and channels"),
    "empty": ((0, 60, 7), {}, "it is empty"),
    "too large": ((40, 60, 7), {"max_pixels": 100}, "60 x 40 pixels are more than --max_pixels"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_shape_that_does_not_fit_is_refused(kind, tmp_path):
    shape, options, match = SHAPES[kind]
    np.save(tmp_path / "a.npy", np.zeros(shape, "u1"))
    refused(OSError, match, tmp_path / "a.npy", **options)


def test_the_layout_settles_what_the_shape_leaves_open(tmp_path):
    array = np.random.default_rng(0).random((7, 40, 7))
    np.save(tmp_path / "a.npy", array)
    with open(tmp_path / "a.npy", "rb") as file:
        assert open_picture(file, 7, layout="chw").size == (7, 40)
        assert open_picture(file, 7, layout="hwc").size == (40, 7)


@pytest.mark.parametrize("kind", ["c8", "S3", "M8[s]"])
def test_what_are_no_numbers_is_refused(kind, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((40, 60, 7), kind))
    refused(OSError, "not integers or floats", tmp_path / "a.npy")


def test_a_file_cut_short_is_refused_even_where_the_crop_is_whole(tmp_path):
    np.save(tmp_path / "a.npy", bands())
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-1])
    refused(OSError, "it ends before its 33600 bytes", tmp_path / "a.npy")


def test_damage_anywhere_is_an_error_of_one_line(tmp_path):
    array = bands()
    np.savez_compressed(tmp_path / "a.npz", array)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig")
    Image.fromarray(array[..., 0]).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    for name in ("a.npz", "a.tif", "a.png"):
        content = (tmp_path / name).read_bytes()
        for _ in range(10):
            damaged = bytearray(content[: rng.integers(len(content))])
            damaged[-1:] = b"\0"
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(OSError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(tmp_path / name, 1 if name == "a.png" else 7)


def test_a_small_zip_of_a_huge_array_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.npy", "w", force_zip64=True) as member:
            member.write(b"\0")
        archive.filelist[0].file_size = 1 << 40
    refused(OSError, "has more than 1073741824", tmp_path / "a.npz")


def test_a_compressed_tiff_without_imagecodecs_says_what_to_install(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", bands()[..., 0], compression="lzw")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tifffile"]:
        monkeypatch.delitem(sys.modules, name)  # it is imported anew, without
    refused(UsageError, r"compressed \(LZW\).*requirements-arrays.txt", tmp_path / "a.tif", 1)


def test_storage_that_fails_is_tried_again_and_then_ends_the_run(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", bands())
    failures, limit = [], 2

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if len(failures) < limit:
                failures.append(1)
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    monkeypatch.setattr(files, "RETRY_DELAYS", (0, 0))
    with io.BufferedReader(Failing(tmp_path / "a.npy")) as file:
        assert open_picture(file, 7).read(BOX).shape == (7, 20, 30)
    assert len(failures) == 2
    limit = 100
    with (
        io.BufferedReader(Failing(tmp_path / "a.npy")) as file,
        pytest.raises(TrainingError, match="tried 3 times"),
    ):
        open_picture(file, 7)
