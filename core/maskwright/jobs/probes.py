"""Probes: how well frozen features tell classes apart."""

from __future__ import annotations

from torch import Tensor

NEIGHBOURS = 20


def linear_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of logistic regression on standardised features [N, D], labels int64 [N]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
    probe.fit(train_x.double().numpy(), train_y.numpy())
    return float(probe.score(test_x.double().numpy(), test_y.numpy()))


def knn_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of the weighted vote of the 20 nearest training features by cosine (Wu et al., arXiv:1805.01978)."""
    from torch.nn.functional import normalize, one_hot

    train, test = (normalize(x.double(), dim=1) for x in (train_x, test_x))
    near, index = (test @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = one_hot(train_y)[index] * (near / 0.07).exp()[..., None]
    return float((votes.sum(1).argmax(1) == test_y).double().mean())
