import os
import random
import signal
import time
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import v2

from util import datasets
from util.datasets import (
    BadImages,
    ImageFiles,
    Loader,
    StepSampler,
    channel_stats,
    collate,
    denormalize,
    eval_transform,
    find_train_folder,
    list_images,
    load_image,
    pretrain_transform,
    seeded,
)
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
LOSSLESS = {"png": {}, "bmp": {}, "tiff": {}, "webp": {"lossless": True}, "ppm": {}}


def picture(seed: int = 0, height: int = 24, width: int = 40) -> Image.Image:
    """Coloured squares: no two pictures are alike, and none looks like its mirror image."""
    squares = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8)))


def pixels(path: Path, in_chans: int = 3) -> np.ndarray:
    return np.asarray(load_image(path, in_chans))


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:03d}.png")
    return folder


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


def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="decompression bomb"):
        load_image(tmp_path / "a.png")


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
    assert len(ImageFiles(tmp_path, v2.PILToTensor())) == 2


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


# --- an item -----------------------------------------------------------------------------------


def noisy(image: Image.Image) -> torch.Tensor:
    """Draws from every generator that an augmentation may use."""
    noise = torch.rand(1).item() + np.random.rand() + random.random()
    return v2.functional.pil_to_tensor(image).float() + noise


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
    data = ImageFiles(write_pictures(tmp_path, 8), v2.PILToTensor())
    (tmp_path / "002.png").write_bytes(b"")
    image, bad = data[2, 5]
    assert bad[0] == 2
    assert torch.equal(image, data[2, 5][0])
    good = [data[i, 0][0] for i in range(8) if i != 2]
    assert any(torch.equal(image, other) for other in good)
    substitutes = [data[2, seed][0] for seed in range(8)]
    assert any(not torch.equal(image, other) for other in substitutes)


def test_a_folder_of_nothing_but_bad_files_is_given_up(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"10 files in a row .*a\.png cannot be decoded"):
        ImageFiles(tmp_path, v2.PILToTensor())[0, 0]


def test_an_error_of_the_transform_is_not_taken_for_a_bad_file(tmp_path):
    def broken(image):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ImageFiles(write_pictures(tmp_path, 1), broken)[0, 0]


def test_collate_stacks_images_and_merges_bad_files():
    images, bad = collate([(torch.zeros(3, 2, 2), (5, 1)), (torch.ones(3, 2, 2), (1,))])
    assert images.shape == (2, 3, 2, 2) and images[1].eq(1).all()
    assert bad == [1, 5]


def test_collate_keeps_labels():
    _, labels, bad = collate([(torch.zeros(1), 4, ()), (torch.zeros(1), 2, ())])
    assert labels.tolist() == [4, 2] and bad == []


# --- the order ---------------------------------------------------------------------------------


def steps(epoch: int = 0, start_step: int = 0, *, processes: int = 1, **kwargs) -> list[list]:
    """What all processes together see in each step, micro-batch by micro-batch, rank by rank."""
    samplers = [
        StepSampler(100, rank=rank, world_size=processes, seed=3, **kwargs)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch, start_step)
    parts = [part for micro_batch in zip(*samplers, strict=True) for part in micro_batch]
    count = processes * kwargs.get("accum_iter", 1)
    return [list(chain(*parts[i : i + count])) for i in range(0, len(parts), count)]


def test_two_processes_with_half_the_batch_see_what_one_sees():
    assert steps(batch_size=8, processes=2) == steps(batch_size=16)


def test_accumulation_sees_what_one_batch_sees():
    assert steps(batch_size=4, accum_iter=4) == steps(batch_size=16)
    assert steps(batch_size=4, accum_iter=2, processes=2) == steps(batch_size=16)


def test_a_resumed_epoch_yields_exactly_the_rest():
    kwargs = dict(batch_size=4, accum_iter=2, processes=2)
    assert steps(5, 2, **kwargs) == steps(5, **kwargs)[2:]
    assert steps(5, 6, **kwargs) == []


def test_a_part_of_a_step_can_be_left_out():
    sampler = StepSampler(100, 4, accum_iter=4)
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.set_epoch(1, 2, 3)
    assert list(sampler) == whole[11:]
    assert len(sampler) == len(whole) - 11


def test_an_image_comes_at_most_once_an_epoch():
    seen = [index for step in steps(batch_size=16) for index, _ in step]
    assert len(seen) == len(set(seen)) == 96
    assert set(seen) <= set(range(100))


