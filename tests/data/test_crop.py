import contextlib
import json
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from tests.pictures import photo
from util.data import crop
from util.data.crop import Box, clamped_box, load_crop, random_box, resize_crop
from util.data.datasets import seeded
from util.data.images import load_image


def whole(image: Image.Image) -> Box:
    return Box(0, 0, image.height, image.width)


def part(image: Image.Image) -> Box:
    """A part that lies on no block boundary."""
    return Box(31, 17, image.height - 60, image.width - 45)


def crop_of(path: Path, choose=part, size=(96, 112), in_chans=3) -> torch.Tensor:
    with open(path, "rb") as file:
        return load_crop(file, choose, size, in_chans)


def expected(path: Path, size=(96, 112), in_chans=3) -> torch.Tensor:
    """The same from the picture of `load_image`, by the same resizing."""
    image = load_image(path, in_chans)
    pixels = np.asarray(image).reshape(image.height, image.width, in_chans)
    return resize_crop(pixels.copy(), part(image), size)


@pytest.fixture
def general(monkeypatch) -> list[int]:
    """The number of times that the general path was taken."""
    calls = [0]

    def counted(*args):
        calls[0] += 1
        return load_image(*args)

    monkeypatch.setattr(crop, "load_image", counted)
    return calls


PLAIN = {
    "default": {},
    "progressive": {"progressive": True},
    "full chroma": {"subsampling": 0},
    "half chroma": {"subsampling": 1},
    "restart markers": {"restart_marker_blocks": 4},
    "several pictures": {"format": "MPO", "save_all": True, "append_images": [photo(30, 40)]},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_has_the_pixels_of_load_image(tmp_path, general, kind):
    photo(181, 243).save(tmp_path / "a.jpg", **PLAIN[kind])
    assert torch.equal(crop_of(tmp_path / "a.jpg"), expected(tmp_path / "a.jpg"))
    assert general == [0]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_gray_jpeg_is_as_plain(tmp_path, general, in_chans):
    photo(181, 243).convert("L").save(tmp_path / "a.jpg")
    got = crop_of(tmp_path / "a.jpg", in_chans=in_chans)
    assert torch.equal(got, expected(tmp_path / "a.jpg", in_chans=in_chans))
    assert general == [0]


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[ExifTags.Base.Orientation] = orientation
    return values


ODD = {
    "png": lambda path: photo(181, 243).save(path, "PNG"),
    "webp": lambda path: photo(181, 243).save(path, "WEBP"),
    "palette": lambda path: photo(181, 243).quantize(32).save(path, "PNG", transparency=3),
    "cmyk": lambda path: photo(181, 243).convert("CMYK").save(path, "JPEG"),
    "rotated": lambda path: photo(181, 243).save(path, "JPEG", exif=exif(6)),
    "mirrored": lambda path: photo(181, 243).save(path, "JPEG", exif=exif(5)),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_any_other_file_is_read_by_load_image(tmp_path, general, kind, in_chans):
    ODD[kind](tmp_path / "a")
    got = crop_of(tmp_path / "a", in_chans=in_chans)
    assert torch.equal(got, expected(tmp_path / "a", in_chans=in_chans))
    assert general == [1]


@pytest.mark.parametrize("in_chans", [1, 4])
def test_a_colour_jpeg_in_other_channels_is_read_by_load_image(tmp_path, general, in_chans):
    photo(181, 243).save(tmp_path / "a.jpg")
    got = crop_of(tmp_path / "a.jpg", in_chans=in_chans)
    assert torch.equal(got, expected(tmp_path / "a.jpg", in_chans=in_chans))
    assert general == [1]


@pytest.mark.parametrize("whole", [True, False], ids=["sound", "truncated"])
def test_a_png_is_opened_once(monkeypatch, whole):
    file, opened = BytesIO(), []
    photo(60, 80).save(file, "PNG")
    data = file.getvalue()
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    with contextlib.nullcontext() if whole else pytest.raises(OSError, match="cannot be decoded"):
        view = load_crop(
            BytesIO(data if whole else data[: len(data) // 2]),
            lambda _: Box(0, 0, 60, 80),
            (60, 80),
        )
        assert view.shape == (3, 60, 80)
    assert len(opened) == 1


def test_an_upright_jpeg_with_metadata_is_plain(tmp_path, general):
    photo(181, 243).save(tmp_path / "a.jpg", exif=exif(1))
    crop_of(tmp_path / "a.jpg")
    assert general == [0]


def test_a_damaged_jpeg_comes_out_as_load_image_has_it(tmp_path):
    photo(181, 243).save(tmp_path / "a.jpg")
    whole, draw, outcomes = (tmp_path / "a.jpg").read_bytes(), np.random.default_rng(0), set()
    for _ in range(60):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(256)
        (tmp_path / "a.jpg").write_bytes(data)
        try:
            want = expected(tmp_path / "a.jpg")
        except OSError:
            with pytest.raises(OSError, match=r"a\.jpg cannot be decoded"):
                crop_of(tmp_path / "a.jpg")
            outcomes.add("error")
        else:
            assert torch.equal(crop_of(tmp_path / "a.jpg"), want)
            outcomes.add("picture")
    assert outcomes == {"error", "picture"}


@pytest.mark.parametrize("cut", [1, 2, 500, 6000])
def test_a_truncated_jpeg_is_refused_by_its_name(tmp_path, cut):
    path = tmp_path / "a.jpg"
    photo(181, 243).save(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(OSError, match=f"{path} cannot be decoded"):
        crop_of(path)


# --- large files ---------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    """Sizes at which JPEGs were decoded."""
    sizes, decode = [], simplejpeg.decode_jpeg

    def recorded(*args, **kwargs):
        pixels = decode(*args, **kwargs)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    return sizes


@pytest.mark.parametrize(
    ("side", "expected"), [(31, (63, 88)), (62, (126, 176)), (125, (251, 351)), (126, (501, 701))]
)
def test_a_jpeg_is_decoded_no_smaller_than_twice_the_result(tmp_path, decoded, side, expected):
    photo(501, 701).save(tmp_path / "a.jpg")
    assert crop_of(tmp_path / "a.jpg", whole, (side, side)).shape == (3, side, side)
    assert decoded == [expected]


def test_the_crop_decides_how_small(tmp_path, decoded):
    photo(501, 701).save(tmp_path / "a.jpg")
    crop_of(tmp_path / "a.jpg", lambda image: Box(90, 80, 130, 260), (32, 32))
    assert decoded == [(251, 351)]


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_crop_is_close_to_that_of_the_full_size(tmp_path, decoded, factor):
    photo(1203, 1601).save(tmp_path / "a.jpg", quality=95)
    box, side = Box(304, 400, 800, 640), 640 // factor // 2
    got = crop_of(tmp_path / "a.jpg", lambda image: box, (side, side)).float()
    assert decoded == [(-(-1203 // factor), -(-1601 // factor))]
    pixels = np.array(load_image(tmp_path / "a.jpg"))
    difference = (got - resize_crop(pixels, box, (side, side)).float()).abs()
    assert difference.mean() < 1.2 and difference.quantile(0.99) < 6


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_crop_moves_by_half_a_reduced_pixel_at_most(factor):
    draw = np.random.default_rng(factor)
    for _ in range(100):
        top, left, height, width = (int(n) for n in draw.integers(100, 1000, 4))
        small = Box(top, left, height, width).reduced(factor)
        assert abs(small.top * factor - top) <= factor / 2
        assert abs(small.left * factor - left) <= factor / 2
        assert abs((small.top + small.height) * factor - top - height) <= factor / 2
        assert abs((small.left + small.width) * factor - left - width) <= factor / 2


def test_resizing_is_pillow_s_up_to_rounding():
    image, box = photo(375, 500), Box(20, 40, 310, 290)
    got = resize_crop(np.array(image), box, (224, 192)).int()
    area = (box.left, box.top, box.left + box.width, box.top + box.height)
    want = np.array(image.crop(area).resize((192, 224), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got.movedim(0, -1).numpy() - want).max() <= 2


def test_a_file_without_a_picture_is_refused():
    file = BytesIO(b"no picture")
    file.name = "a.jpg"
    with pytest.raises(OSError, match=r"a\.jpg cannot be decoded"):
        partial(load_crop, choose=whole, size=(8, 8))(file)


# --- random boxes --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (1000, 200), (60, 400)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_boxes_have_the_distribution_of_torchvision_s(size, scale):
    image, count = Image.new("L", size), 3000
    reference = partial(RandomResizedCrop.get_params, image, list(scale), [3 / 4, 4 / 3])
    with seeded(0):
        ours = np.array([random_box(image, scale) for _ in range(count)], float)
        theirs = np.array([reference() for _ in range(count)], float)
    width, height = size
    for boxes in (ours, theirs):
        assert (boxes[:, 0] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] >= 0).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
    for of in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # proportions
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert ks_2samp(of(ours), of(theirs)).pvalue > 1e-3


def test_boxes_take_the_shares_asked_for():
    with seeded(0):
        boxes = np.array([random_box(Image.new("L", (400, 400)), (0.3, 0.5)) for _ in range(500)])
    shares = boxes[:, 2] * boxes[:, 3] / 400**2
    assert 0.29 < shares.min() < 0.31 and 0.49 < shares.max() < 0.51


# --- the crop of the linear probe ----------------------------------------------------------------

LAW = json.loads(Path("tests/golden/probe_crop.json").read_text())


@pytest.mark.parametrize("size", LAW)
def test_the_probe_s_crops_have_the_law_of_the_original(size):
    law, (width, height) = LAW[size], map(int, size.split("x"))
    image = Image.new("L", (width, height))
    with seeded(0):
        boxes = np.array([clamped_box(image, (0.08, 1.0)) for _ in range(law["draws"])], float)
    area = boxes[:, 2] * boxes[:, 3] / (width * height)
    assert area.mean() == pytest.approx(law["mean_area"], abs=0.006)
    quantiles = law["area_quantiles_5_25_50_75_95"]
    assert np.quantile(area, [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx(quantiles, abs=0.015)
    assert (boxes[:, 3] == width).mean() == pytest.approx(law["share_full_width"], abs=0.015)
    assert (boxes[:, 2] == height).mean() == pytest.approx(law["share_full_height"], abs=0.015)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (500, 375)])
def test_the_probe_s_crops_lie_within_the_image_anywhere(size):
    with seeded(0):
        boxes = np.array([clamped_box(Image.new("L", size), (0.08, 1.0)) for _ in range(500)])
    width, height = size
    assert (boxes >= (0, 0, 1, 1)).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 0] == 0).any()
    assert (boxes[:, 0] + boxes[:, 2] == height).any()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all() and (boxes[:, 1] == 0).any()
