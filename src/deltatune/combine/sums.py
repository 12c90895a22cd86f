"""What several adapters do on one layer, as the factors of one.

A LoRA adapter's change of a weight is a product, and a sum of products is one of a higher rank: [B1 B2] [A1; A2]. So
sums are exact in factors, or are brought down to a rank by a decomposition of those. What looks at single entries of
the changes, to prune them or to elect a sign, needs the dense matrices (`..._svd`) or takes the entries of the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune.combine import lora, rules
from deltatune.combine.arguments import BY_SVD, EXACT, PRUNED, Request
from deltatune.combine.changes import Change
from deltatune.combine.product import Keep, Product, dense, total
from deltatune.errors import MergeError

Terms = list[tuple[float, Change]]

_RULES: dict[str, Callable[[list[Tensor], list[float], Request], Tensor]] = {
    "magnitude_prune": lambda tensors, w, ask: rules.magnitude_prune(tensors, w, _density(ask)),
    "dare_linear": lambda tensors, w, ask: rules.dare_linear(tensors, w, _density(ask), ask.generator),
    "ties": lambda tensors, w, ask: rules.ties(tensors, w, _density(ask), ask.majority_sign_method),
    "dare_ties": lambda tensors, w, ask: rules.dare_ties(
        tensors, w, _density(ask), ask.majority_sign_method, ask.generator
    ),
}


def of_layer(path: str, terms: Terms, ask: Request, rank: int | None) -> lora.Factors:
    weights, changes = [w for w, _ in terms], [change for _, change in terms]
    like, kind, bias = changes[0], ask.combination_type, _bias(terms, ask)
    if kind in EXACT:
        return lora.stacked(total((w, change.weight) for w, change in terms), like, bias)
    if kind not in BY_SVD:
        return _in_factors(path, terms, ask, bias)
    if kind == "svd":
        matrix = total((w, change.weight) for w, change in terms)
    else:
        matrix = _ruled([dense(change.weight) for change in changes], weights, ask)
    keep = Keep(_possible(matrix, like.groups, rank, given=ask.svd_rank is not None))
    made = lora.factors(matrix, like, keep, bias, driver=ask.svd_driver)
    return made if ask.svd_clamp is None else _clamped(made, ask.svd_clamp)


def _possible(matrix: Any, groups: int, rank: int | None, given: bool) -> int:
    """The rank, or the highest that the layer can have; one that is not asked for is no higher than that of the sum."""
    assert rank is not None
    out, width = (len(matrix.up), matrix.down.shape[1]) if isinstance(matrix, Product) else matrix.shape
    highest = groups * min(out // groups, width)
    if isinstance(matrix, Product) and not given:
        highest = max(groups, min(highest, matrix.rank))
    return min(rank, highest)


def _ruled(tensors: list[Tensor], weights: list[float], ask: Request) -> Tensor:
    rule = ask.pruning
    return rules.task_arithmetic(tensors, weights) if rule is None else _RULES[rule](tensors, weights, ask)


def _bias(terms: Terms, ask: Request) -> Tensor | None:
    changed = [(w, change.bias) for w, change in terms if change.bias is not None]
    return _ruled([bias for _, bias in changed], [w for w, _ in changed], ask) if changed else None


def _in_factors(path: str, terms: Terms, ask: Request, bias: Tensor | None) -> lora.Factors:
    """Pruning that looks at the entries of A and of B."""
    products = [change.weight for _, change in terms]
    if not all(isinstance(product, Product) for product in products):
        raise MergeError(
            f"combination_type={ask.combination_type!r} works on the factors of LoRA and its relatives, and an adapter "
            f"at {path} has none; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ask.combination_type,
        )
    like, weights = terms[0][1], [w for w, _ in terms]
    groups = list(zip(*(lora.pieces(product, like.groups) for product in products)))
    combine = _pruned if ask.combination_type in PRUNED else _elected
    made = [combine(path, list(group), weights, ask).to(like.dtype) for group in groups]  # type: ignore[arg-type]
    rank = max(product.rank for product in made)
    return lora.Factors(tuple(product.padded(max(1, rank)) for product in made), bias)


def _pruned(path: str, products: list[Product], weights: list[float], ask: Request) -> Product:
    """Each adapter's factors pruned, and the products added up: no factor of one meets one of another."""

    def prune(factor: Tensor) -> Tensor:
        return _ruled([factor], [1.0], ask)

    downs = [prune(product.down) for product in products]  # the order in which PEFT draws
    summed = total((w, Product(prune(p.up), down)) for w, p, down in zip(weights, products, downs))
    assert isinstance(summed, Product)
    return summed


def _elected(path: str, products: list[Product], weights: list[float], ask: Request) -> Product:
    ranks = [product.rank for product in products]
    if len(set(ranks)) > 1:
        raise MergeError(
            f"combination_type={ask.combination_type!r} merges factors entry by entry, for which ranks have to be "
            f"equal; at {path} they are {ranks}; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ranks,
        )
    roots = [abs(w) ** 0.5 for w in weights]
    signed = [root if w >= 0 else -root for root, w in zip(roots, weights)]
    down = _ruled([product.down for product in products], signed, ask)
    return Product(_ruled([product.up for product in products], roots, ask), down)


def _clamped(made: lora.Factors, quantile: float) -> lora.Factors:
    """As kohya's scripts do it after a decomposition: at a quantile of the entries of both factors."""

    def clamp(product: Product) -> Product:
        entries = torch.cat([product.up.flatten(), product.down.flatten()]).float()
        limit = _quantile(entries, quantile)
        return Product(product.up.clamp(-limit, limit), product.down.clamp(-limit, limit))

    return dataclasses.replace(made, groups=tuple(clamp(product) for product in made.groups))


def _quantile(entries: Tensor, share: float) -> float:
    """Interpolated; `torch.quantile` takes no more than 2^24 entries."""
    place = share * (len(entries) - 1)
    below = int(place)
    low = entries.kthvalue(below + 1).values.item()
    high = entries.kthvalue(min(below + 2, len(entries))).values.item()
    return max(0.0, low + (place - below) * (high - low))


def _density(ask: Request) -> float:
    assert ask.density is not None  # checked
    return ask.density
