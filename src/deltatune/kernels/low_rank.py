"""`low_rank_linear`: y = x W^T + b + (x * mask) A^T B^T of a frozen W, in the fewest passes over activations.

Written as products and sums it costs, beyond them, a pass over y to add, one to scale, two over the gradient of x, and
with dropout a mask as large as x that is drawn number by number. Here y and the gradient of x are made by the products
themselves, x is kept once however many layers read it, x A^T is made again for the gradient, and so is the mask, from
its seed. Plain torch below `deltatune.methods.lora` is the definition; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

from deltatune.adapter import LinearMap
from deltatune.kernels import gpu

# Draw masks of dropout here. False: let torch draw them, as PEFT does, number for number under the same seed.
own_dropout = True
_FEW = 64  # rows, for which the products may have any order and the number of calls counts


def fits(x: Tensor, layer: LinearMap, dropout: float = 0.0) -> bool:
    """Whether it can stand for that layer: one with a plain weight in the precision of x.

    Under the compiler, which fuses by itself, and under autocast, which chooses precisions product by product, the
    products are left as they are; on other devices too, where none of this has been measured.
    """
    if layer.kind != "linear" or not layer.dense or layer.dtype != x.dtype or torch.compiler.is_compiling():
        return False
    if (dropout and not own_dropout) or torch._C._are_functorch_transforms_active():  # vmap has no rule for it
        return False
    if forward_ad._current_level >= 0:  # nor have dual numbers
        return False
    return x.is_cpu and x.is_floating_point() and not torch.is_autocast_enabled("cpu")


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    dropout: float = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """x (..., in) through W (out, in) and scale B A, with A (r, in) and B (out, r).

    Args:
        dropout: Share of x that A does not see, on a CPU; drawn anew in every call, out of torch's generator.
        scale: A number, or a tensor with one.
    """
    if dropout:
        B = (scale * (_OF / _kept(dropout))) * B  # what is kept is as much larger
        return _LowRankLinear.apply(x, weight, bias, A, B, dropout, int(torch.randint(2**62, ())))
    if torch.is_grad_enabled():
        B = B if type(scale) is float and scale == 1 else scale * B
        return _LowRankLinear.apply(x, weight, bias, A, B, 0.0, 0)
    return _without_gradient(x, weight, bias, A, B, scale)


def _without_gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """For few rows, while decoding, in the fewest calls: one of them costs what a factor's product does."""
    if A.dtype != x.dtype or B.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if x.numel() == x.shape[-1] and not isinstance(scale, Tensor):  # one token: vectors need no transposed matrices
        y = F.linear(x, weight, bias)
        y.view(-1).addmv_(B, A.mv(x.reshape(-1)), alpha=scale)
        return y
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    h = F.linear(rows, A) if len(rows) <= _FEW else (A @ rows.T).T
    if isinstance(scale, Tensor):
        h, scale = h.mul_(scale), 1.0
    return y.addmm_(h, B.T, alpha=scale).view(*x.shape[:-1], y.shape[-1])


_autocast, _transforms = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active
_AS_VECTORS = (torch.float32, torch.float64)  # W times a vector has the bits of a batch of one row through W


def prepared(adapter: Any, layer: LinearMap) -> Callable[[Tensor], Tensor | None] | None:
    """x -> layer and update of a plain LoRA without gradients; None where another way than this one has to be taken.

    While decoding, the look-ups on the way to three small products cost more than these do: through modules, properties
    and maps 30 microseconds a layer, whose own product takes 40 to 140, and whose weights have pushed all of it out of
    the nearer caches. So what may have changed since the last call is asked for once, where it is kept, and in dicts.
    """
    module: Any = getattr(layer, "module", None)
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    if layer.kind != "linear" or "bias" not in module._parameters:
        return None
    state, parts, held, frozen = vars(adapter), adapter._modules, vars(module), module._parameters
    lora_A, lora_B = adapter.lora_A, adapter.lora_B
    down, up = lora_A._parameters, lora_B._parameters

    def run(x: Tensor) -> Tensor | None:
        if parts["lora_A"] is not lora_A or parts["lora_B"] is not lora_B:
            return None
        weight, bias, dtype = frozen["weight"], frozen["bias"], x.dtype
        A, B, scale = down.get("weight"), up.get("weight"), state.get("scaling")
        if A is None or B is None or up.get("bias") is not None or type(scale) is not float:
            return None
        if type(weight) is not Parameter or weight.dtype is not dtype or not x.is_cpu or gpu.backend != "plain":
            return None
        if held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held:
            return None
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return None
        if (state["training"] and isinstance(parts["lora_dropout"], nn.Dropout)) or _autocast() or _transforms():
            return None
        if forward_ad._current_level >= 0:
            return None
        shape = x.shape
        if x.numel() != shape[-1] or dtype not in _AS_VECTORS or A.dtype is not dtype or B.dtype is not dtype:
            return _without_gradient(x, weight, bias, A, B, scale)
        row = x.view(-1)  # of one row every view is one, whatever its strides
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
        return y.addmv_(B, A.mv(row), alpha=scale).view(*shape[:-1], -1)

    return run


class _LowRankLinear(torch.autograd.Function):
    """Products of many rows with r of a factor are written with r first: (r, T) is three times as fast as (T, r)."""

    @staticmethod
    def forward(  # with ctx: a `setup_context` costs as much as a small product, and functorch never comes here
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float, seed: int
    ) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(x, weight, A, B)
        rows = _rows(x)
        y = F.linear(rows, weight, bias)
        seen = _kept_of(rows, _mask(rows, dropout, seed)) if dropout else rows
        h = A.to(x.dtype) @ seen.T  # (r, T)
        y.addmm_(h.T, B.to(x.dtype).T)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        of_x, of_W, of_b, of_A, of_B = ctx.needs_input_grad[:5]
        rows, g, A_, B_ = _rows(x), _rows(grads[0]), A.to(x.dtype), B.to(x.dtype)
        through = B_.T.contiguous() @ g.T  # (r, T)
        mask = _mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        found = _of_input(g, weight, through, A_, mask).view_as(x) if of_x else None
        kept = _differentiable if torch.is_grad_enabled() else _kept_of
        seen = rows if mask is None else kept(rows, mask)
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
    if torch.is_grad_enabled():
        return found.add_(_differentiable(update, mask))
    update.view(mask.dtype).bitwise_and_(mask)
    return found.add_(update)


# Dropout by bits of integers: choosing by booleans costs torch's kernels for CPUs several times as much.


def _kept_of(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask has ones; the mask's memory is used up for it."""
    return mask.bitwise_and_(x.contiguous().view(mask.dtype)).view(x.dtype)


def _differentiable(x: Tensor, mask: Tensor) -> Tensor:
    """The same for a backward pass that is differentiated itself; bits have no gradient."""
    return torch.where(mask != 0, x, 0)


def _mask(x: Tensor, share: float, seed: int) -> Tensor:
    """Integers as wide as the numbers of x, all of whose bits are zero for a share of them; the seed gives it again."""
    bits = torch.from_numpy(_drawn(x.numel(), _kept(share), seed))
    return bits.to(_INTEGERS[x.dtype.itemsize]).view(x.shape)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF = 2**15  # what shares are counted in


def _kept(share: float) -> int:
    return max(round((1 - share) * _OF), 1)


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
