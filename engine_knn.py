"""k-nearest-neighbour classification by the features of a frozen encoder.

The weighted rule of Wu et al. (arXiv 1805.01978, section 3.4) as DINO evaluates with it (Caron et
al., arXiv 2104.14294): cosine similarity `s`, and each of the 20 nearest training samples votes
for its class with the weight exp(s / 0.07).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_evaluate import judge
from engine_features import Predict, check_bad_files, each_output
from models_convmae import MaskedAutoencoderConvViT
from util.data.classes import check_classes
from util.data.loader import Loader
from util.run.distributed import gather_objects

NEIGHBORS, TEMPERATURE = 20, 0.07
_ROWS = 1024  # queries that are compared at a time


@dataclass(frozen=True)
class Neighbors:
    """The rule: how many neighbours vote, and how fast their weight falls with the distance."""

    count: int = NEIGHBORS
    temperature: float = TEMPERATURE

    def nearest(self, queries: Tensor, bank: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities and labels of the nearest, each `[n, min(count, m)]`, the nearest first.

        Args:
            queries: `[n, C]`, of length 1.
            bank: `[m, C]`, of length 1.
            labels: `[m]`, of `bank`.
        """
        found = []
        for rows in queries.split(_ROWS):
            similar, places = (rows @ bank.T).topk(min(self.count, len(bank)))
            found.append((similar, labels[places]))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def votes(self, similar: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """The classes' shares of the votes of neighbours, `[n, k]` each: `[n, num_classes]`."""
        weights = (similar / self.temperature).softmax(dim=1)  # of exp, but never too large
        return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def pooled_latent(model: MaskedAutoencoderConvViT, imgs: Tensor) -> Tensor:
    """Features of whole images by a masked autoencoder's encoder, `[N, C]`.

    They are those of its checkpoint by `engine_features.encode`.
    """
    ids = torch.arange(model.geometry.num_patches, device=imgs.device)
    x = model.forward_visible(imgs, ids.expand(len(imgs), -1))[-1]
    x = x[:, model.num_prefix_tokens :].mean(1)
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def knn_accuracy(
    model: torch.nn.Module,
    loaders: tuple[Loader, Loader],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    predict: Predict,
    max_bad_images: float = 1.0,
    rule: Neighbors = Neighbors(),
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Accuracy of classifying validation samples by their neighbours among the training samples.

    All processes call this together. Each keeps the features of its share of the training samples
    and finds the nearest there for all queries; the nearest of all processes vote.

    Args:
        model: the bare model.
        loaders: of training and of validation samples, labelled, in the order of an `EvalSampler`.
        device: where the model is.
        dtype: autocast type; None for full precision.
        predict: from the model and a batch to features `[N, C]`.
        max_bad_images: share of the samples that may be undecodable.
        rule: of the vote.
        stopping: whether this process was asked to stop, looked at before each batch.

    Returns:
        "knn_acc1" and "knn_acc5" in percent; None if any process was asked to stop.

    Raises:
        UsageError: training and validation samples of different classes.
        TrainingError: too many files cannot be decoded.
    """
    train, val = (loader.dataset for loader in loaders)
    check_classes(train.classes, val.classes, train.root, val.root)
    samples = []
    for loader, title in zip(loaders, ("k-NN, train", "k-NN, val"), strict=True):
        rows, labels, bad = [], [], {}
        for batch in each_output(model, loader, device, dtype, predict, stopping, title):
            bad.update(batch.bad)
            rows.append(F.normalize(batch.rows, dim=1))
            labels.append(batch.labels)
        if any(gather_objects(stopping())):
            return None
        own = (torch.cat(rows), torch.cat(labels)) if rows else None
        parts = gather_objects((bad, sum(map(len, rows))))
        bad = {index: reason for part, _ in parts for index, reason in part.items()}
        check_bad_files(bad, loader.dataset, max_bad_images, any(count for _, count in parts))
        samples.append(own)
    bank, queries = samples
    queries, labels = _joined(gather_objects(queries), dim=0)
    found = None
    if bank and len(bank[0]):
        found = rule.nearest(queries.to(device), *(part.to(device) for part in bank))
        found = tuple(part.cpu() for part in found)
    similar, neighbors = _joined(gather_objects(found), dim=1)
    similar, order = similar.topk(min(rule.count, similar.shape[1]))
    votes = rule.votes(similar, neighbors.gather(1, order), len(train.classes))
    _, top1, top5, *_ = judge(votes, labels)
    return {
        f"knn_{k}": 100 * hits.double().mean().item()
        for k, hits in (("acc1", top1), ("acc5", top5))
    }


def _joined(parts: Sequence[Sequence[Tensor] | None], dim: int) -> tuple[Tensor, ...]:
    """Tensors of the processes that have some."""
    return tuple(torch.cat(column, dim) for column in zip(*filter(None, parts), strict=True))
