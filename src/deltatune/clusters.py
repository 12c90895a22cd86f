"""k-means on rows, with the start, the order of steps and the stops of scikit-learn's, on which files rely."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SEED, _STEPS, _TOLERANCE = 123456789, 10, 1e-4


@torch.no_grad()
def k_means(rows: Tensor, count: int) -> Tensor:
    """The cluster of every row, numbered from 0: Lloyd's algorithm from `count` rows drawn by a fixed stream."""
    X = rows.detach().float().cpu().numpy()
    limit = float(X.var(axis=0).mean()) * _TOLERANCE
    X = X - X.mean(axis=0)
    equal = np.full(len(X), 1 / len(X), dtype=np.float32)
    centers = X[np.random.RandomState(_SEED).choice(len(X), size=count, replace=False, p=equal / equal.sum())]
    labels = np.full(len(X), -1)
    for _ in range(_STEPS):
        old, labels = labels, _nearest(X, centers)
        moved = _means(X, labels, centers)
        shift, centers = float(((moved - centers) ** 2).sum()), moved
        if np.array_equal(labels, old):
            return torch.from_numpy(labels)
        if shift <= limit:
            break
    return torch.from_numpy(_nearest(X, centers))


def _nearest(X: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return (np.einsum("ij,ij->i", centers, centers) - 2 * (X @ centers.T)).argmin(axis=1)


def _means(X: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The mean of each cluster; one that has lost all rows takes over one of those that are farthest from theirs."""
    sums, sizes = np.zeros_like(centers), np.bincount(labels, minlength=len(centers)).astype(X.dtype)
    torch.from_numpy(sums).index_add_(0, torch.from_numpy(labels), torch.from_numpy(X))
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        distances = ((X - centers[labels]) ** 2).sum(axis=1)
        for cluster, row in zip(empty, np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]):
            sums[cluster], sizes[cluster] = X[row], 1
            sums[labels[row]] -= X[row]
            sizes[labels[row]] -= 1
    return sums * (1 / np.maximum(sizes, 1))[:, None]
