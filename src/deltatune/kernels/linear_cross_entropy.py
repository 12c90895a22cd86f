"""`linear_cross_entropy`: the cross-entropy of h W^T + b, whose logits (N, V) are never there as a whole.

A few rows at a time: their logits become, in place, log-probabilities, probabilities, and their own gradient, which is
softmax - one_hot; products with it are the gradients of h, W and b. So these are made on the way forward, and backward
only scales them.
`torch.nn.functional.cross_entropy` of the whole logits is the definition; tests compare the two.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import checks
from deltatune.errors import ConfigError, DataError
from deltatune.kernels import liger

# Logits that are there at once, as a number of elements: enough rows for the products to run at full speed.
CHUNK_ELEMENTS = 2**23


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    num_items_in_batch: Tensor | int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of softcap * tanh(scale * (hidden W^T + b) / softcap), softmax in float32 (float64 for float64).

    Args:
        hidden: (..., d); under autocast it and the weight are taken in autocast's precision, as a layer's are.
        weight: (V, d), and bias (V,). They get gradients where they require them.
        labels: (...), classes or `ignore_index`. Rows with that are not computed; with nothing else the mean is NaN,
            as torch's.
        num_items_in_batch: What the sum is divided by, in place of `reduction`.
        scale: Factor of the logits.
        softcap: Bound of the logits; None: none.
        chunk: Rows at a time; by default as many as have 2^23 logits.

    Returns:
        A scalar in float32, or float64.

    Raises:
        ConfigError: `reduction` is neither "mean" nor "sum", or `chunk` or `softcap` not above 0.
        DataError: Not one label, a whole number, for each row.
    """
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"linear_cross_entropy: reduction={reduction!r} is not supported; use 'mean' or 'sum'",
            field="reduction",
            found=reduction,
            expected=("mean", "sum"),
        )
    if chunk is not None:
        checks.positive_int("linear_cross_entropy", "chunk", chunk)
    if softcap is not None:
        checks.finite_positive("linear_cross_entropy", "softcap", softcap)
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
        raise DataError(
            f"linear_cross_entropy: labels of shape {tuple(labels.shape)} and {labels.dtype} for rows of shape "
            f"{tuple(hidden.shape[:-1])}; give one whole number for each",
            field="labels",
            found=tuple(labels.shape),
            expected=tuple(hidden.shape[:-1]),
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype is not torch.float64:
        half = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(half), weight.to(half), None if bias is None else bias.to(half)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if liger.fits(rows, weight, scale):
        total = liger.summed(rows, weight, targets, bias, ignore_index, label_smoothing, softcap)
    else:
        chunk = rows_at_once(len(weight)) if chunk is None else chunk
        wanted = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (rows, weight, bias)]
        total = _summed(rows, weight, bias, targets, ignore_index, label_smoothing, scale, softcap, chunk, wanted)[0]
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def rows_at_once(vocabulary: int) -> int:
    """How many rows of logits are made at a time."""
    return max(CHUNK_ELEMENTS // vocabulary, 16)


# One operation to the compiler, which would roll out the loop and stumble over rows left out.
@torch.library.custom_op("deltatune::linear_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the rows, and its gradients of hidden (N, d), W and b; of those not wanted an empty one."""
    total = torch.zeros((), dtype=_exact(hidden), device=hidden.device)
    grads = [
        torch.zeros_like(part, dtype=dtype) if wants and part is not None else total.new_empty(0)
        for part, dtype, wants in zip((hidden, weight, bias), (hidden.dtype, total.dtype, total.dtype), wanted)
    ]
    kept = (labels != ignore_index).nonzero().squeeze(1)
    room = total.new_empty(min(chunk, len(kept)), len(weight))
    for index in kept.split(chunk):
        h, y = hidden[index], labels[index, None]
        logits, slope = _logits(h, weight, bias, scale, softcap, room[: len(index)])
        torch.log_softmax(logits, 1, out=logits)
        total -= (1 - label_smoothing) * logits.gather(1, y).sum()
        if label_smoothing:
            total -= label_smoothing * logits.mean(1).sum()
        if not any(wanted):
            continue
        g = logits.exp_().scatter_add_(1, y, logits.new_full(y.shape, label_smoothing - 1))
        if label_smoothing:
            g -= label_smoothing / len(weight)
        if slope is not None:
            g *= slope
        if wanted[2]:
            grads[2].add_(g.sum(0), alpha=scale)
        g = g.to(h.dtype)
        if wanted[0]:
            grads[0][index] = (g @ weight).mul_(scale)
        if wanted[1]:
            grads[1].add_(g.T @ h, alpha=scale)
    return total, grads[0], grads[1].to(weight.dtype), grads[2]


def _logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, room: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The logits in `room`, and with a softcap its derivative."""
    if h.dtype != room.dtype:  # rounded as the layer's own are
        room.copy_(F.linear(h, weight, bias))
    elif bias is None:
        torch.mm(h, weight.T, out=room)
    else:
        torch.addmm(bias, h, weight.T, out=room)
    if scale != 1.0:
        room.mul_(scale)
    if softcap is None:
        return room, None
    slope = 1 - room.div_(softcap).tanh_().square()
    return room.mul_(softcap), slope


@_summed.register_fake
def _(hidden, weight, bias, labels, ignore_index, label_smoothing, scale, softcap, chunk, wanted):  # noqa: ANN001, ANN202
    total = torch.empty((), dtype=_exact(hidden), device=hidden.device)
    parts = zip((hidden, weight, bias), (hidden.dtype, weight.dtype, total.dtype), wanted)
    grads = [torch.empty_like(part, dtype=dtype) if wants else total.new_empty(0) for part, dtype, wants in parts]
    grads[1] = grads[1].to(weight.dtype)
    return total, *grads


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.bias_dtype = inputs[-1], None if inputs[2] is None else inputs[2].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_sum: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    found = [
        # the factor is float32 and has no axis, so the product stays in the tensor's precision
        grad * of_sum if wants and of_sum is not None else None
        for grad, wants in zip(ctx.saved_tensors, ctx.wanted)
    ]
    if found[2] is not None:
        found[2] = found[2].to(ctx.bias_dtype)
    return *found, None, None, None, None, None, None, None


_summed.register_autograd(_backward, setup_context=_setup)
