"""The fast form of a prefix: out = e^(lse_t - L) out_t + e^(q P_K^T - L) P_V.   https://arxiv.org/abs/2501.01005

softmax([prefix; tokens]) is cut into two parts, each with the logarithm of its sum of exponentials:

    L = log(e^lse_t + e^lse_p)        lse_t over the tokens, with out_t from the kernel of the base model's attention
                                      lse_p over the P keys of the prefix: one small product

So no keys or values are copied, the prefix is there once for the whole batch, and a causal kernel needs no mask. The
backward pass of the same kernel, given the merged output and L, computes with e^(q K^T - L), which are the tokens'
probabilities in the joint softmax; the prefix's are computed again, so nothing of size Q x P is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_flash_cpu: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward
_efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward: Any = torch.ops.aten._scaled_dot_product_efficient_attention_backward


def has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether there is a fused kernel that gives its log-sum-exp away."""
    if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1] or not key.shape[2]:
        return False
    if query.device.type == "cpu":
        return query.is_floating_point()
    return query.device.type == "cuda" and (key.shape[1] == query.shape[1] or _is_flash(query, mask))


def merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q [P_K; K]^T + [0; mask]) [P_V; V] by two parts, (B, H, Q, dim).

    Args:
        query: (B, H, Q, dim).
        key: (B, heads, K, dim) with H a multiple of heads, and so `value`.
        prefix_key: (heads, P, dim), and so `prefix_value`.
        mask: Boolean or additive, (B or 1, H or 1, Q or 1, K); gets no gradient.
        is_causal: Query i sees tokens 0..i; without a mask.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Merged.apply(query, key, value, prefix_key, prefix_value, _additive(mask, query), is_causal, scale)  # type: ignore[return-value]


def joint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The same in plain operations: one softmax over the scores of both parts, which are all there at once.

    For a few queries, as in decoding, this beats the kernel, and needs none.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows, heads, queries, dim = query.shape
    shared = key.shape[1]
    groups, count = heads // shared, prefix_key.shape[1]
    query = query * scale
    if groups == 1:
        scores = query @ key.mT  # (B, H, Q, K)
    else:
        scores = (query.reshape(rows, shared, groups * queries, dim) @ key.mT).view(rows, heads, queries, -1)
    if is_causal:
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril()
    added = _additive(mask, scores)
    scores = scores if added is None else scores + added
    prefix_scores = _split(torch.bmm(_stacked(query, shared), prefix_key.mT), rows, queries)
    weights = torch.cat([prefix_scores, scores], dim=-1).softmax(dim=-1)
    prefix_weights, weights = weights[..., :count], weights[..., count:]
    if groups == 1:
        output = weights @ value
    else:
        grouped = weights.reshape(rows, shared, groups * queries, -1) @ value
        output = grouped.view(rows, heads, queries, -1)
    return output + _split(torch.bmm(_stacked(prefix_weights, shared), prefix_value), rows, queries)