def test_epochs_and_seeds_differ():
    def batch(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = StepSampler(100, 16, seed=seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    batches = [batch(0, 0), batch(0, 1), batch(1, 0), batch(1, 1)]
    assert len({tuple(index for index, _ in keys) for keys in batches}) == 4
    assert len({seed for keys in batches for _, seed in keys}) == 4 * 16


def test_the_order_of_the_data_set_is_kept_without_shuffling():
    sampler = StepSampler(10, 3, shuffle=False)
    assert [[index for index, _ in batch] for batch in sampler] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_lengths_are_those_of_the_epoch():
    sampler = StepSampler(100, 4, accum_iter=2, world_size=3)
    assert sampler.steps_per_epoch == 4
    assert len(sampler) == len(list(sampler)) == 8
    sampler.set_epoch(0, start_step=3)
    assert len(sampler) == len(list(sampler)) == 2


def test_fewer_images_than_a_step_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"12 images .* 16 x 2 x 1 = 32 .*lower --batch_size"):
        StepSampler(12, 16, accum_iter=2)


def test_a_step_beyond_the_epoch_is_refused():
    sampler = StepSampler(100, 16)
    with pytest.raises(UsageError, match="step 7 of an epoch of 6 steps"):
        sampler.set_epoch(0, 7)


# --- bad files ---------------------------------------------------------------------------------


def test_a_bad_file_is_named_once(tmp_path):
    data, lines = ImageFiles(write_pictures(tmp_path, 4), noisy), []
    bad_images = BadImages(lines.append)
    for batch in ([2], [], [2, 3], [3]):
        bad_images.add(batch, data)
    assert bad_images.count == 2
    assert lines == [
        f"{tmp_path / '002.png'} cannot be decoded: skipped",
        f"{tmp_path / '003.png'} cannot be decoded: skipped",
    ]


def test_too_many_bad_files_stop_the_run(tmp_path):
    data = ImageFiles(write_pictures(tmp_path, 4), noisy)
    bad_images = BadImages(lambda line: None)
    bad_images.add([1], data)
    bad_images.check(total=10, num_files=1000, max_share=0.01)
    with pytest.raises(TrainingError) as error:
        bad_images.check(total=11, num_files=1000, max_share=0.01)
    assert str(error.value) == (
        "11 of 1000 images cannot be decoded, more than --max_bad_images 0.01 allows; "
        f"first: {tmp_path / '001.png'}"
    )


# --- the loader --------------------------------------------------------------------------------


def tagged(image: Image.Image) -> torch.Tensor:
    """The first pixel and some noise: enough to tell images and augmentations apart."""
    return noisy(image)[:, :1, :1]


def make_loader(folder: Path, workers: int, transform=tagged, warn=print, batch=2) -> Loader:
    data = ImageFiles(folder, transform)
    return Loader(data, StepSampler(len(data), batch, seed=1), workers, warn=warn)


def images(batches) -> list[torch.Tensor]:
    return [batch for batch, _ in batches]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_data_do_not_depend_on_the_number_of_workers(tmp_path):
    write_pictures(tmp_path, 12)
    none, two = make_loader(tmp_path, 0), make_loader(tmp_path, 2)
    for epoch in (0, 1):
        assert same(images(none.epoch(epoch)), images(two.epoch(epoch)))
    assert not same(images(none.epoch(0)), images(none.epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_do_not_depend_on_where_a_run_was_resumed(tmp_path, workers):
    write_pictures(tmp_path, 12)
    whole = images(make_loader(tmp_path, workers).epoch(4))
    assert same(images(make_loader(tmp_path, workers).epoch(4, start_step=4)), whole[4:])


def test_an_epoch_can_follow_one_that_was_left(tmp_path):
    loader = make_loader(write_pictures(tmp_path, 12), 2)
    next(loader.epoch(0))
    assert same(images(loader.epoch(1)), images(make_loader(tmp_path, 0).epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_alone(tmp_path, workers):
    loader = make_loader(write_pictures(tmp_path, 6), workers)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_bad_files_are_reported_with_the_batch(tmp_path):
    loader = make_loader(write_pictures(tmp_path, 12), 2)
    (tmp_path / "004.png").write_bytes(b"")
    batches = list(loader.epoch(0))
    assert [bad for _, bad in batches if bad] == [[4]]
    assert [len(batch) for batch, _ in batches] == [2] * 6


def kill_once(flag: Path, image: Image.Image) -> torch.Tensor:
    """Kill the worker that is the first to come to picture 7."""
    if image.tobytes() == picture(7).tobytes() and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return tagged(image)


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    write_pictures(tmp_path / "data", 24)
    warnings = []
    transform = partial(kill_once, tmp_path / "killed")
    loader = make_loader(tmp_path / "data", 2, transform, warnings.append)
    expected = images(make_loader(tmp_path / "data", 0).epoch(0))
    assert same(images(loader.epoch(0)), expected)
    assert len(warnings) == 1 and "a data worker was killed" in warnings[0]


def test_only_fetching_notices_a_killed_worker(tmp_path):
    write_pictures(tmp_path, 24)
    loader, warnings = make_loader(tmp_path, 2), []
    loader.warn = warnings.append
    expected = images(make_loader(tmp_path, 0).epoch(0))
    got = []
    for batch, _ in loader.epoch(0):
        got.append(batch)
        if len(got) == 3:
            for worker in loader._workers:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.3)  # Where an optimizer step would be; torch's handler raised here.
            assert not warnings
    assert same(got, expected)
    assert len(warnings) == 1


def test_workers_killed_between_epochs_are_replaced(tmp_path):
    loader, warnings = make_loader(write_pictures(tmp_path, 6), 2), []
    loader.warn = warnings.append
    list(loader.epoch(0))
    for worker in loader._workers:
        os.kill(worker.pid, signal.SIGKILL)
    assert same(images(loader.epoch(1)), images(make_loader(tmp_path, 0).epoch(1)))
    assert len(warnings) == 1


def kill_always(image: Image.Image) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)


def test_losing_workers_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_LOST_WORKERS", 0)
    loader = make_loader(write_pictures(tmp_path, 4), 1, kill_always)
    with pytest.raises(
        TrainingError, match=r"1 data workers were lost in this epoch.* lower --num_workers"
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_given_up_in_a_worker_is_one_clear_line(tmp_path, workers):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(TrainingError) as error:
        list(make_loader(tmp_path, workers).epoch(0))
    assert str(error.value).startswith("10 files in a row cannot be decoded, the last: ")
    assert "\n" not in str(error.value)


def buggy(image: Image.Image) -> torch.Tensor:
    raise ZeroDivisionError("a bug")


def test_a_worker_s_own_error_surfaces_as_itself(tmp_path):
    warnings = []
    loader = make_loader(write_pictures(tmp_path, 4), 1, buggy, warnings.append)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(loader.epoch(0))
    assert not warnings


def test_an_interrupt_surfaces_as_itself(tmp_path):
    def interrupted(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make_loader(write_pictures(tmp_path, 4), 0, interrupted).epoch(0))


# --- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("make", [pretrain_transform, eval_transform])
def test_transforms_give_plain_tensors_of_the_size_asked_for(tmp_path, in_chans, make):
    picture().save(tmp_path / "a.png")
    got = make((16, 32), in_chans)(load_image(tmp_path / "a.png", in_chans))
    assert type(got) is torch.Tensor
    assert got.dtype == torch.float32 and got.shape == (in_chans, 16, 32)


def test_the_statistics_are_imagenet_s():
    assert channel_stats(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert channel_stats(1) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert channel_stats(4) == (
        (0.485, 0.456, 0.406, 0.5),
        (0.229, 0.224, 0.225, 0.5),
    )
    with pytest.raises(UsageError):
        channel_stats(2)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_denormalize_gives_the_picture_back(tmp_path, in_chans):
    picture().save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", in_chans)
    got = denormalize(eval_transform((24, 40), in_chans)(image)[None])[0]
    assert torch.allclose(got, v2.functional.pil_to_tensor(image) / 255, atol=1e-6)


def test_evaluation_takes_the_centre():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    got = denormalize(eval_transform((20, 20))(wide))
    assert torch.allclose(got.mean(dim=(1, 2)), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


def test_pretraining_flips_only_if_asked_to():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))

    def flipped(hflip: bool) -> set[bool]:
        transform = pretrain_transform((8, 8), 1, hflip=hflip)
        with seeded(0):
            views = [transform(ramp) for _ in range(20)]
        return {bool(view[0, 0, 0] > view[0, 0, -1]) for view in views}

    assert flipped(True) == {False, True}
    assert flipped(False) == {False}


def test_a_crop_takes_the_share_of_the_area_asked_for():
    transform = pretrain_transform((24, 40), hflip=False, scale=(1.0, 1.0))
    square = Image.new("RGB", (32, 32))
    assert transform(square).shape == (3, 24, 40)
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    small = pretrain_transform((8, 8), 1, hflip=False, scale=(0.01, 0.02))
    with seeded(0):
        view = denormalize(small(ramp))
    assert view.max() - view.min() < 0.3
