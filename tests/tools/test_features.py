"""Pictures of features from the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine_features import attention_map
from models_convvit import ConvViT
from tests.tools.small import FLAGS
from tools import features
from util.errors import UsageError


def run(checkpoint, data, output, *more):
    line = ["--checkpoint", checkpoint, "--data_path", data, "--output", output, *FLAGS, *more]
    features.main(features.parse_args(list(map(str, line))))
    return np.asarray(Image.open(output))


def test_images_stand_in_rows_with_a_column_for_each_map(autoencoder, classes, tmp_path):
    pixels = run(autoencoder, classes / "val", tmp_path / "f.png", "--max_files", "4")
    assert pixels.shape == (4 * 100 + 4, 5 * 100 + 4, 3)  # 32 pixels enlarged to 96
    cells = [pixels[4:100, 4 + 100 * i : 100 + 100 * i].reshape(-1, 3) for i in range(5)]
    # Tokens of 2, 4 and 4 pixels, enlarged without mixing.
    counts = [len(np.unique(cell, axis=0)) for cell in cells[1:]]
    assert 1 < counts[0] <= 256 and all(1 < count <= 64 for count in counts[1:])


def test_clips_stand_below_each_other_with_a_column_for_each_frame(
    video_classifier, videos, tmp_path
):
    line = ("--max_files", "2", "--columns", "3")
    pixels = run(video_classifier, videos / "val", tmp_path / "f.png", *line)
    assert pixels.shape == (2 * (5 * 98 + 2 + 6) + 6, 3 * 98 + 2 + 2 * 6, 3)


def test_the_picture_is_not_written_over_an_image(autoencoder, classes):
    image = next((classes / "val").rglob("*.png"))
    before = image.read_bytes()
    with pytest.raises(UsageError, match="is one of the images: give another name"):
        run(autoencoder, classes / "val", image)
    assert image.read_bytes() == before


def test_the_attention_is_what_torchs_own_attention_weighs_values_with():
    torch.manual_seed(0)
    model = ConvViT(img_size=32, patch_size=(2, 2, 2), embed_dim=(8, 8, 16), depth=(1, 1, 1),
                    num_heads=2, num_classes=0).eval()  # fmt: skip
    attention = model.blocks3[0].attn
    x, seen = torch.randn(3, 3, 32, 32), []
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = attention_map(model, x)
    own = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    own.in_proj_weight, own.in_proj_bias = attention.qkv.weight, attention.qkv.bias
    with torch.no_grad():
        _, weights = own(*[seen[0]] * 3, average_attn_weights=True)
    torch.testing.assert_close(found, weights.mean(1).view(3, 4, 4))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(3))
