"""`linear_plus` in Triton: the update is added to a tile of the product while that tile is still in registers.

Beside cuBLAS's product and one that adds to it, this spares reading and writing y once more. Whether that outweighs
what Triton's product is slower than cuBLAS's, benchmarks/gpu.py finds out for the GPU at hand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from deltatune.kernels import gpu


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, U: Tensor) -> Tensor:
    """y (M, N) = x W^T + b + h U^T. All of one dtype; strides may be any."""
    (M, K), N, R = x.shape, len(weight), h.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    strides = (*x.stride(), *weight.stride(), *h.stride(), *U.stride(), *y.stride())
    fixed: dict[str, Any] = {
        "BIASED": bias is not None,
        "BR": max(16, triton.next_power_of_2(R)),  # what a product of tiles needs at least
        "PRECISION": precision(x),
    }

    def grid(tiles: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"]),)

    kernel: Any = _kernel if gpu.interpreted() else _tuned
    tiles = {"BM": 32, "BN": 32, "BK": 32} if gpu.interpreted() else {}
    about = triton.next_power_of_2(M)  # tiles are chosen anew when the number of rows doubles
    kernel[grid](x, weight, y if bias is None else bias, h, U, y, M, N, K, R, about, *strides, **fixed, **tiles)
    return y


def precision(x: Tensor) -> str:
    """Of products of float32: exact, unless the user allowed torch less."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def _kernel(
    x, w, b, h, u, y, M, N, K, R, about, sxm, sxk, swn, swk, shm, shr, sun, sur, sym, syn,
    BIASED: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share columns of w in groups of eight rows of tiles, which stay in the cache
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    group = pid // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    m = ((group * 8 + (pid % (8 * across)) % height) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (((pid % (8 * across)) // height) * BN + tl.arange(0, BN)).to(tl.int64)
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    in_m, in_n = m[:, None] < M, n[None, :] < N
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = K - start
        xs = tl.load(x + m[:, None] * sxm + (start + k)[None, :] * sxk, mask=in_m & (k[None, :] < left), other=0.0)
        ws = tl.load(w + n[None, :] * swn + (start + k)[:, None] * swk, mask=in_n & (k[:, None] < left), other=0.0)
        total = tl.dot(xs, ws, total, input_precision=PRECISION)
    hs = tl.load(h + m[:, None] * shm + r[None, :] * shr, mask=in_m & (r[None, :] < R), other=0.0)
    us = tl.load(u + n[None, :] * sun + r[:, None] * sur, mask=in_n & (r[:, None] < R), other=0.0)
    total = tl.dot(hs, us, total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(b + n, mask=n < N, other=0.0)[None, :]
    tl.store(y + m[:, None] * sym + n[None, :] * syn, total.to(y.dtype.element_ty), mask=in_m & in_n)


def _tiles(BM: int, BN: int, BK: int, warps: int, stages: int) -> Any:
    return triton.Config({"BM": BM, "BN": BN, "BK": BK}, num_warps=warps, num_stages=stages)


_tuned = triton.autotune(
    [
        *(_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 3), _tiles(128, 128, 32, 4, 4)),
        *(_tiles(64, 128, 64, 4, 4), _tiles(64, 64, 64, 4, 4), _tiles(16, 64, 128, 4, 4)),
    ],
    key=["about", "N", "K"],
)(_kernel)
