"""`LowRankWeight`: W + L R, standing where a parameter W stood, and multiplied without ever being put together.

Modules read the weights of their experts in a few ways: by index, in batches, by a grouped kernel. Each is answered
from W, L and R. Anything else gets the dense matrices, so that what is not known here is slow, not wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.weight import LazyWeight

ALIGNMENT = 16  # bytes: grouped kernels want strides that are multiples of it
_TRANSFORMERS = "transformers.integrations.moe"  # has a grouped kernel of its own, for what torch's does not take


class LowRankWeight(LazyWeight):
    """Stands for W (..., m, n) + L (..., m, k) R (..., k, n), in the precision of W."""

    parts: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(W: Tensor, L: Tensor, R: Tensor) -> Tensor:
        """The sum as one tensor, known to autograd: code below torch's functions gives L and R gradients too."""
        L, R = L.to(W.dtype), R.to(W.dtype)
        made: Any = _Known.apply(W, L, R)
        made.parts, made._compute = (W, L, R), lambda: W + L @ R
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _rules(_TRANSFORMERS in sys.modules).get(func)
        answer = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs) if answer is NotImplemented else answer


class _Known(torch.autograd.Function):
    """W, L, R -> the weight; a gradient of the dense weight becomes those of its parts."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, L: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(L, R)
        return LowRankWeight(W, lambda: W)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (G,), (L, R) = gradients, ctx.saved_tensors
        return (G if ctx.needs_input_grad[0] else None), G @ R.mT, L.mT @ G


# Each rule answers one function, or says NotImplemented for arguments that it does not know.


def _index(weight: Any, key: Any) -> Any:
    """weight[key], for one expert, a range of them, or one per row of a batch."""
    plain = isinstance(key, (int, slice)) or (isinstance(key, Tensor) and key.ndim <= 1 and key.dtype != torch.bool)
    if weight.ndim != 3 or not plain or type(key) is bool:
        return NotImplemented
    return LowRankWeight.of(*(part[key] for part in weight.parts))


def _transpose(weight: Any, dim0: int, dim1: int) -> Any:
    if {dim0 % weight.ndim, dim1 % weight.ndim} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    return _mT(weight)


def _mT(weight: Any) -> Any:
    W, L, R = weight.parts
    return LowRankWeight.of(W.mT, R.mT, L.mT)


def _view(weight: Any, *shape: Any) -> Any:
    """Experts that are stored one below the other, (E m, n), seen as (E, m, n)."""
    W, L, R = weight.parts
    split = W.view(*shape)
    if W.ndim != 2 or split.ndim != 3 or split.shape[-1] != W.shape[-1]:
        return NotImplemented
    return LowRankWeight.of(split, L.reshape(*split.shape[:2], -1), R.expand(len(split), *R.shape))


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, LowRankWeight) or isinstance(x, LowRankWeight):
        return NotImplemented
    W, L, R = weight.parts
    return F.linear(x, W, bias) + F.linear(F.linear(x, R), L)


def _product(a: Any, b: Any) -> Any:
    if isinstance(a, LowRankWeight) and isinstance(b, LowRankWeight):
        return NotImplemented
    if isinstance(a, LowRankWeight):
        W, L, R = a.parts
        return W @ b + L @ (R @ b)
    W, L, R = b.parts
    return a @ W + (a @ L) @ R


def _grouped(kernel: Callable[..., Tensor], x: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of x, sorted by expert, each times the weight of its own."""
    if not isinstance(weight, LowRankWeight) or weight.ndim != 3 or isinstance(x, LowRankWeight):
        return NotImplemented
    W, L, R = weight.parts
    step = ALIGNMENT // W.element_size()
    missing = -L.shape[-1] % step
    L, R = F.pad(L, (0, missing)), F.pad(R, (0, 0, 0, missing))
    return kernel(x, W, *args, **kwargs) + kernel(kernel(x, L, *args, **kwargs), R, *args, **kwargs)


@functools.cache
def _rules(with_transformers: bool) -> dict[Any, Callable[..., Any]]:
    kernels = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]
    if with_transformers:
        kernels.append(torch.ops.transformers.grouped_mm_fallback)
    products = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)
    return {
        Tensor.__getitem__: _index,
        **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
        Tensor.mT.__get__: _mT,  # type: ignore[attr-defined]
        **dict.fromkeys((Tensor.view, Tensor.reshape), _view),
        F.linear: _linear,
        **dict.fromkeys(products, _product),
        **{kernel: functools.partial(_grouped, kernel) for kernel in kernels if kernel is not None},
    }
