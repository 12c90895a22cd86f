"""`Components`: the principal components of rows that come batch by batch.   https://doi.org/10.1007/s11263-007-0075-7

The decomposition of a batch beside what is known of those before it: [diag(S) V; X - mean; correction of the mean].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SEED = 42  # of the randomised decomposition; PEFT's, so that equal inputs give equal components


class Components:
    """Fit with `add`. Then `V` (k, in), their singular values `S` and the shares of variance they explain.

    Attributes:
        k: How many are kept; None for as many as the first batch has rows or columns.
        decompose: (matrix, k) -> all the singular values (at least k) and right vectors that it finds.
        cut: Singular values of the last decomposition that were not kept.
        squares: Of the deviations from the mean, summed, by column.
    """

    def __init__(self, k: int | None, decompose: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None) -> None:
        self.k = k
        self.decompose = decompose or fast
        self.V: Tensor | None = None
        self.S = self.share = self.cut = torch.zeros(0)
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, X: Tensor) -> None:
        """Rows (n, in), at least k of them."""
        X, n = X.to(torch.promote_types(X.dtype, torch.float32)), len(X)
        self.k = self.k or min(X.shape)
        mean, count = X.mean(0, dtype=torch.float64), self.count + n
        apart = self.mean - mean
        squares = X.double().sub(mean).square().sum(0) + (apart.square() * self.count * n / count if self.count else 0)
        centred = X - X.mean(0)
        if self.V is not None:
            correction = apart * (self.count * n / count) ** 0.5  # in float64, as all that follows
            centred = torch.cat([self.S[:, None] * self.V, centred, correction[None]])
        S, V = self.decompose(centred, self.k)
        V = V[: self.k]
        signs = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # of each vector the largest entry is positive
        self.squares = self.squares + squares if self.count else squares
        self.mean, self.count = (self.mean * self.count + mean * n) / count, count
        self.V, self.S, self.cut = V * signs, S[: self.k], S[self.k :]
        self.share = self.S.square() / self.squares.sum().clamp_min(1e-30)


def fast(
    X: Tensor, k: int, q: int | None = None, iterations: int = 4, seed: int | None = _SEED
) -> tuple[Tensor, Tensor]:
    """Randomised, on a space of q directions, 2 k if left out; without a seed it draws from torch's own generator."""
    with torch.random.fork_rng([X.device] if X.is_cuda else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        _, S, V = torch.svd_lowrank(X, q=min(q or 2 * k, *X.shape), niter=iterations)
    return S, V.mT
