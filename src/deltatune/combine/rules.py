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
Density = float | Sequence[float]  # one for all tensors, or one for each
CONSENSUS = ("mean", "weighted_mean", "sum")


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """The weighted sum."""
    stacked, w = _stacked(task_tensors, weights)
    return (stacked * w).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Weights, density: Density) -> Tensor:
    """The weighted sum of the largest entries of each tensor."""
    return task_arithmetic(_trimmed(task_tensors, density), weights)


def dare_linear(
    task_tensors: Sequence[Tensor], weights: Weights, density: Density, generator: Generator | None = None
) -> Tensor:
    """The weighted sum of a random share of the entries, divided by that share: in expectation, the weighted sum."""
    return task_arithmetic(_dropped(task_tensors, density, generator), weights)


def ties(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: Density,
    majority_sign_method: str = "total",
    consensus: str = "mean",
) -> Tensor:
    """Trim, elect, merge: for each entry the weighted tensors that have the elected sign there, brought together.

    Args:
        density: Share of the entries of each tensor, the largest, that are kept.
        majority_sign_method: "total": the sign of the sum is elected; "frequency": that of most tensors.
        consensus: "mean": the sign is elected without the weights, and the sum of the w t that have it is divided by
            their number, as in PEFT. "weighted_mean" and "sum": weights count in the election, and the sum is divided
            by that of their weights, or by nothing, as in mergekit.
    """
    return _elected(_trimmed(task_tensors, density), weights, majority_sign_method, consensus)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    density: Density,
    majority_sign_method: str = "total",
    generator: Generator | None = None,
    consensus: str = "mean",
) -> Tensor:
    """As `ties`, of a random share of the entries instead of the largest."""
    return _elected(_dropped(task_tensors, density, generator), weights, majority_sign_method, consensus)


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


def _elected(kept: list[Tensor], weights: Weights, method: str, consensus: str) -> Tensor:
    check_consensus(consensus)
    stacked, w = _stacked(kept, weights)
    if consensus == "mean":
        return disjoint_merge(stacked * w, majority_sign_mask(stacked, method))
    weighted = stacked * w
    mask = majority_sign_mask(weighted, method)
    summed = (weighted * mask).sum(0)
    if consensus == "sum":
        return summed
    divisor = (w * mask).sum(0)
    return summed / torch.where(divisor == 0, 1, divisor)


def _trimmed(tensors: Sequence[Tensor], density: Density) -> list[Tensor]:
    return [prune(tensor, share, "magnitude") for tensor, share in zip(tensors, _each(density, len(tensors)))]


def _dropped(tensors: Sequence[Tensor], density: Density, generator: Generator | None) -> list[Tensor]:
    shares = _each(density, len(tensors))
    return [prune(t, share, "random", rescale=True, generator=generator) for t, share in zip(tensors, shares)]


def _each(density: Density, count: int) -> list[float]:
    shares = list(density) if isinstance(density, (list, tuple)) else [density] * count
    if len(shares) != count:
        raise MergeError(
            f"density: {len(shares)} of them for {count} tensors; give one for all, or one for each",
            field="density",
            found=len(shares),
            expected=count,
        )
    return shares  # type: ignore[return-value]


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


def check_consensus(consensus: str) -> None:
    if consensus not in CONSENSUS:
        raise MergeError(
            f"consensus={consensus!r}, expected one of {', '.join(CONSENSUS)}",
            field="consensus",
            found=consensus,
            expected=CONSENSUS,
        )


def check_sign_method(method: str) -> None:
    if method not in ("total", "frequency"):
        raise MergeError(
            f"majority_sign_method={method!r}, expected 'total' or 'frequency'",
            field="majority_sign_method",
            found=method,
            expected=("total", "frequency"),
        )
