"""Rows of one batch with different low-rank updates in Triton: y[row] + x[row] A[i]^T B[i]^T with i = which[row].

Each row reads the factors of its own adapter where they are in the stack: none are copied or repeated for the rows that
share one. The first kernel writes x A^T in parts of the sum over features, so that
one token keeps more than one core of the GPU busy; the second adds the parts up, always in the same order.
(Punica, https://arxiv.org/abs/2310.18547, and S-LoRA, https://arxiv.org/abs/2311.03285, gather so.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from deltatune.kernels.triton_linear import precision

_FEATURES = 1024  # of a part
_TOKENS, _OUT, _IN = 16, 64, 64  # sides of tiles


def plus_rows(y: Tensor, x: Tensor, A: Tensor, B: Tensor, which: Tensor) -> Tensor:
    """y (rows, tokens, out) and the update of x (rows, tokens, in) under the adapter of each row.

    Args:
        A: (adapters, r, in), contiguous, as `B`.
        B: (adapters, out, r), the scale in it.
        which: (rows), numbers of adapters; -1 for none.
    """
    (rows, tokens, width), rank, out = x.shape, A.shape[1], B.shape[1]
    if not (y.numel() and width):
        return y.clone()
    A, B, x = A.to(x.dtype).contiguous(), B.to(x.dtype).contiguous(), x.contiguous()
    parts, BR = triton.cdiv(width, _FEATURES), max(16, triton.next_power_of_2(rank))
    h = torch.empty(parts, rows, tokens, BR, dtype=torch.float32, device=x.device)
    tall = triton.cdiv(tokens, _TOKENS)
    y, result = y.contiguous(), torch.empty(rows, tokens, out, dtype=y.dtype, device=y.device)
    down: Any = _down
    up: Any = _up
    sizes, exact = {"BT": _TOKENS, "BR": BR}, precision(x)
    down[(rows, tall, parts)](
        x, A, which, h, rows, tokens, width, rank, **sizes, BK=_IN, PART=_FEATURES, PRECISION=exact
    )
    up[(rows, tall, triton.cdiv(out, _OUT))](
        h, B, which, y, result, rows, tokens, out, rank, parts, **sizes, BN=_OUT, PRECISION=exact
    )
    return result


@triton.jit
def _down(
    x, A, which, h, rows, tokens, width, rank,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    adapter = tl.load(which + row).to(tl.int64)
    if adapter < 0:
        return
    t, r, k = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BK)
    total = tl.zeros((BT, BR), tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, width), BK):
        inside = start + k < width
        xs = tl.load(
            x + (row * tokens + t[:, None]) * width + (start + k)[None, :],
            mask=(t[:, None] < tokens) & inside[None, :], other=0.0,
        )  # fmt: skip
        As = tl.load(
            A + (adapter * rank + r[None, :]) * width + (start + k)[:, None],
            mask=(r[None, :] < rank) & inside[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(xs, As, total, input_precision=PRECISION)
    place = h + ((part * rows + row) * tokens + t[:, None]) * BR + r[None, :]
    tl.store(place, total, mask=t[:, None] < tokens)


@triton.jit
def _up(
    h, B, which, y, result, rows, tokens, out, rank, parts,
    BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(which + row).to(tl.int64)
    length, high = tl.where(adapter >= 0, tokens, 0), tl.where(adapter >= 0, rank, 0)  # nothing is added to the base
    t, r = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BR)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    total = tl.zeros((BT, BR), tl.float32)
    for part in range(parts):
        place = h + ((part * rows + row) * tokens + t[:, None]) * BR + r[None, :]
        total += tl.load(place, mask=t[:, None] < length, other=0.0)
    inside = (r[:, None] < high) & (n[None, :] < out)
    Bs = tl.load(B + (adapter * out + n[None, :]) * rank + r[:, None], mask=inside, other=0.0)
    update = tl.dot(total.to(Bs.dtype), Bs, input_precision=PRECISION)
    cell, mask = (row * tokens + t[:, None]) * out + n[None, :], (t[:, None] < tokens) & (n[None, :] < out)
    sum_ = tl.load(y + cell, mask=mask, other=0.0).to(tl.float32) + update
    tl.store(result + cell, sum_.to(result.dtype.element_ty), mask=mask)
