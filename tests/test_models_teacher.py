"""Teachers: what they see, what they give, and which are refused."""

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models_convmae import MODELS as AUTOENCODERS
from models_teacher import Teacher, load_teacher
from util.data.transforms import channel_stats
from util.errors import UsageError

NAME = "test_vit"  # timm's smallest: 160 pixels, patches of 16


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pth"
    torch.save(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture
def teacher(vit_file):
    return load_teacher(NAME, vit_file)


def test_tokens_are_timms_of_the_image_as_the_teacher_normalises_it(vit_file, teacher):
    pixels = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in channel_stats(3))
    teacher.see_through(*channel_stats(3), (10, 10))
    model = timm.create_model(NAME, checkpoint_path=str(vit_file)).eval()
    config = timm.data.resolve_model_data_config(model)
    own = [torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std")]
    expected = model.forward_features((pixels - own[0]) / own[1])[:, model.num_prefix_tokens :]
    expected = (expected - expected.mean(-1, keepdim=True)) / (
        expected.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(teacher((pixels - mean) / std), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("in_chans", "size"), [(1, (64, 64)), (4, (96, 160))])
def test_gray_or_alpha_at_another_size_gives_tokens_at_the_students_places(teacher, in_chans, size):
    grid = (size[0] // 16, size[1] // 16)
    teacher.see_through(*channel_stats(in_chans), grid)
    tokens = teacher(torch.randn(2, in_chans, *size))
    assert tokens.shape == (2, grid[0] * grid[1], teacher.width) and tokens.isfinite().all()


class Places(nn.Module):
    """A model whose token at each of 4x4 places is a one in a channel of its own."""

    def forward_features(self, x):
        return torch.eye(16).expand(len(x), -1, -1)

    def forward_intermediates(self, x, **_):
        return [torch.eye(16).view(1, 16, 4, 4).expand(len(x), -1, -1, -1)]

    def parameters(self, recurse=True):
        return iter([torch.zeros(1)])


def test_tokens_of_another_grid_are_resampled_at_the_same_places():
    teacher = Teacher("places", Places(), (32, 32), [0.5] * 3, [0.5] * 3)
    teacher.see_through([0.5] * 3, [0.5] * 3, (2, 2))
    tokens = teacher(torch.zeros(1, 3, 32, 32)).view(2, 2, 4, 4)
    for row in range(2):
        for column in range(2):
            nearest = tokens[row, column].flatten().topk(4).indices.sort().values.tolist()
            corner = 8 * row + 2 * column
            assert nearest == [corner, corner + 1, corner + 4, corner + 5]


def test_a_teacher_is_frozen_and_stays_in_evaluation(teacher):
    imgs = torch.randn(1, 3, 160, 160, requires_grad=True)
    assert not teacher.train().model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(imgs).requires_grad


def test_the_digest_is_of_the_weights(vit_file, teacher):
    assert load_teacher(NAME, vit_file).digest() == teacher.digest()
    next(teacher.model.parameters()).data[0] += 1
    assert load_teacher(NAME, vit_file).digest() != teacher.digest()


def test_a_checkpoint_of_this_project_is_a_teacher(tmp_path):
    model = AUTOENCODERS["convmae_convvit_tiny_patch16"](img_size=64)
    torch.save({"model": model.state_dict(), "args": {"input_size": [64, 64]}}, tmp_path / "x.pth")
    teacher, imgs = load_teacher(str(tmp_path / "x.pth")), torch.randn(2, 3, 64, 64)
    everything = torch.arange(16).expand(2, -1)
    expected = F.layer_norm(model.forward_visible(imgs, everything)[-1], (128,))
    torch.testing.assert_close(teacher(imgs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "with_file", "complaint"),
    [
        ("vit_of_mine", False, "neither a file nor a model that timm"),
        ("test_resnet", False, "gives no patch tokens"),
        ("test_vit2", True, "holds no weights of test_vit2"),
        ("test_vit.no_such_tag", False, "Invalid pretrained tag"),
        (NAME, False, "cannot be had from timm .*: give the file of its weights as --teacher_chec"),
        ("convvit_tiny_patch16", False, "give the checkpoint itself, as --teacher FILE"),
    ],
)
def test_what_is_no_teacher_is_refused_in_a_line(
    monkeypatch, tmp_path, vit_file, name, with_file, complaint
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    checkpoint = vit_file if with_file else None
    if name == "test_resnet":
        checkpoint = tmp_path / "resnet.pth"
        torch.save(timm.create_model(name).state_dict(), checkpoint)
    with pytest.raises(UsageError, match=complaint) as refusal:
        load_teacher(name, checkpoint)
    assert "\n" not in str(refusal.value)
