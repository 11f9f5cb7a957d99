"""Teachers of MR-MCMAE: frozen models whose patch tokens a student's visible tokens resemble.

Mimic before reconstruct, arXiv 2303.05475.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models_convvit import MODELS, convvit_from_weights
from util.errors import UsageError, printable
from util.layers.geometry import show_size
from util.weights.read import read_weights

# What a file may have beside a model without a head.
_HEADS = ("head", "head_dist", "head_drop", "fc_norm", "fc", "classifier", "norm")


class Teacher(nn.Module):
    """A frozen model that looks at whole images, at its own size and normalisation.

    Always in evaluation mode and without gradients; `see_through` says whose images it gets.

    Args:
        name: for messages.
        model: gives tokens `[N, prefix + L, C]` by timm's `forward_features`, and those of the
            patches as a grid by its `forward_intermediates`.
        img_size: height and width of its input.
        mean, std: of its input's channels.

    Attributes:
        width: of a token (`C`).
        grid: its patches along height and width.

    Raises:
        UsageError: a model that gives no patch tokens.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        img_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.requires_grad_(False)
        self.img_size = tuple(img_size)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.train(False)
        image = torch.zeros(1, 3, *self.img_size)
        try:
            with torch.no_grad():
                tokens = model.forward_features(image)
                if not isinstance(tokens, Tensor) or tokens.ndim != 3:
                    raise ValueError(f"features of shape {getattr(tokens, 'shape', 'none')}")
                maps = self._maps(image)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"--teacher {name} gives no patch tokens for an image of "
                f"{show_size(self.img_size)} ({printable(error)}): take a vision transformer, such "
                f"as vit_base_patch16_224.dino"
            ) from error
        self.width, self.grid = maps.shape[1], tuple(maps.shape[2:])
        self.see_through(mean, std, self.grid)

    def _maps(self, imgs: Tensor) -> Tensor:
        """The last tokens, after the final norm, where they belong: `[N, C, rows, columns]`."""
        return self.model.forward_intermediates(
            imgs, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[0]

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def see_through(
        self, mean: Sequence[float], std: Sequence[float], grid: Sequence[int]
    ) -> "Teacher":
        """Take a student's images and give tokens at the places of its patches.

        Args:
            mean: of the channels, by which the images are normalised.
            std: of the channels, likewise.
            grid: patches along height and width; tokens of another grid are resampled (bicubic).
        """
        device = next(self.model.parameters()).device
        scale = torch.tensor(std[:3]) / self.std
        shift = (torch.tensor(mean[:3]) - self.mean) / self.std
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, values.view(-1, 1, 1).to(device), persistent=False)
        self.places = tuple(grid)
        return self

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> Tensor:
        """The tokens of whole images at the student's places.

        Args:
            imgs: `[N, C, H, W]`, normalised as the student takes them; gray ones are seen as
                colour, those with an alpha channel without it.

        Returns:
            `[N, L, width]`, float32, each token normalised over its channels without affine.
        """
        x = imgs[:, :3] * self.scale + self.shift
        if x.shape[2:] != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", antialias=True)
        maps = self._maps(x).float()
        if self.grid != self.places:
            maps = F.interpolate(maps, self.places, mode="bicubic")
        return F.layer_norm(maps.flatten(2).transpose(1, 2), (self.width,))

    def digest(self) -> str:
        """The beginning of the SHA-256 of its weights: the same weights, the same digest."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    def describe(self) -> str:
        """Name, input, parameters and arithmetic of an image, in a line."""
        image = self.shift.new_zeros(1, 3, *self.img_size)
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),  # torch cannot count the CPU's fused one
            FlopCounterMode(display=False) as counter,
        ):
            self._maps(image)
        count = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.name}: {count / 1e6:.1f} M parameters, {show_size(self.img_size)} pixels, "
            f"{show_size(self.grid)} patches, {counter.get_total_flops() / 1e9:.3g} GFLOP an image"
        )


def load_teacher(name: str, checkpoint: Path | None = None) -> Teacher:
    """A teacher with its weights.

    Args:
        name: of a timm model, such as vit_base_patch16_224.dino; or the file of a ConvViT.
        checkpoint: the timm model's weights, for machines without network; None to fetch them.

    Raises:
        UsageError: no such model, weights of another one or none, a model without patch tokens.
    """
    if Path(name).is_file():
        if checkpoint:
            raise UsageError(f"--teacher {name} is a file: leave --teacher_checkpoint away")
        return _load_convvit(Path(name))
    if name in MODELS:
        raise UsageError(f"--teacher {name}: give the checkpoint itself, as --teacher FILE")
    if not timm.is_model(name):
        raise UsageError(
            f"--teacher {name} is neither a file nor a model that timm {timm.__version__} knows; "
            f"its names are those of timm.list_models(), such as vit_base_patch16_224.dino"
        )
    try:
        if checkpoint is None:
            hub_logging.set_verbosity_error()  # the error says it
        model = timm.create_model(name, pretrained=checkpoint is None, num_classes=0)
    except Exception as error:  # of the network and the disk, of many kinds
        raise UsageError(
            f"--teacher {name} cannot be had from timm ({printable(error)}): give the file of its "
            f"weights as --teacher_checkpoint"
        ) from error
    if checkpoint is not None:
        _fill(name, model, checkpoint)
    config = resolve_model_data_config(model)
    return Teacher(name, model, config["input_size"][1:], config["mean"], config["std"])


def _load_convvit(path: Path) -> Teacher:
    weights = read_weights(path)
    architecture = weights.architecture
    if architecture.ndim != 2 or architecture.in_chans != 3 or weights.args.get("arrays"):
        raise UsageError(f"--teacher {path} must be a model of 8-bit pictures of three channels")
    model, _ = convvit_from_weights(weights)
    mean, std = weights.stats or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Teacher(str(path), model, architecture.img_size, mean, std)


def _fill(name: str, model: nn.Module, path: Path) -> None:
    """Fill a timm model with a file's weights; names of other programs as timm converts them."""
    state = read_weights(path).state
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state
        own = model.state_dict()
        more = [n for n in state.keys() - own.keys() if n.split(".")[0] not in _HEADS]
        wrong = sorted({*(own.keys() - state.keys()), *more})
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    except (AttributeError, KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
        wrong = [printable(error)]
    if wrong:
        raise UsageError(
            f"--teacher_checkpoint {path} holds no weights of {name}: {len(wrong)} are missing, "
            f"too many or of another shape ({printable(wrong[0])})"
        )
    model.load_state_dict({n: t for n, t in state.items() if n in own})
