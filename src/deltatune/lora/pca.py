"""`IncrementalPCA`: `Components` under the names that scikit-learn and PEFT have for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError, MismatchError
from deltatune.lora.components import Components, fast


class IncrementalPCA:
    """Principal components of rows that come batch by batch, on the device of the rows.

    Attributes:
        components_: (n_components, features), the first explains most; `singular_values_`, `explained_variance_` and
            `explained_variance_ratio_` (n_components,) belong to them.
        mean_: (features,), and `var_`, of all rows so far.
        noise_variance_: The mean variance of the directions that were left out of the last batch.
        n_samples_seen_: The number of rows so far, as a tensor (1,).
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    mean_: Tensor
    var_: Tensor
    noise_variance_: Tensor
    n_samples_seen_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        """Arguments are PEFT's.

        Args:
            n_components: How many; all that the first batch allows if left out.
            copy: Without effect: rows are never written to.
            batch_size: Of `fit`; 5 times the number of features if left out.
            svd_driver: Of `torch.linalg.svd`, on CUDA.
            lowrank: `torch.svd_lowrank` instead, on `lowrank_q` directions (2 n_components if left out), with
                `lowrank_niter` iterations and perhaps a seed.
        """
        if lowrank and lowrank_q is None and n_components is None:
            raise ConfigError("IncrementalPCA: n_components is needed with lowrank=True", field="n_components")
        if lowrank and lowrank_q is not None and lowrank_q < (n_components or 0):
            raise ConfigError(
                f"IncrementalPCA: lowrank_q={lowrank_q} is less than n_components={n_components}",
                field="lowrank_q",
                found=lowrank_q,
            )
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_niter, self.lowrank_seed = lowrank, lowrank_niter, lowrank_seed
        self.lowrank_q = lowrank_q or (2 * n_components if lowrank and n_components else None)
        self.n_features_: int | None = None
        how = functools.partial(fast, q=self.lowrank_q, iterations=lowrank_niter, seed=lowrank_seed)
        self._fitted = Components(n_components, how if lowrank else self._whole)

    def _whole(self, X: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, S, V = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
        return S, V

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take rows (n, features) in batches of `batch_size`."""
        X = self._checked(X) if check_input else X
        self.batch_size = self.batch_size or 5 * X.shape[1]
        for part in self.gen_batches(len(X), self.batch_size, self.n_components or 0):
            self.partial_fit(X[part], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take rows (n, features) as one batch, of n_components rows or more."""
        X = self._checked(X) if check_input else X
        if self.n_features_ not in (None, X.shape[1]):
            raise MismatchError(
                f"IncrementalPCA: this batch has {X.shape[1]} features, those before it had {self.n_features_}",
                found=X.shape[1],
                expected=self.n_features_,
            )
        fitted = self._fitted
        fitted.add(X)
        assert fitted.V is not None
        self.n_features_, self.n_components = X.shape[1], fitted.k
        degrees = max(fitted.count - 1, 1)
        self.components_, self.singular_values_ = fitted.V, fitted.S
        self.explained_variance_, self.explained_variance_ratio_ = fitted.S.square() / degrees, fitted.share
        self.mean_, self.var_ = fitted.mean, fitted.squares / fitted.count
        self.noise_variance_ = fitted.cut.square().mean() / degrees if len(fitted.cut) else X.new_zeros(())
        self.n_samples_seen_ = torch.tensor([fitted.count], device=X.device)
        return self

    def transform(self, X: Any) -> Tensor:
        """Rows (n, features) as coordinates (n, n_components), in float64."""
        X = torch.as_tensor(X).double() - self.mean_
        return X @ self.components_.double().T

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` out of n; the last has what is left, and never less than `min_batch_size`."""
        start = 0
        while start + batch_size + min_batch_size <= n:
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Any) -> Tensor:
        X = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        if X.ndim != 2 or (self.n_components or 0) > min(X.shape):
            raise ConfigError(
                f"IncrementalPCA: n_components={self.n_components} needs rows (n, features) with as many of both, "
                f"not {tuple(X.shape)}",
                field="n_components",
                found=tuple(X.shape),
            )
        return X
