"""k-nearest neighbours by features, compared with scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from engine_features import encode
from engine_knn import Neighbors, pooled_latent
from models_convmae import convmae_convvit_tiny_patch16
from models_convvit import convvit_from_weights
from tests.pictures import picture
from util.weights.read import weights_of


def test_votes_are_those_of_scikit_learns_weighted_neighbours():
    images, labels = load_digits(return_X_y=True)
    features = F.normalize(torch.tensor(images) - 8, dim=1)  # similarities of either sign
    bank, queries = features[:1200], features[1200:]
    rule = Neighbors(count=20, temperature=0.07)
    similar, neighbors = rule.nearest(queries, bank, torch.tensor(labels[:1200]))
    votes = rule.votes(similar, neighbors, 10)

    # The distance of unit vectors is 1 - s by "cosine".
    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    theirs = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weigh)
    theirs.fit(bank.numpy(), labels[:1200])
    np.testing.assert_allclose(votes, theirs.predict_proba(queries.numpy()), atol=1e-9)
    assert top_k_accuracy_score(labels[1200:], votes.numpy(), k=1) > 0.9


def test_fewer_samples_than_neighbours_all_vote():
    bank = torch.eye(3)
    similar, neighbors = Neighbors(20).nearest(bank, bank, torch.tensor([0, 1, 1]))
    assert similar.shape == (3, 3)
    assert Neighbors(20).votes(similar, neighbors, 2).argmax(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("class_token", [False, True])
def test_the_running_model_has_the_features_of_its_checkpoint(class_token):
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=(2, 2, 1), class_token=class_token)
    model = convmae_convvit_tiny_patch16(**sizes).eval()
    encoder, _ = convvit_from_weights(weights_of({"model": model.state_dict()}, "x.pth"))
    pixels = [np.asarray(picture(i, 32, 32)) for i in range(3)]
    imgs = torch.tensor(np.stack(pixels)).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(pooled_latent(model, imgs), encode(encoder.eval(), imgs))
