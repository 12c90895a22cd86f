"""A layer and its update as one product: W + update is built for it, and again for the gradient instead of being kept.

Gradients are written out with a `ctx` in `forward`: a `setup_context` would cost as much as a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.adapter import LinearMap


def through_sum(x: Tensor, layer: LinearMap, build: Callable[..., Tensor], *tensors: Tensor) -> Tensor | None:
    """The layer with the weight W + build(*tensors): one product with x where a layer and its update take two.

    The sum is built again for the gradient instead of being kept. None where there is no such way: the layer's weight
    is packed, adapted already, or in half precision, which would round most of the update away; nor under autocast.
    """
    if x.dtype.itemsize < 4 or not _is_plain(x, layer):
        return None
    return _ThroughSum.apply(x, layer.weight, layer.bias, build, *tensors)


def through_entries(x: Tensor, layer: LinearMap, places: Tensor, values: Tensor) -> Tensor | None:
    """`through_sum` of an update by `values` at `places` (n,) of the matrix, counted row by row, each there once.

    In half precision the update has a product of its own beside the layer's, which rounds it to its own size. The sum
    of a small layer is kept: building it again would cost more time than it is worth memory.
    """
    places = places.long()  # which torch adds at faster
    if _is_plain(x, layer):
        if x.dtype.itemsize >= 4 and layer.weight.numel() <= _SMALL:
            return F.linear(x, with_entries(layer.weight, places, values), layer.bias)
        return _ThroughEntries.apply(x, layer.weight, layer.bias, places, values, layer.out_features)
    if layer.kind != "linear" or x.dtype.itemsize != 2 or not by_hand():
        return None
    y = layer(x)
    return y + _ThroughEntries.apply(x, None, None, places, values, layer.out_features).to(y.dtype)


_SMALL = 1 << 18  # entries of a matrix whose product with a batch is not much more than a function written in Python


def _is_plain(x: Tensor, layer: LinearMap) -> bool:
    fits = layer.kind == "linear" and layer.dense and layer.dtype == x.dtype
    return fits and by_hand() and not torch.is_autocast_enabled(x.device.type)


def by_hand() -> bool:
    """Whether a gradient may be written out: the compiler has its own, and functorch asks for `setup_context`."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def with_entries(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A matrix with `values` added at `places`, counted row by row."""
    return weight.flatten().index_add(0, places, values.to(weight.dtype)).view(weight.shape)


class _ThroughEntries(torch.autograd.Function):
    """Beside `_ThroughSum`, the gradient of the values is read off that of the sum.

    That of x goes through the sum in half precision too: there it is one of many numbers that are rounded as much.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, places: Tensor, values: Tensor, out: int
    ) -> Tensor:
        ctx.out = out
        ctx.save_for_backward(x, weight, places, values)
        if weight is None:
            return F.linear(x, _alone(x, out, places, values))
        if x.dtype.itemsize >= 4:
            return F.linear(x, with_entries(weight, places, values), bias)
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias).addmm_(rows, _alone(x, out, places, values).T)
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, places, values = ctx.saved_tensors
        of_x, of_W, of_b = ctx.needs_input_grad[:3]
        g = grads[0].reshape(-1, ctx.out)
        found = None
        if of_x:
            whole = _alone(x, ctx.out, places, values) if weight is None else with_entries(weight, places, values)
            found = (g @ whole).view(x.shape)
        of_sum = g.T @ x.reshape(-1, x.shape[-1])
        of_values = of_sum.flatten().index_select(0, places).to(values.dtype)
        return found, of_sum if of_W else None, g.sum(0) if of_b else None, None, of_values, None


def _alone(x: Tensor, out: int, places: Tensor, values: Tensor) -> Tensor:
    """The update (out, in) that `with_entries` adds, in the precision of x (..., in)."""
    zeros = x.new_zeros(out * x.shape[-1])
    return zeros.index_add_(0, places, values.to(x.dtype)).view(out, x.shape[-1])


class _ThroughSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, build: Any, *tensors: Tensor) -> Tensor:
        ctx.build = build
        ctx.save_for_backward(x, weight, *tensors)
        return F.linear(x, weight + build(*tensors), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            copies = [tensor.detach().requires_grad_() for tensor in tensors]
            update = ctx.build(*copies)
        of_x = grads[0] @ (weight + update.detach()) if ctx.needs_input_grad[0] else None
        rows = grads[0].flatten(0, -2)
        of_sum = rows.T @ x.flatten(0, -2)
        of_weight = of_sum if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, *torch.autograd.grad(update, copies, of_sum)
