"""VideoConvMAE: pretraining and fine-tuning on videos, by the classes of the image models."""

from util.errors import require_for_programs

RUNS = ("VideoConvMAE.main_pretrain", "VideoConvMAE.main_finetune")
require_for_programs("av", "requirements-video.txt", RUNS)
