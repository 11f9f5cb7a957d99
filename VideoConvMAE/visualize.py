"""Reconstructed clips: a picture with frames as columns, and an mp4.

`python -m VideoConvMAE.visualize --checkpoint FILE --videos FILE… --output clips.png`
"""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from util.data.files import is_one_of
from util.data.images import MAX_PIXELS
from util.data.transforms import denormalize
from util.errors import UsageError
from util.run.args import check_png
from util.run.normalization import add_stats_args, complete_stats, given_stats
from util.run.parser import Parser, mask_ratio, positive_int, seed
from util.run.pictures import Drawing, Reconstruction, captioned, enlarged, reconstruct
from util.run.program import run_main
from util.weights.describe import guesses
from util.weights.read import read_weights
from VideoConvMAE.args import add_sampling_args, complete_protocol
from VideoConvMAE.datasets import evenly_chosen
from VideoConvMAE.decode import open_video, write_mp4
from VideoConvMAE.lists import TEST_SPLIT, VideoList, find_split, find_videos
from VideoConvMAE.models import videoconvmae_from_weights
from VideoConvMAE.sampling import eval_clips
from VideoConvMAE.transforms import views_transform


def triples(found: Reconstruction) -> Tensor:
    """Original, masked and filled in, `[N, 3, T, 3, H, W]` in [0, 1], on the CPU."""
    rows = torch.stack([found.original, found.masked, found.filled], dim=1)  # [N, 3, C, T, H, W]
    rows = rows.movedim(2, 3).cpu()
    return enlarged(rows.expand(-1, -1, -1, 3, -1, -1), 64)  # gray as RGB


def clip_grid(found: Reconstruction, columns: int = 8) -> Tensor:
    """Frames as columns, original, masked and filled in as rows, one clip below the other.

    Args:
        found: of clips.
        columns: frames to show of each clip, at equal distances.

    Returns:
        `[3, height, width]` in [0, 1], on the CPU.
    """
    rows = triples(found)
    length = rows.shape[2]
    columns = min(columns, length)
    rows = rows[:, :, [i * length // columns for i in range(columns)]]
    grids = [make_grid(clip.flatten(0, 1), nrow=columns, padding=2, pad_value=1) for clip in rows]
    return make_grid(grids, nrow=1, padding=6, pad_value=1)


def clip_movie(found: Reconstruction, path: Path, fps: int = 8) -> None:
    """Original, masked and filled in side by side as an mp4, one clip below the other.

    Args:
        found: of clips.
        path: the file.
        fps: frames a second.
    """
    rows = triples(found).transpose(1, 2)  # [N, T, 3, 3, H, W]
    frames = [make_grid(rows[:, t].flatten(0, 1), nrow=3, padding=4) for t in range(rows.shape[1])]
    movie = (torch.stack(frames).movedim(1, -1) * 255).round().byte()  # [T, H, W, 3]
    height, width = (side - side % 2 for side in movie.shape[1:3])  # the codec wants even sides
    write_mp4(path, movie[:, :height, :width].numpy(), fps, crf="18")


def draw_clips(found: Reconstruction, columns: int = 8) -> Drawing:
    """The picture of `clip_grid` with the errors below it."""
    text = f"Original, masked, filled in; {found.errors}"
    return Drawing(captioned(clip_grid(found, columns), text), found.errors)


def load_clip(path: str | Path, args: argparse.Namespace) -> Tensor:
    """The clip in the middle of a video, `[C, T, H, W]`, normalised.

    Args:
        path: a file or a folder of pictures.
        args: `input_size` and what `complete_protocol` and `complete_stats` take.

    Raises:
        OSError: it cannot be decoded.
    """
    with open_video(path, args.in_chans, args.short_side or None, args.max_pixels) as video:
        (chosen,) = eval_clips(args.sampling, len(video), args.num_frames, args.stride, 1)
        view = views_transform(tuple(args.input_size), stats=given_stats(args))
        return view(video.frames(chosen))[0]


def load_samples(videos: VideoList, args: argparse.Namespace, count: int = 4) -> Tensor:
    """Clips to watch a run by, `[N, C, T, H, W]`: of held-out videos, else of the training's.

    Videos that cannot be decoded are left out.

    Args:
        videos: of the training.
        args: of the run, see `load_clip`; `data_path` may hold a validation split.
        count: the most clips.

    Raises:
        UsageError: not one can be decoded.
    """
    sources = [videos]
    with contextlib.suppress(UsageError):  # no such split, or no video in it
        sources.insert(0, find_split(args.data_path, TEST_SPLIT, args.video_root))
    for source in sources:
        clips, first = [], ""
        for path in evenly_chosen(source, count).paths:
            try:
                clips.append(load_clip(path, args))
            except OSError as error:
                first = first or f", the first: {error}"
        if clips:
            return torch.stack(clips)
    raise UsageError(f"none of the videos tried of {videos.source} can be decoded{first}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad one exits with 2 and one line."""
    parser = Parser(
        prog="python -m VideoConvMAE.visualize",
        description="Draw original, masked and reconstructed clips: frames as columns of a "
        "picture, and beside it an mp4.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of a pretraining on videos")
    add("--videos", type=Path, nargs="+", required=True, metavar="FILE", help="files or folders")
    add("--output", type=Path, required=True, metavar="PNG", help="picture; the mp4 lies beside")
    add("--max_videos", type=positive_int, default=4, metavar="N", help="videos to show")
    add("--mask_ratio", type=mask_ratio, default=0.9, help="share of patches to remove")
    add("--columns", type=positive_int, default=8, metavar="N", help="frames to show")
    add("--seed", type=seed, default=0, help="of the masks")
    add_stats_args(parser)
    add_sampling_args(parser, ("dense", "uniform"))
    parser.set_defaults(max_pixels=MAX_PIXELS)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load, reconstruct, write the picture and the movie."""
    check_png(args.output)
    files, movie = _files(args.videos), args.output.with_suffix(".mp4")
    if is_one_of(movie, files):
        raise UsageError(f"{movie}, beside --output, is one of the videos: give another name")
    weights = read_weights(args.checkpoint)
    model = videoconvmae_from_weights(weights)
    if taken := guesses(weights):
        print(f"note: {args.checkpoint}: taken are {taken}")
    try:
        model.geometry.visible_patches(args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio: {error}") from error
    args.num_frames, *args.input_size = model.geometry.img_size
    args.in_chans, args.short_side = model.in_chans, None
    complete_protocol(args)
    complete_stats(args, weights)
    clips = []
    for path in files[: args.max_videos]:
        try:
            clips.append(load_clip(path, args))
        except OSError as error:
            raise UsageError(str(error)) from error
    batch = torch.stack(clips)
    show = partial(denormalize, stats=given_stats(args))
    found = reconstruct(model, batch, args.mask_ratio, args.seed, show)
    save_image(draw_clips(found, args.columns).picture, args.output)
    clip_movie(found, movie)
    print(f"{len(clips)} videos: original, masked, reconstruction in {args.output} and {movie}")
    print(found.errors)


def _files(paths: Sequence[Path]) -> list[str]:
    """Files as they are; of a folder the videos in it."""
    return [f for path in paths for f in (find_videos(path).paths if path.is_dir() else [path])]


if __name__ == "__main__":
    sys.exit(run_main(main, parse_args()))
