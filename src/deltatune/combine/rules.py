"""How several tensors become one: weighted sums of what is left after pruning, and the election of signs.

Task arithmetic https://arxiv.org/abs/2212.04089, TIES https://arxiv.org/abs/2306.01708, DARE
https://arxiv.org/abs/2311.03099. Each takes tensors of one shape and a weight for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from deltatune.errors import MergeError

Weights = Sequence[float] | Tensor


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """The weighted sum."""
    stacked, w = _stacked(task_tensors, weights)
    return (stacked * w).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Weights, density: float) -> Tensor:
    """The weighted sum of the largest entries of each tensor."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(
    task_tensors: Sequence[Tensor], weights: Weights, density: float, generator: Generator | None = None
) -> Tensor:
    """The weighted sum of a random share of the entries, divided by that share: in expectation, the weighted sum."""
    return task_arithmetic(_dropped(task_tensors, density, generator), weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Weights, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Trim, elect, merge: for each entry the weighted mean of the tensors that have the elected sign there.

    Args:
        density: Share of the entries of each tensor, the largest, that are kept.
        majority_sign_method: "total": the sign of the sum is elected; "frequency": that of most tensors.
    """
    kept = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _elected(kept, weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: float,
    majority_sign_method: str = "total",
    generator: Generator | None = None,
) -> Tensor:
    """As `ties`, of a random share of the entries instead of the largest."""
    return _elected(_dropped(task_tensors, density, generator), weights, majority_sign_method)


def prune(
    tensor: Tensor, density: float, method: str, rescale: bool = False, generator: Generator | None = None
) -> Tensor:
    """The tensor with only a share `density` of its entries, zeros elsewhere.

    Args:
        method: "magnitude": the largest entries, exactly int(density * entries) of them. "random": each entry with
            that probability.
        rescale: Divide what is left by `density` (random pruning).
    """
    check_density(density, positive=method == "random" and rescale)
    if method not in ("magnitude", "random"):
        raise MergeError(f"prune: method={method!r}, expected 'magnitude' or 'random'", field="method", found=method)
    if density == 1:
        return tensor
    if method == "magnitude":
        flat = tensor.flatten()
        largest = flat.abs().topk(int(density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(tensor)
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return kept / density if rescale else kept


def majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Of tensors stacked on the first axis: where each has the sign that is elected for the entry."""
    check_sign_method(method)
    sign = tensor.sign()
    elected = torch.where((tensor if method == "total" else sign).sum(0) >= 0, 1, -1)
    return sign == elected


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean, entry by entry, of the stacked tensors where the mask is set; zero where it is nowhere."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def _elected(kept: list[Tensor], weights: Weights, method: str) -> Tensor:
    stacked, w = _stacked(kept, weights)
    return disjoint_merge(stacked * w, majority_sign_mask(stacked, method))


def _dropped(tensors: Sequence[Tensor], density: float, generator: Generator | None) -> list[Tensor]:
    return [prune(tensor, density, "random", rescale=True, generator=generator) for tensor in tensors]


def _stacked(tensors: Sequence[Tensor], weights: Weights) -> tuple[Tensor, Tensor]:
    if len(tensors) != len(weights) or not len(tensors):
        raise MergeError(
            f"{len(weights)} weights for {len(tensors)} tensors; give one for each, and at least one",
            field="weights",
            found=len(weights),
            expected=len(tensors),
        )
    stacked = torch.stack(list(tensors))
    w = torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device)
    return stacked, w.view(-1, *[1] * (stacked.ndim - 1))


def check_density(density: float | None, positive: bool = False) -> None:
    """Refuse what is no share; `positive`: what is left is divided by it."""
    number = isinstance(density, (int, float)) and not isinstance(density, bool) and math.isfinite(density)
    if not number or not 0 <= density <= 1 or (positive and density == 0):  # type: ignore[operator]
        raise MergeError(
            f"density={density!r}: expected the share of entries to keep, a number in {'(' if positive else '['}0, 1]",
            field="density",
            found=density,
        )


def check_sign_method(method: str) -> None:
    if method not in ("total", "frequency"):
        raise MergeError(
            f"majority_sign_method={method!r}, expected 'total' or 'frequency'",
            field="majority_sign_method",
            found=method,
            expected=("total", "frequency"),
        )
