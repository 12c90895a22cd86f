"""`Product`: a change of a weight as up @ down, and what can be done with it without the dense matrix.

The singular values of (out, R) @ (R, in) are those of a (R, R) core between two orthonormal bases, so that with R much
smaller than the sides a QR decomposition of each factor replaces the decomposition of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import MergeError


@dataclass(frozen=True)
class Product:
    """up (out, R) @ down (R, in)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def dense(self) -> Tensor:
        return self.up @ self.down

    def times(self, weight: float) -> Product:
        """Shared between both sides, so that one does not outgrow the other."""
        root = math.sqrt(abs(weight))
        return Product(self.up * root, self.down * math.copysign(root, weight))

    def to(self, dtype: torch.dtype) -> Product:
        return Product(self.up.to(dtype), self.down.to(dtype))

    def rows(self, start: int, stop: int) -> Product:
        """Those of the output; what they do not read is left out."""
        up = self.up[start:stop]
        read = (up != 0).any(0)
        return Product(up[:, read], self.down[read])

    def padded(self, rank: int) -> Product:
        """The same of a higher rank."""
        more = rank - self.rank
        up, down = self.up, self.down
        return Product(
            torch.cat([up, up.new_zeros(len(up), more)], 1), torch.cat([down, down.new_zeros(more, down.shape[1])])
        )


Matrix = Product | Tensor  # a change of a weight, as its factors where they are at hand


def dense(matrix: Matrix) -> Tensor:
    return matrix.dense if isinstance(matrix, Product) else matrix


def total(terms: Iterable[tuple[float, Matrix]]) -> Matrix:
    """The weighted sum, exactly: products side by side where all are products."""
    scaled = [(weight, matrix) for weight, matrix in terms]
    products = [matrix.times(weight) for weight, matrix in scaled if isinstance(matrix, Product)]
    if len(products) == len(scaled):
        return Product(torch.cat([p.up for p in products], 1), torch.cat([p.down for p in products]))
    return torch.stack([weight * dense(matrix) for weight, matrix in scaled]).sum(0)


def svd(
    matrix: Matrix, driver: str | None = None, decompose: Callable[[Tensor], Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), V (k, in) with U diag(S) V the matrix; `decompose` does it to dense ones."""
    parts = (matrix.up, matrix.down) if isinstance(matrix, Product) else (matrix,)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise MergeError(
            "the sum of the changes is not finite; are the adapters, and the weights small enough?",
            field="weights",
            found="not finite",
            expected="finite numbers",
        )
    if not isinstance(matrix, Product):
        return torch.linalg.svd(matrix, full_matrices=False, driver=driver) if decompose is None else decompose(matrix)
    wide = matrix.to(_precise(matrix.up))
    (Q, R), (P, T) = torch.linalg.qr(wide.up), torch.linalg.qr(wide.down.T)
    U, S, V = torch.linalg.svd(R @ T.T, full_matrices=False, driver=driver)
    return Q @ U, S, V @ P.T


def norm(matrix: Matrix) -> float:
    """Frobenius."""
    if not isinstance(matrix, Product):
        return matrix.norm().item()
    wide = matrix.to(_precise(matrix.up))
    R, T = torch.linalg.qr(wide.up, mode="r")[1], torch.linalg.qr(wide.down.T, mode="r")[1]
    return (R @ T.T).norm().item()


def distance(matrix: Matrix, product: Product) -> float:
    """|matrix - product|."""
    if isinstance(matrix, Product):
        wide = _precise(matrix.up)  # rounding must not hide the difference
        return norm(total([(1.0, matrix.to(wide)), (-1.0, product.to(wide))]))
    return norm(matrix - product.dense.to(matrix.dtype))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # thin factors: it costs little


@dataclass(frozen=True)
class Keep:
    """How many singular values are kept: `rank` of them, or as few as leave out a share of at most `missing` of their
    squares; all that are not rounding where neither is given."""

    rank: int | None = None
    missing: float = 0.0

    def count(self, S: Tensor, shape: tuple[int, int]) -> int:
        if self.rank is not None:
            return self.rank
        energy = S.double().square()
        if not energy.any():
            return 0
        if not self.missing:
            eps = torch.finfo(torch.float32).eps  # in which factors are kept
            return int(S.gt(S.max() * max(shape) * eps).sum())
        left_out = energy.flip(0).cumsum(0).flip(0)  # from the i-th on
        return int((left_out > self.missing * left_out[0]).sum())


def truncated(matrix: Matrix, keep: Keep, **options: Any) -> Product:
    """The nearest product of that rank: U diag(S) and V. Zeros fill up a rank beyond that of the matrix."""
    U, S, V = svd(matrix, **options)
    sides = matrix.up if isinstance(matrix, Product) else matrix
    count = max(1, keep.count(S, (len(sides), V.shape[1])))
    product = Product(U[:, :count] * S[:count], V[:count]).to(sides.dtype)
    return product.padded(count) if product.rank < count else product
