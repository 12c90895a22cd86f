"""A frozen linear layer and a low-rank update in one operation, on a GPU (on a CPU: `deltatune.kernels.low_rank`).

Forward and backward are the same operation, y = x W^T + b + h U^T with h of r columns: forward with h = x A^T and
U = B, backward with W and the factors transposed, g W + (g B) A. Kept for backward are x, which many layers share,
and h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.adapter import LinearMap
from deltatune.kernels import gpu


def low_rank(x: Tensor, layer: LinearMap, A: Tensor, B: Tensor, dropout: bool) -> Tensor | None:
    """The layer and B A x in the form that is chosen for GPUs; None where the plain one has to run.

    Args:
        A: (r, in), or (rows, r, in) where every row of x (rows, tokens, in) has an adapter of its own; `B` likewise.
        dropout: Whether A sees another x than the layer.
    """
    if dropout or not gpu.on_gpu(x) or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return None
    if layer.kind != "linear" or layer.dtype != x.dtype:
        return None
    if A.dim() == 2:
        return fused_linear(x, layer.weight, layer.bias, A, B) if layer.dense else None
    if torch.is_grad_enabled() or not gpu.by_triton(x):
        return None
    from deltatune.kernels.triton_rows import plus_rows

    return plus_rows(layer(x), x, A, B, torch.arange(len(x), device=x.device))


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """x (..., in) through W (out, in) and B A, with A (r, in) and B (out, r), the scale in B."""
    return _FusedLinear.apply(x, weight, bias, A, B)


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, U: Tensor) -> Tensor:
    """y (T, n) = x W^T + b + h U^T, of x (T, k), W (n, k), h (T, r) and U (n, r)."""
    if gpu.by_triton(x):
        from deltatune.kernels.triton_linear import linear_plus as launched

        return launched(x, weight, bias, h, U)
    return F.linear(x, weight, bias).addmm_(h, U.T)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ A.to(x.dtype).T
        ctx.save_for_backward(x, weight, A, B, h)
        return linear_plus(rows, weight, bias, h, B.to(x.dtype)).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        of_x, of_W, of_b, of_A, of_B = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight))
        through = g @ B.to(x.dtype)  # (T, r)
        return (
            linear_plus(g, weight.T, None, through, A.to(x.dtype).T).view_as(x) if of_x else None,
            g.T @ rows if of_W else None,
            g.sum(0) if of_b else None,
            (through.T @ rows).to(A.dtype) if of_A else None,
            (g.T @ h).to(B.dtype) if of_B else None,
        )
