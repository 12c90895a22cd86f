"""Maths that methods share: factors, block-diagonal matrices, rotations, reflections, random projections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap


class Factor(nn.Module):
    """One trainable tensor called `weight`, uninitialised, in the shape in which files keep it; perhaps a bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, *shape: int, bias: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))

    @property
    def matrix(self) -> Tensor:
        """The tensor as a matrix: a convolution's kernel positions join its channels."""
        return self.weight.flatten(1)

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


def block_diagonal(matrix: Tensor, blocks: int) -> Tensor:
    """(out, r / blocks) -> (out, r): the rows of block i read the i-th share of the columns."""
    return matrix if blocks == 1 else torch.block_diag(*matrix.chunk(blocks))


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """(blocks, size (size - 1) / 2) -> (blocks, size, size): the entries above the diagonal, and Q^T = -Q."""
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(entries.shape[0], size, size).index_put(
        (torch.arange(entries.shape[0], device=entries.device)[:, None], rows, columns), entries
    )
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """Rotations R = (I - Q)(I + Q)^-1 of skew-symmetric matrices Q (blocks, size, size)."""
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))  # no solver works in half precision
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=wide.dtype)
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(Q.dtype)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """The Cayley rotation (I + Q)(I - Q)^-1 as the series I + 2Q + 2Q^2 + ..., its last power with weight one.

    That weight, the highest power (terms - 1, but never 2) and the sign, opposite to that of `cayley`, are those of
    OFTv2's code and so of every file.   https://arxiv.org/abs/2506.19847
    """
    R = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype).expand_as(Q)
    last = terms - 1 if terms <= 2 else max(terms - 1, 3)
    power = Q
    for order in range(1, last + 1):
        R = R + (power if order == last > 1 else 2 * power)
        power = power @ Q
    return R


def reflect(x: Tensor, u: Tensor) -> Tensor:
    """x (I - 2 u u^T) over the last axis, for a unit vector u."""
    return x - 2 * (x @ u)[..., None] * u


def orthonormal(columns: Tensor) -> Tensor:
    """The columns made orthonormal by Gram-Schmidt, in order."""
    done: list[Tensor] = []
    for column in columns.unbind(1):
        for earlier in done:
            column = column - (earlier @ column) * earlier
        done.append(column / column.norm())
    return torch.stack(done, dim=1)


def largest_sides(layers: Iterable[LinearMap]) -> tuple[int, int]:
    """Outputs and inputs of the smallest matrix of which every layer's is a corner."""
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    return max(out for out, _ in sizes), max(width for _, width in sizes)


def random_projection(*shape: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform start, out of a generator of its own."""
    return nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
