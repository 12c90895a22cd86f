"""What several adapters do on one layer, as the factors of one.

A LoRA adapter's change of a weight is a product, and a sum of products is one of a higher rank: [B1 B2] [A1; A2]. So
sums are exact in factors, or are brought down to a rank by a decomposition of those. What looks at single entries of
the changes, to prune them or to elect a sign, needs the dense matrices (`..._svd`) or takes the entries of the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.combine import lora, rules
from deltatune.combine.arguments import BY_SVD, EXACT, PRUNED, Request
from deltatune.combine.changes import Change
from deltatune.combine.product import Keep, Product, dense, total
from deltatune.errors import MergeError


class Term(NamedTuple):
    """One adapter on one layer: what it weighs, what it changes, the share of it that pruning keeps."""

    weight: float
    change: Change
    density: float | None = None


class Shares(NamedTuple):
    """What the tensors that meet in a rule weigh, and the share of each that pruning keeps."""

    weights: list[float]
    densities: list[float | None]

    @classmethod
    def of(cls, terms: list[Term]) -> Shares:
        return cls([term.weight for term in terms], [term.density for term in terms])


_RULES: dict[str, Callable[[list[Tensor], list[float], Any, Request], Tensor]] = {
    "magnitude_prune": lambda tensors, w, density, ask: rules.magnitude_prune(tensors, w, density),
    "dare_linear": lambda tensors, w, density, ask: rules.dare_linear(tensors, w, density, ask.generator),
    "ties": lambda tensors, w, density, ask: rules.ties(tensors, w, density, ask.majority_sign_method, ask.consensus),
    "dare_ties": lambda tensors, w, density, ask: rules.dare_ties(
        tensors, w, density, ask.majority_sign_method, ask.generator, ask.consensus
    ),
}


def of_layer(path: str, terms: list[Term], ask: Request, rank: int | None) -> lora.Factors:
    changes = [term.change for term in terms]
    like, kind, bias = changes[0], ask.combination_type, _bias(terms, ask)
    weighted = [(term.weight, term.change.weight) for term in terms]
    if kind in EXACT:
        return lora.stacked(total(weighted), like, bias)
    if kind not in BY_SVD:
        return _in_factors(path, terms, ask, bias)
    if kind == "svd":
        matrix = total(weighted)
    else:
        matrix = _ruled([dense(change.weight) for change in changes], Shares.of(terms), ask)
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


def _ruled(tensors: list[Tensor], shares: Shares, ask: Request) -> Tensor:
    rule, weights = ask.pruning, shares.weights
    if rule is None:
        return rules.task_arithmetic(tensors, weights)
    return _RULES[rule](tensors, weights, shares.densities, ask)


def _bias(terms: list[Term], ask: Request) -> Tensor | None:
    changed = [term for term in terms if term.change.bias is not None]
    if not changed:
        return None
    return _ruled([term.change.bias for term in changed], Shares.of(changed), ask)  # type: ignore[misc]


def _in_factors(path: str, terms: list[Term], ask: Request, bias: Tensor | None) -> lora.Factors:
    """Pruning that looks at the entries of A and of B."""
    products = [term.change.weight for term in terms]
    if not all(isinstance(product, Product) for product in products):
        raise MergeError(
            f"combination_type={ask.combination_type!r} works on the factors of LoRA and its relatives, and an adapter "
            f"at {path} has none; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ask.combination_type,
        )
    like = terms[0].change
    groups = list(zip(*(lora.pieces(product, like.groups) for product in products)))
    combine = _pruned if ask.combination_type in PRUNED else _elected
    made = [combine(path, list(group), Shares.of(terms), ask).to(like.dtype) for group in groups]  # type: ignore[arg-type]
    rank = max(product.rank for product in made)
    return lora.Factors(tuple(product.padded(max(1, rank)) for product in made), bias)


def _pruned(path: str, products: list[Product], shares: Shares, ask: Request) -> Product:
    """Each adapter's factors pruned, and the products added up: no factor of one meets one of another."""

    def prune(factor: Tensor, density: float | None) -> Tensor:
        return _ruled([factor], Shares([1.0], [density]), ask)

    downs = [prune(p.down, density) for p, density in zip(products, shares.densities)]  # the order in which PEFT draws
    summed = total((w, Product(prune(p.up, density), down)) for w, density, p, down in zip(*shares, products, downs))
    assert isinstance(summed, Product)
    return summed


def _elected(path: str, products: list[Product], shares: Shares, ask: Request) -> Product:
    ranks = [product.rank for product in products]
    if len(set(ranks)) > 1:
        raise MergeError(
            f"combination_type={ask.combination_type!r} merges factors entry by entry, for which ranks have to be "
            f"equal; at {path} they are {ranks}; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ranks,
        )
    roots = [abs(w) ** 0.5 for w in shares.weights]
    signed = [root if w >= 0 else -root for root, w in zip(roots, shares.weights)]
    down = _ruled([product.down for product in products], shares._replace(weights=signed), ask)
    return Product(_ruled([product.up for product in products], shares._replace(weights=roots), ask), down)


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
