"""Room beside the factors of LoRA for those of adapters of a higher rank: rows of A and columns of B that are zero.

They stay zero in training, and files leave them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError

_FACTORS = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "scaling"}


def plain(adapter: Any) -> bool:
    """Whether a LoRA adapter is its factors and nothing else, so that zeros can stand beside them."""
    held = {name for part in (adapter.named_parameters(), adapter.named_buffers()) for name, _ in part}
    return held <= _FACTORS and not len(adapter.variants)


def widen(adapter: Any, rank: int | None) -> None:
    """Hold the factors in the shape of a rank (None: as they are), and the scaling in a tensor.

    Raises:
        ConfigError: It is below the adapter's rank, or above that of one with more than factors; nothing has changed.
    """
    rank = int(adapter.room or adapter.r) if rank is None else rank
    if rank < adapter.r or rank % adapter.blocks or not (plain(adapter) or rank == adapter.r):
        raise ConfigError(
            f"rank {rank} is no room for a LoRA adapter of rank {adapter.r}; expected a multiple of {adapter.blocks} "
            "that is not below it, and no higher one for an adapter that is more than its factors",
            field="target_rank",
            found=rank,
            expected=adapter.r,
        )
    for factor in (adapter.lora_A, adapter.lora_B) if plain(adapter) else ():
        wider = of_rank(adapter, factor.weight, factor.weight, rank)
        if wider is not factor.weight:
            factor.weight = nn.Parameter(wider, requires_grad=factor.weight.requires_grad)
    adapter.room = rank if plain(adapter) else None
    if "scaling" in vars(adapter):
        scaling = torch.tensor(float(vars(adapter).pop("scaling")), device=adapter.lora_A.weight.device)
        adapter.register_buffer("scaling", scaling, persistent=False)


def of_rank(adapter: Any, factor: Tensor, tensor: Tensor, rank: int) -> Tensor:
    """Values for a factor, of the given rank; the values themselves if they are, or are for none of the factors."""
    if factor is adapter.lora_A.weight and len(tensor) != rank:
        return _resized(tensor.detach(), 0, rank, adapter.blocks)
    if factor is adapter.lora_B.weight and tensor.shape[1] * adapter.blocks != rank:
        return _resized(tensor.detach(), 1, rank // adapter.blocks)
    return tensor


def _resized(factor: Tensor, axis: int, rank: int, blocks: int = 1) -> Tensor:
    """A factor with zeros for a higher rank, or without them, on the axis of its rank; each block has its share."""
    parts, share = factor.unflatten(axis, (blocks, -1)), rank // blocks
    more = share - parts.shape[axis + 1]
    if more > 0:
        shape = [more if i == axis + 1 else side for i, side in enumerate(parts.shape)]
        parts = torch.cat([parts, parts.new_zeros(shape)], axis + 1)
    return parts.narrow(axis + 1, 0, share).flatten(axis, axis + 1)
