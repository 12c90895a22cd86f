"""How much of an adapter's rank is used: the singular values of every layer's product B A, from the factors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from deltatune.combine.product import Product, svd
from deltatune.patterns import pattern_value

ROOT = re.compile(r"^base_model\.model\.")
HELD = 0.99  # of the squared singular values
DEAD = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Spectrum:
    """One layer's product B A, times its scaling where the config has one.

    Attributes:
        norm: Frobenius norm.
        largest: The largest singular value.
        effective_rank: exp of the entropy of the singular values as shares of their sum: 1 where one direction does
            all, the rank where all do the same. https://ieeexplore.ieee.org/document/7098875
        needed: Directions that hold 99 % of the squared norm: a rank that would do.
        dead: Directions of the rank without any effect.
    """

    layer: str
    rank: int
    scaling: float
    norm: float
    largest: float
    effective_rank: float
    needed: int
    dead: int


def spectra(config: Any, tensors: dict[str, Tensor], stem: str) -> list[Spectrum]:
    """Of every layer with tensors `<stem>_A` and `<stem>_B`; factors of experts or of blocks are left out."""
    found = []
    for layer, down, up in factors(tensors, stem):
        scaling = scaling_of(config, layer, len(down))
        found.append(_spectrum(layer, Product(up.float(), down.float()), scaling))
    return found


def factors(tensors: dict[str, Tensor], stem: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, A (r, in) and B (out, r), those of a convolution flattened."""
    for name in tensors:
        if (end := re.search(rf"\.{stem}_(embedding_)?A(\.weight)?$", name)) is None:
            continue
        other = name[: end.start()] + end.group().replace("_A", "_B")
        if other not in tensors:
            continue
        down, up = tensors[name], tensors[other]
        if down.dim() < 2 or up.dim() < 2:
            continue
        down, up = down.flatten(1), up.flatten(1)
        if up.shape[1] == len(down) and bool(down.isfinite().all() and up.isfinite().all()):
            yield ROOT.sub("", name[: end.start()]), down, up


def scaling_of(config: Any, layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the layer's own alpha; 1 where the method has none."""
    alpha = getattr(config, "lora_alpha", None)
    if alpha is None:
        return 1.0
    alpha = pattern_value(getattr(config, "alpha_pattern", None) or {}, layer, alpha)
    return alpha / (sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def _spectrum(layer: str, product: Product, scaling: float) -> Spectrum:
    values = svd(product)[1][: product.rank].double() * abs(scaling)
    norm, largest = values.norm().item(), values.max().item()
    if largest == 0:
        return Spectrum(layer, product.rank, scaling, 0.0, 0.0, 0.0, 0, product.rank)
    shares = values / values.sum()
    shares = shares[shares > 0]
    energy = values.square().cumsum(0) / values.square().sum()
    return Spectrum(
        layer=layer,
        rank=product.rank,
        scaling=scaling,
        norm=norm,
        largest=largest,
        effective_rank=torch.exp(-(shares * shares.log()).sum()).item(),
        needed=int((energy < HELD).sum()) + 1,
        dead=product.rank - int((values > DEAD * largest).sum()),
    )
