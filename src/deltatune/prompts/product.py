"""Products of two tensors as attention code writes them, read as an einsum: which axis is which of keys and values.

`torch.matmul(q, k.transpose(2, 3))` on four axes is "ABqc,ABck->ABqk". The operand whose own letter comes last in the
result holds the keys, that letter counts them, the contracted letter is the head dimension, and letters in all three
places are rows of the batch and heads, in this order; a single one is both, heads inside. `Roles` says so per axis:

    b  a row of the batch, or something else that keys and values do not depend on (blocks of a long text)
    h  heads        f  rows and heads folded into one axis        t  keys        d  head dimension
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor, nn

Roles = str

_MATMULS = {torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm}
_LEAD = "ABCDEFGH"


@dataclass(eq=False)
class Product:
    """One product of two activations.

    Attributes:
        letters: Of the axes of the first operand, the second, and the result.
        operands: The two tensors.
        again: The same product with other operands, without anything that is added.
        added: What is added to the product (baddbmm); None otherwise.
    """

    letters: tuple[str, str, str]
    operands: tuple[Tensor, Tensor]
    again: Callable[[Tensor, Tensor], Tensor]
    added: Tensor | None = None

    @property
    def signature(self) -> str:
        return "{},{}->{}".format(*self.letters)

    def with_operand(self, index: int, tensor: Tensor) -> Tensor:
        """The product with operand `index` replaced."""
        first, second = self.operands
        return self.again(tensor, second) if index == 0 else self.again(first, tensor)

    def queries(self, index: int) -> int:
        """How many queries operand `index` holds: the size of the axes that are its own."""
        own = [letter in self.letters[1 - index] for letter in self.letters[index]]
        return math.prod(size for size, shared in zip(self.operands[index].shape, own) if not shared)

    def partner(self, index: int, axis: int) -> int | None:
        """The axis of the other operand that `axis` of operand `index` is summed with; None where it is not."""
        letter = self.letters[index][axis]
        if letter not in self.letters[1 - index] or letter in self.letters[2]:
            return None
        return self.letters[1 - index].index(letter)

    def keys(self) -> tuple[int, int, int] | None:
        """Which operand holds the keys, which of its axes counts them, and which of the result (from the right)."""
        first, second, out = self.letters
        for axis in range(1, len(out) + 1):
            letter = out[-axis]
            if (letter in first) != (letter in second):
                index = 0 if letter in first else 1
                return index, self.letters[index].index(letter), -axis
        return None

    def roles(self, index: int, axis: int, heads: int | None = None) -> Roles | None:
        """Roles of the axes of operand `index`, whose `axis` counts keys; None where they are not plain.

        Args:
            heads: Number of heads that other products of the same module showed.
        """
        counting = self.letters[index][axis]
        own, other, out = self.letters[index], self.letters[1 - index], self.letters[2]
        shared = [letter for letter in own if letter in other and letter in out]
        rest = [letter for letter in own if letter not in shared and letter != counting]
        if len(rest) != 1 or len(set(own)) != len(own):
            return None
        sizes = dict(zip(own, self.operands[index].shape))
        queries = dict(zip(other, self.operands[1 - index].shape))
        roles = dict.fromkeys(shared, "b") | {counting: "t", rest[0]: "d"}
        explicit = [letter for letter in shared if letter.islower()]
        if len(explicit) == 1 and len(shared) > 1:  # "...hqk": the dots are rows and blocks
            roles[explicit[0]] = "h"
        elif len(shared) == 1:
            roles[shared[0]] = "f"
        else:
            # Keys that several heads share are broadcast over an axis of the queries: no heads of their own.
            several = [letter for letter in shared[1:] if not sizes[letter] == 1 < queries[letter]] or shared[1:2]
            if len(several) > 1:
                several = [letter for letter in several if sizes[letter] == heads]
                if len(several) != 1:
                    return None
            roles |= dict.fromkeys(several, "h")
        return "".join(roles[letter] for letter in own)


def as_product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """The product that a call computes; None for every other call, and where an operand is a weight."""
    found = _read(func, args, kwargs)
    if found is None or any(isinstance(operand, nn.Parameter) or operand.ndim < 2 for operand in found.operands):
        return None
    return found


def _read(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if func in _MATMULS:
        tensors += [kwargs[name] for name in ("input", "other", "mat2") if name in kwargs]
        if len(tensors) != 2 or min(tensor.ndim for tensor in tensors) < 2:
            return None
        return Product(_matmul_letters(*tensors), (tensors[0], tensors[1]), func)
    if func in (torch.baddbmm, Tensor.baddbmm):
        tensors += [kwargs[name] for name in ("batch1", "batch2") if name in kwargs]
        added, first, second = tensors
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        return Product(
            _matmul_letters(first, second),
            (first, second),
            lambda a, b: torch.bmm(a, b) * alpha,
            beta * added if beta else None,  # with beta = 0 it may be uninitialised memory
        )
    if func is torch.einsum:
        operands = args[1:] if isinstance(args[1], Tensor) else args[1]
        letters = _einsum_letters(args[0], operands)
        if letters is None:
            return None
        return Product(letters, (operands[0], operands[1]), lambda a, b: torch.einsum(args[0], a, b))
    return None


def _matmul_letters(first: Tensor, second: Tensor) -> tuple[str, str, str]:
    count = max(first.ndim, second.ndim) - 2
    lead = _LEAD[:count]
    return lead[count + 2 - first.ndim :] + "qc", lead[count + 2 - second.ndim :] + "ck", lead + "qk"


def _einsum_letters(equation: Any, operands: Any) -> tuple[str, str, str] | None:
    """The letters of an einsum of two operands, capitals in the place of dots."""
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    small = {letter: ascii_lowercase[i] for i, letter in enumerate(sorted(set(filter(str.isalpha, equation))))}
    sides, out = "".join(small.get(letter, letter) for letter in equation.replace(" ", "")).split("->")
    parts = sides.split(",")
    dots = [operand.ndim - len(part.replace("...", "")) for part, operand in zip(parts, operands)]
    lead = _LEAD[: max(dots)]
    first, second = (part.replace("...", lead[len(lead) - count :]) for part, count in zip(parts, dots))
    return first, second, out.replace("...", lead)


def lay_out(prefix: Tensor, roles: Roles, like: Tensor) -> Tensor:
    """Keys or values (1 or rows, heads, P, dim) with the axes of the operand `like`."""
    if "f" in roles:
        rows = like.shape[roles.index("f")] // prefix.shape[1]
        axes, order = _of_rows(prefix, rows).flatten(0, 1), "ftd"
    else:
        rows = like.shape[roles.index("b")] if "b" in roles else 1
        axes, order = _of_rows(prefix, rows), "bhtd"
        if "h" not in roles:
            axes, order = axes.squeeze(1), "btd"
        if "b" not in roles:
            axes, order = axes[0], order[1:]
    first = [axis for axis, role in enumerate(roles) if role != "b" or axis == roles.index("b")]
    axes = axes.permute(*(order.index(roles[axis]) for axis in first))
    for axis in range(len(roles)):
        axes = axes if axis in first else axes.unsqueeze(axis)
    return axes.expand(*(-1 if role == "t" else size for role, size in zip(roles, like.shape)))


def _of_rows(prefix: Tensor, rows: int) -> Tensor:
    """The prefix of every row; several rows of an operand belong to one of the batch when an image is cut up."""
    if prefix.shape[0] == 1:
        return prefix.expand(rows, -1, -1, -1)
    return prefix.repeat_interleave(rows // prefix.shape[0], dim=0)


def canonical(operand: Tensor, roles: Roles, heads: int | None = None) -> Tensor:
    """Keys or values as (rows, heads, keys, dim): the inverse of `lay_out`, of the first block where there are several.

    Args:
        heads: Needed where rows and heads are folded; left out for a batch of one row.
    """
    if "f" in roles:
        axis = roles.index("f")
        operand = operand.unflatten(axis, (-1, heads or operand.shape[axis]))
        roles = roles.replace("f", "bh")
    for axis in reversed([axis for axis, role in enumerate(roles) if role == "b"][1:]):
        operand, roles = operand.select(axis, 0), roles[:axis] + roles[axis + 1 :]
    for role in "bh":
        if role not in roles:
            operand, roles = operand.unsqueeze(0), role + roles
    return operand.permute(*(roles.index(role) for role in "bhtd"))
