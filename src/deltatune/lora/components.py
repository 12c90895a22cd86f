"""`Components`: the principal components of rows that come batch by batch.   https://doi.org/10.1007/s11263-007-0075-7

The decomposition of a batch beside what is known of those before it: [diag(S) V; X - mean; correction of the mean].
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEED = 42  # of the randomised decomposition; PEFT's, so that equal inputs give equal components


class Components:
    """Fit with `add`. Then `V` (k, in), their singular values `S` and the shares of variance they explain."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.V: Tensor | None = None
        self.S = self.share = torch.zeros(0)
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())  # of the deviations from the mean, summed, by column

    def add(self, X: Tensor) -> None:
        """Rows (n, in), at least k of them."""
        X, n = X.float(), len(X)
        mean, count = X.mean(0, dtype=torch.float64), self.count + n
        apart = self.mean - mean
        squares = X.double().sub(mean).square().sum(0) + (apart.square() * self.count * n / count if self.count else 0)
        centred = X - X.mean(0)
        if self.V is not None:
            correction = apart * (self.count * n / count) ** 0.5  # in float64, as all that follows
            centred = torch.cat([self.S[:, None] * self.V, centred, correction[None]])
        S, V = _decomposed(centred, self.k)
        self.squares = self.squares + squares if self.count else squares
        self.mean, self.count = (self.mean * self.count + mean * n) / count, count
        self.V, self.S, self.share = V, S, S.square() / self.squares.sum().clamp_min(1e-30)


def _decomposed(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest singular values and right vectors, each with its largest entry positive."""
    with torch.random.fork_rng([X.device] if X.is_cuda else []):
        torch.manual_seed(_SEED)
        _, S, V = torch.svd_lowrank(X, q=min(2 * k, *X.shape), niter=4)
    V = V.mT
    signs = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return S[:k], (V * signs)[:k]
