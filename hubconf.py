"""torch.hub entry points: `torch.hub.load(FOLDER, "convvit_base_patch16", source="local")`.

Each entry takes the model's own arguments. With `checkpoint=FILE` a classifier is built from the
file and its arguments, an autoencoder from the file alone. `torch.hub.list` names all entries.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

ROOT = Path(__file__).resolve().parent


@contextmanager
def _this_util() -> Iterator[None]:
    """Import `util` from this folder, though the program has another one; that is put back."""

    def loaded() -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "util"}

    there = loaded().get("util")
    places = [getattr(there, "__file__", None), *getattr(there, "__path__", ())]
    is_ours = any(place and Path(place).resolve().is_relative_to(ROOT) for place in places)
    others = {} if is_ours else loaded()
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        if others:
            for name in loaded():
                del sys.modules[name]
            sys.modules.update(others)


with _this_util():
    import models_convmae
    import models_convvit
    from util.errors import UsageError
    from util.weights.read import read_weights
    from VideoConvMAE import models as models_video

dependencies = ["torch", "timm", "safetensors"]


def _entry(
    factory: Callable[..., nn.Module], from_checkpoint: Callable[..., nn.Module], ndim: int
) -> Callable[..., nn.Module]:
    def entry(checkpoint: str | None = None, **kwargs) -> nn.Module:
        if checkpoint is None:
            return factory(**kwargs)
        architecture = read_weights(checkpoint).architecture
        size, kind = architecture.size_name, {2: "image", 3: "video"}[architecture.ndim]
        if architecture.ndim != ndim:
            raise UsageError(f"{checkpoint} holds a model of {kind}s, not a {factory.__name__}")
        if size and f"_{size}_" not in factory.__name__:
            raise UsageError(f"{checkpoint} holds a {size} model, not a {factory.__name__}")
        return from_checkpoint(checkpoint, **kwargs)

    entry.__name__ = factory.__name__
    entry.__doc__ = (
        f"{factory.__doc__}\n\n    `checkpoint`: a file of any kind to build from and fill with, "
        f"see `{from_checkpoint.__name__}`."
    )
    return entry


def _classifier(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return _entry(factory, models_convvit.convvit_from_checkpoint, 2)


def _autoencoder(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return _entry(factory, models_convmae.convmae_from_checkpoint, 2)


def _video_classifier(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return _entry(factory, models_convvit.convvit_from_checkpoint, 3)


def _video_autoencoder(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return _entry(factory, models_video.videoconvmae_from_checkpoint, 3)


convvit_tiny_patch16 = _classifier(models_convvit.convvit_tiny_patch16)
convvit_small_patch16 = _classifier(models_convvit.convvit_small_patch16)
convvit_base_patch16 = _classifier(models_convvit.convvit_base_patch16)
convvit_large_patch16 = _classifier(models_convvit.convvit_large_patch16)
convvit_huge_patch16 = _classifier(models_convvit.convvit_huge_patch16)
convmae_convvit_tiny_patch16 = _autoencoder(models_convmae.convmae_convvit_tiny_patch16)
convmae_convvit_small_patch16 = _autoencoder(models_convmae.convmae_convvit_small_patch16)
convmae_convvit_base_patch16 = _autoencoder(models_convmae.convmae_convvit_base_patch16)
convmae_convvit_large_patch16 = _autoencoder(models_convmae.convmae_convvit_large_patch16)
convmae_convvit_huge_patch16 = _autoencoder(models_convmae.convmae_convvit_huge_patch16)
convmae_convvit_base_patch16_dec512d8b = _autoencoder(
    models_convmae.convmae_convvit_base_patch16_dec512d8b
)
fastconvmae_convvit_base_patch16 = _autoencoder(models_convmae.fastconvmae_convvit_base_patch16)
fastconvmae_convvit_base_patch16_dec512d8b = _autoencoder(
    models_convmae.fastconvmae_convvit_base_patch16_dec512d8b
)
videoconvvit_tiny_patch16 = _video_classifier(models_video.videoconvvit_tiny_patch16)
videoconvvit_small_patch16 = _video_classifier(models_video.videoconvvit_small_patch16)
videoconvvit_base_patch16 = _video_classifier(models_video.videoconvvit_base_patch16)
videoconvvit_large_patch16 = _video_classifier(models_video.videoconvvit_large_patch16)
videoconvvit_huge_patch16 = _video_classifier(models_video.videoconvvit_huge_patch16)
videoconvmae_tiny_patch16 = _video_autoencoder(models_video.videoconvmae_tiny_patch16)
videoconvmae_small_patch16 = _video_autoencoder(models_video.videoconvmae_small_patch16)
videoconvmae_base_patch16 = _video_autoencoder(models_video.videoconvmae_base_patch16)
videoconvmae_large_patch16 = _video_autoencoder(models_video.videoconvmae_large_patch16)
videoconvmae_huge_patch16 = _video_autoencoder(models_video.videoconvmae_huge_patch16)
videoconvmae_tiny_patch16_msd = _video_autoencoder(models_video.videoconvmae_tiny_patch16_msd)
videoconvmae_small_patch16_msd = _video_autoencoder(models_video.videoconvmae_small_patch16_msd)
videoconvmae_base_patch16_msd = _video_autoencoder(models_video.videoconvmae_base_patch16_msd)
videoconvmae_large_patch16_msd = _video_autoencoder(models_video.videoconvmae_large_patch16_msd)
videoconvmae_huge_patch16_msd = _video_autoencoder(models_video.videoconvmae_huge_patch16_msd)
