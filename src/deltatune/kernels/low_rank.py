"""`low_rank_linear`: y = x W^T + b + (x * mask) A^T B^T of a frozen W, in the fewest passes over activations.

Written as products and sums it costs, beyond them, a pass over y to add, one to scale, two over the gradient of x, and
with dropout a mask as large as x that is drawn number by number. Here y and the gradient of x are made by the products
themselves, x is kept once however many layers read it, x A^T is made again for the gradient, and so is the mask, from
its seed. Plain torch below `deltatune.methods.lora` is the definition; tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.adapter import LinearMap

# Draw masks of dropout here. False: let torch draw them, as PEFT does, number for number under the same seed.
own_dropout = True


def fits(x: Tensor, layer: LinearMap, dropout: float = 0.0) -> bool:
    """Whether it can stand for that layer: one with a plain weight in the precision of x.

    Under the compiler, which fuses by itself, and under autocast, which chooses precisions product by product, the
    products are left as they are; on other devices too, where none of this has been measured.
    """
    if layer.kind != "linear" or not layer.dense or layer.dtype != x.dtype or torch.compiler.is_compiling():
        return False
    if dropout and not own_dropout:
        return False
    return x.device.type == "cpu" and x.is_floating_point() and not torch.is_autocast_enabled("cpu")


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float = 0.0
) -> Tensor:
    """x (..., in) through W (out, in) and B A, with A (r, in) and B (out, r), the scale in B.

    Args:
        dropout: Share of x that A does not see, on a CPU; drawn anew in every call, out of torch's generator.
    """
    if not dropout:
        return _LowRankLinear.apply(x, weight, bias, A, B, 0.0, 0)
    B = B * (_OF / _kept(dropout))  # what is kept is as much larger
    return _LowRankLinear.apply(x, weight, bias, A, B, dropout, int(torch.randint(2**62, ())))


class _LowRankLinear(torch.autograd.Function):
    """Products with r rows or columns are written with r first: (r, T) = A x^T is three times as fast as (T, r)."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float, seed: int
    ) -> Tensor:
        rows = _rows(x)
        y = F.linear(rows, weight, bias)
        seen = _kept_of(rows, _mask(rows, dropout, seed)) if dropout else rows
        h = A.to(x.dtype) @ seen.T  # (r, T)
        y.addmm_(h.T, B.to(x.dtype).T.contiguous())
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, A, B, ctx.dropout, ctx.seed = inputs
        ctx.save_for_backward(x, weight, A, B)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        of_x, of_W, of_b, of_A, of_B = ctx.needs_input_grad[:5]
        rows, g, A_, B_ = _rows(x), _rows(grads[0]), A.to(x.dtype), B.to(x.dtype)
        through = B_.T.contiguous() @ g.T  # (r, T)
        mask = _mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        found = _of_input(g, weight, through, A_, mask).view_as(x) if of_x else None
        seen = rows if mask is None else _kept_of(rows, mask)
        return (
            found,
            g.T @ rows if of_W else None,
            g.sum(0) if of_b else None,
            (through @ seen).to(A.dtype) if of_A else None,
            (A_ @ seen.T @ g).T.to(B.dtype) if of_B else None,
            None,
            None,
        )


def _of_input(g: Tensor, weight: Tensor, through: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    found = g @ weight
    if mask is None:
        return found.addmm_(through.T, A)
    update = through.T @ A
    update.view(mask.dtype).bitwise_and_(mask)
    return found.add_(update)


# Dropout by bits of integers: choosing by booleans costs torch's kernels for CPUs several times as much.


def _kept_of(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask has ones; the mask's memory is used up for it."""
    return mask.bitwise_and_(x.contiguous().view(mask.dtype)).view(x.dtype)


def _mask(x: Tensor, share: float, seed: int) -> Tensor:
    """Integers as wide as the numbers of x, all of whose bits are zero for a share of them; the seed gives it again."""
    bits = torch.from_numpy(_drawn(x.numel(), _kept(share), seed))
    return bits.to(_INTEGERS[x.dtype.itemsize]).view(x.shape)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF = 2**15  # what shares are counted in


def _kept(share: float) -> int:
    return round((1 - share) * _OF)


def _drawn(count: int, kept: int, seed: int) -> np.ndarray:
    """`count` times -1 (all bits) or 0, the former with probability kept / 2^15."""
    drawn = np.random.SFC64(seed).random_raw(count // 4 + 1)  # four numbers of 15 bits in each
    drawn &= np.uint64(0x7FFF7FFF7FFF7FFF)
    numbers = drawn.view(np.int16)[:count]
    numbers -= np.int16(min(kept, _OF - 1))
    numbers >>= 15
    return numbers


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
