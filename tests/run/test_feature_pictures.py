"""Colours of feature maps."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from util.run.feature_pictures import pca_colors, scale_colors


def test_colours_are_scikit_learns_first_three_principal_components():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 6, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    colors = pca_colors(features).movedim(1, -1).reshape(-1, 3).numpy()
    theirs = PCA(3).fit_transform(features.reshape(-1, 8).numpy())
    for channel in range(3):
        inside = (colors[:, channel] > 0) & (colors[:, channel] < 1)  # the ends are cut
        fit = np.corrcoef(colors[inside, channel], theirs[inside, channel])[0, 1]
        assert abs(fit) > 1 - 1e-6
        assert inside.mean() > 0.9


def test_features_without_contrast_are_one_colour():
    assert pca_colors(torch.ones(1, 2, 2, 4)).unique().numel() == 1
    assert scale_colors(torch.ones(1, 2, 2)).flatten(2).std(-1).max() == 0
