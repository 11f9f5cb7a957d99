"""Videos of any kind as the views that a frozen model looks at."""

import argparse
from pathlib import Path

from util.run.distributed import print_once
from util.run.normalization import given_stats
from VideoConvMAE.args import complete_protocol
from VideoConvMAE.datasets import Views
from VideoConvMAE.lists import find_videos
from VideoConvMAE.transforms import views_transform


def views_of(args: argparse.Namespace, path: Path, labeled: bool) -> Views:
    """`--test_clips` x `--test_crops` views of each video of a folder or list.

    Args:
        args: completed from the checkpoint.
        path: a folder or list of videos, or one.
        labeled: videos without labels are an error.

    Raises:
        UsageError: no videos, or none with labels.
    """
    videos = find_videos(path, args.video_root)
    for note in videos.notes:
        print_once(note, error=True)
    return Views(
        videos,
        videos.classes,
        views_transform(tuple(args.input_size), args.test_crops, given_stats(args)),
        clips=args.test_clips,
        unlabeled=not labeled,
        **complete_protocol(args),
    )
