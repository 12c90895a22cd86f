"""How two adapters differ, by their files: options, tensors, and per layer how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.combine.product import Product, total
from deltatune.inspect.adapter import natural, opened
from deltatune.inspect.spectrum import factors, scaling_of
from deltatune.registry import METHODS

UNTOLD = frozenset({"peft_version", "inference_mode"})  # fields whose difference says nothing of an adapter


@dataclass(frozen=True)
class Distance:
    """Two changes D and E of one layer, or two values of one tensor.

    Attributes:
        relative: |D - E| / max(|D|, |E|), 0 for equal ones.
        cosine: <D, E> / |D| |E|; None where one is zero.
    """

    name: str
    norms: tuple[float, float]
    relative: float
    cosine: float | None


@dataclass(frozen=True)
class AdapterDifference:
    """`distances` compares products B A times their scaling where both have paired factors, else tensors by name.

    Attributes:
        options: Field -> its two values; None where a file does not have it.
        only_first: Layers or tensors that the second lacks; `only_second` likewise.
        unlike: Those of other shapes, with both.
        same_base: None where a file does not say which base it was made for.
    """

    folders: tuple[str, str]
    methods: tuple[str, str]
    same_base: bool | None
    options: dict[str, tuple[Any, Any]]
    only_first: list[str]
    only_second: list[str]
    unlike: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    distances: list[Distance]

    @property
    def identical(self) -> bool:
        """Whether both hold the same change of the same layers."""
        apart = self.only_first or self.only_second or self.unlike or any(d.relative > 0 for d in self.distances)
        return not apart and self.methods[0] == self.methods[1]


def diff_adapters(first: str | Path, second: str | Path) -> AdapterDifference:
    """Compare two adapter folders (or hub repositories); no base model is needed.

    LoRA adapters of other ranks, other scalings or turned factors are compared by what they do to a layer, so that two
    files with different numbers and the same effect are found equal.

    Raises:
        FormatError: One of them is no adapter folder.
    """
    one, other = opened(first), opened(second)
    changes = [_changes(each.config, each.tensors) for each in (one, other)]
    mine, theirs = changes
    both = [name for name in mine if name in theirs]
    unlike = {name: (shape_of(mine[name]), shape_of(theirs[name])) for name in both}
    unlike = {name: shapes for name, shapes in unlike.items() if shapes[0] != shapes[1]}
    values = one.config.to_file_dict(), other.config.to_file_dict()
    bases = [(each.facts or {}).get("base") for each in (one, other)]
    return AdapterDifference(
        folders=(str(first), str(second)),
        methods=(one.method, other.method),
        same_base=None if None in bases else bases[0] == bases[1],
        options=_options(*values),
        only_first=sorted(mine.keys() - theirs.keys(), key=natural),
        only_second=sorted(theirs.keys() - mine.keys(), key=natural),
        unlike=unlike,
        distances=[
            _distance(name, mine[name], theirs[name]) for name in sorted(both, key=natural) if name not in unlike
        ],
    )


def _changes(config: Any, tensors: dict[str, Tensor]) -> dict[str, Product | Tensor]:
    """By layer the product of its factors, and by name every other tensor."""
    found: dict[str, Product | Tensor] = {}
    stem = METHODS[config.peft_type].pairs
    used: set[int] = set()
    for layer, down, up in factors(tensors, stem) if stem else ():
        found[layer] = Product(up.float(), down.float()).times(scaling_of(config, layer, len(down)))
        used |= {down.data_ptr(), up.data_ptr()}
    return found | {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in used}


def shape_of(change: Product | Tensor) -> tuple[int, ...]:
    return (len(change.up), change.down.shape[1]) if isinstance(change, Product) else tuple(change.shape)


def _distance(name: str, one: Product | Tensor, other: Product | Tensor) -> Distance:
    norms = _norm(one), _norm(other)
    if isinstance(one, Product) and isinstance(other, Product):
        inner = torch.sum((other.up.T @ one.up).double() * (other.down @ one.down.T).double()).item()
        apart = _norm(total([(1.0, one), (-1.0, other)]))
    else:
        assert isinstance(one, Tensor) and isinstance(other, Tensor)  # equal names, so of equal kind
        flat = one.double().flatten(), other.double().flatten()
        inner, apart = torch.dot(*flat).item(), (flat[0] - flat[1]).norm().item()
    largest = max(norms)
    if isinstance(one, Product) and apart < 1e-6 * largest:
        apart = 0.0  # rounding of the factors
    cosine = inner / (norms[0] * norms[1]) if min(norms) > 0 else None
    return Distance(
        name, norms, apart / largest if largest else 0.0, None if cosine is None else min(1.0, max(-1.0, cosine))
    )


def _norm(change: Product | Tensor) -> float:
    """Of a product by its factors: |B A|^2 is the sum of (B^T B) * (A A^T)."""
    if isinstance(change, Tensor):
        return change.double().norm().item()
    up, down = change.up.double(), change.down.double()
    return max(0.0, ((up.T @ up) * (down @ down.T)).sum().item()) ** 0.5


def _options(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted((one.keys() | other.keys()) - UNTOLD)
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
