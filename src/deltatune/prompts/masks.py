"""What each attention implementation means by its mask, and how P keys that every query sees are added to it.

| implementation | mask                 | with a prefix                                                              |
|----------------|----------------------|----------------------------------------------------------------------------|
| sdpa           | None, causal, Q > 1  | means "upper left": query i sees keys 0..i. Spelt out as a boolean mask     |
| sdpa           | None otherwise       | None: everything is seen                                                   |
| eager          | None                 | None: eager never implies causality                                        |
| both           | bool or float (4-D)  | cut to the keys there are, then True or 0.0 for the prefix                 |
| flash          | None                 | None: flash aligns causality to the lower right, which suits a prefix      |
| flash          | 2-D, of the keys     | ones for the prefix                                                        |
| flex           | BlockMask            | the same rule, asked at kv - P, and True below P                           |
| any            | position_bias (T5)   | zeros for the prefix                                                       |

Where the rows of a batch see different parts of it, what is True, 1, 0.0 above is False, 0, lowest for the parts that
a row does not see, and a mask is made where there was none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.prompts.positions import Past


def extend(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    count: int,
    past: Past | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Any, dict[str, Any]]:
    """Keys, values, mask and keyword arguments of a call, ready for `count` keys to be put in front.

    Args:
        visible: (B, count), which of them each row sees; None: all.
        past: With PEFT's layout, what its numbers depend on further: where the prefix stands before the queries.
    """
    if kwargs.get("cache") is not None:
        _refuse(module, "paged attention (continuous batching), which keeps keys in a cache of its own")
    bias = kwargs.get("position_bias")
    if "flash" in backend or (backend != "sdpa" and isinstance(mask, Tensor) and mask.ndim == 2):
        kwargs = _check_flash(module, kwargs, past)
        if mask is None and visible is not None:
            mask = visible.new_ones(key.shape[0], key.shape[2])
        return key, value, None if mask is None else _pad(mask, count, visible), kwargs
    if type(mask).__name__ == "BlockMask":
        mask = _block_mask(mask, count, visible)
    else:
        if mask is None and backend != "eager" and backend != "flex_attention" and is_causal(module, query, kwargs):
            # sdpa reads None as "query i sees keys 0..i", and drops what a static cache holds beyond them.
            queries = query.shape[2]
            key, value = key[:, :, :queries], value[:, :, :queries]
            bias = cut(bias, queries)
            mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()[None, None]
        sliding = past is not None and kwargs.get("sliding_window")
        if mask is None and (visible is not None or sliding):
            mask = _all_seen(backend, query, key)
        mask = cut(mask, key.shape[2])
        if mask is not None:
            mask = _pad(mask, count, None if visible is None else visible[:, None, None])
            if past is not None and sliding:
                mask = _hide_beyond_window(mask, query, count, sliding, past)
    bias = cut(bias, key.shape[2])
    if bias is not None:
        bias = _pad(bias, count) if past is None else torch.cat([past.bias(module, query, count), bias], dim=-1)
        kwargs = {**kwargs, "position_bias": bias}
    return key, value, mask, kwargs


def cut(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask or bias for as many keys as there are, (..., 1 or more) -> (..., keys)."""
    if mask is None or mask.shape[-1] == keys:
        return mask
    return mask[..., :keys] if mask.shape[-1] != 1 else mask.expand(*mask.shape[:-1], keys)


def with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Mask and position bias as one additive mask."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def prepend(prefix: Tensor, tokens: Tensor) -> Tensor:
    """(heads, P, dim), the same in every row, or (B, heads, P, dim) before (B, heads, K, dim)."""
    return torch.cat([prefix.expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def _pad(mask: Tensor, count: int, visible: Tensor | None = None) -> Tensor:
    """What is seen in front: True in a boolean mask, 1 in an integer one, 0.0 in an additive one."""
    if visible is None:
        head = mask.new_full((*mask.shape[:-1], count), 0.0 if mask.is_floating_point() else 1)
        return torch.cat([head, mask], dim=-1)
    head = visible.to(mask.dtype)
    if mask.is_floating_point():
        head = torch.zeros_like(head).masked_fill(~visible, -torch.inf)  # below what hides tokens from a row of padding
    mask = mask.expand(visible.shape[0], *mask.shape[1:])
    return torch.cat([head.expand(*mask.shape[:-1], count), mask], dim=-1)


def _all_seen(backend: str, query: Tensor, key: Tensor) -> Tensor:
    """A mask that hides nothing: sdpa takes a boolean one for all queries, the others add one of full size."""
    if backend == "sdpa":
        return query.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool)
    return query.new_zeros(1, 1, query.shape[2], key.shape[2])


def is_causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    causal = given if given is not None else getattr(module, "is_causal", True)  # as sdpa_attention_forward decides
    return query.shape[2] > 1 and bool(causal)


def _check_flash(module: nn.Module, kwargs: dict[str, Any], past: Past | None) -> dict[str, Any]:
    """Flash kernels have no mask to extend for windows and packed rows: refuse rather than compute something else."""
    if kwargs.get("sliding_window"):
        _refuse(module, "a sliding window inside a flash kernel")
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seqlens") is not None:
        _refuse(module, "packed sequences inside a flash kernel")
    if kwargs.get("position_bias") is not None:
        _refuse(module, "a position bias inside a flash kernel")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[0] == 1 and (positions.diff(dim=-1) != 1).any():
        _refuse(module, "packed sequences (position_ids that restart) inside a flash kernel")
    return {name: given for name, given in kwargs.items() if name != "position_ids"}


def _block_mask(mask: Any, count: int, visible: Tensor | None = None) -> Any:
    """The block mask of the longer keys; kept on the mask, which all layers of a pass share."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept: dict[Any, Any] = mask.__dict__.setdefault("_deltatune_extended", {})
    key = (count, id(visible))  # which lives for as long as the mask made with it
    if key not in kept:
        tokens_mod = mask.mask_mod

        def with_prefix(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            in_prefix = kv < count
            seen = in_prefix if visible is None else in_prefix & visible[batch, torch.where(in_prefix, kv, 0)]
            return seen | (~in_prefix & tokens_mod(batch, head, q, torch.where(in_prefix, 0, kv - count)))

        rows, heads = mask.kv_num_blocks.shape[:2]
        rows = rows if visible is None else visible.shape[0]
        queries, keys = mask.seq_lengths
        device, size = mask.kv_num_blocks.device, mask.BLOCK_SIZE
        kept[key] = create_block_mask(with_prefix, rows, heads, queries, keys + count, device, BLOCK_SIZE=size)
    return kept[key]


def _hide_beyond_window(mask: Tensor, query: Tensor, count: int, window: int, past: Past) -> Tensor:
    """PEFT's prefix slides out of the window like any stretch of cache: query i sees column j iff i - j < window."""
    i = past.positions(query, count)[:, None]
    gone = i - torch.arange(count, device=query.device)[None] >= window  # (Q, P)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    head = mask[..., :count].expand(*mask.shape[:-2], query.shape[2], count).masked_fill(gone, hidden)
    return torch.cat([head, mask[..., count:].expand(*mask.shape[:-2], query.shape[2], -1)], dim=-1)


def _refuse(module: nn.Module, what: str) -> None:
    raise StateError(
        f"{type(module).__name__}: a prefix cannot be combined with {what}; "
        "load the model with attn_implementation='sdpa'",
        found=what,
        hint="attn_implementation='sdpa'",
    )