class _Merged(torch.autograd.Function):
    """Saves the inputs, the output and L (B, H, Q), as the kernel itself does."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        rows, _, queries, _ = query.shape
        shared = key.shape[1]
        output, lse, extra = _attention(query, key, value, mask, is_causal, scale)
        scores = _scores(query, prefix_key, scale)  # (heads, P, B * Q * groups): P in rows is easier on the kernels
        token_lse = _stacked(lse[..., :queries, None], shared).mT
        total = torch.logaddexp(token_lse, scores.logsumexp(1, keepdim=True))
        weights, share = scores.sub_(total).exp_(), (token_lse - total).exp_().mT
        stacked = _stacked(output, shared)
        if stacked.dtype == weights.dtype:
            stacked = stacked.mul_(share).baddbmm_(weights.mT, prefix_value)
        else:  # half precision: added in float32
            wide = torch.baddbmm(stacked.to(weights.dtype) * share, weights.mT, prefix_value.to(weights.dtype))
            stacked = wide.to(output.dtype)
        output, total = _split(stacked, rows, queries), _split(total.mT, rows, queries).squeeze(-1)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mask, output, total)
        ctx.is_causal, ctx.scale, ctx.extra = is_causal, scale, extra
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, prefix_key, prefix_value, mask, output, total = ctx.saved_tensors
        rows, _, queries, _ = query.shape
        shared = key.shape[1]
        to_query = to_key = to_value = None
        if any(ctx.needs_input_grad[:3]):
            to_query, to_key, to_value = _attention_backward(
                gradient, query, key, value, output, total, mask, ctx.is_causal, ctx.scale, ctx.extra
            )
        weights = _scores(query, prefix_key, ctx.scale).sub_(_stacked(total[..., None], shared).mT).exp_()
        wide = weights.dtype
        outer = _stacked(gradient, shared).to(wide)
        to_prefix_value = torch.bmm(weights, outer).to(prefix_value.dtype)
        mean = (outer * _stacked(output, shared)).sum(-1)[:, None]
        to_scores = torch.bmm(prefix_value.to(wide), outer.mT).sub_(mean).mul_(weights).mul_(ctx.scale)
        to_prefix_key = torch.bmm(to_scores, _stacked(query, shared).to(wide)).to(prefix_key.dtype)
        if to_query is not None and ctx.needs_input_grad[0]:
            to_query.add_(_split(torch.bmm(to_scores.mT, prefix_key.to(wide)), rows, queries))
        return to_query, to_key, to_value, to_prefix_key, to_prefix_value, None, None, None


def _scores(query: Tensor, prefix_key: Tensor, scale: float) -> Tensor:
    """scale * P_K q^T in at least float32, (heads, P, B * Q * groups)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.bmm(prefix_key.to(wide), _stacked(query, prefix_key.shape[0]).mT.to(wide)).mul_(scale)


def _stacked(tensor: Tensor, shared: int) -> Tensor:
    """(B, H, Q, n) -> (heads, B * Q * groups, n): a view, where heads are not grouped and lie beside each other."""
    return tensor.transpose(1, 2).unflatten(2, (shared, -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)


def _split(stacked: Tensor, rows: int, queries: int) -> Tensor:
    """The way back, (B, H, Q, n)."""
    return stacked.unflatten(1, (rows, queries, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Hidden keys get the lowest number, not -inf: the lse_t of a query that sees no token is as low then, not 0."""
    if mask is None:
        return None
    lowest = torch.finfo(like.dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(like.dtype).clamp_min(lowest)


# ---------------------------------------------------------------------------------------------------------- the kernels


def _is_flash(query: Tensor, mask: Tensor | None) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return mask is None and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Any]:
    """Output, log-sum-exp (B, H, Q or more) and what else the backward pass wants; on CUDA read, never run."""
    if query.device.type == "cpu":
        return *_flash_cpu(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale), None
    if _is_flash(query, mask):
        output, lse, *extra = _flash(query, key, value, 0.0, is_causal, False, scale=scale)
        return output, lse, ("flash", extra[:6])
    bias = None if mask is None else mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    output, lse, *extra = _efficient(query, key, value, bias, True, 0.0, is_causal, scale=scale)
    return output, lse, ("efficient", [*extra, lse.shape[-1]])  # its lse is padded


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    extra: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (gradient, query, key, value)
    if extra is None:
        return _flash_cpu_backward(*tensors, output, total, 0.0, is_causal, attn_mask=mask, scale=scale)
    kind, further = extra
    if kind == "flash":
        *sizes, seed, offset = further
        return _flash_backward(*tensors, output, total.contiguous(), *sizes, 0.0, is_causal, seed, offset, scale=scale)
    seed, offset, width = further
    bias = None if mask is None else mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    total = torch.nn.functional.pad(total, (0, width - total.shape[-1]), value=torch.inf)
    wanted = [True, True, True, False]
    return _efficient_backward(*tensors, bias, output, total, seed, offset, 0.0, wanted, is_causal, scale=scale)[:3]
