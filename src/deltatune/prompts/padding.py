"""Left padding, which a prefix in the native layout must not feel.

A model with rotary positions hears differences of positions only. So without a prefix it does not matter whether the
positions of a row count its padding, and many models count it where nobody says otherwise: in a plain call, and some
in `generate` too. A prefix stands at fixed places, and would be as much further away as a row has padding. Here
positions start at the first real token of each row, for models that count from the first column; positions that a
caller or the model itself worked out from the mask stay.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltatune.prompts.positions import rotary_modules


class Padded(Protocol):
    """Knows the padding mask (B, columns) of the pass that is running, if rows in it may start with padding."""

    def padded(self) -> Tensor | None: ...


class FromFirstToken:
    """Hooks on the modules that make rotary angles."""

    def __init__(self, stage: Padded) -> None:
        self.stage = stage
        self.handles: list[Any] = []

    def attach(self, model: nn.Module, site_names: list[str]) -> None:
        for module in rotary_modules(model, site_names):
            self.handles.append(module.register_forward_pre_hook(self.before_angles, with_kwargs=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before_angles(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = self.stage.padded()
        if mask is None:
            return args, kwargs
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        positions = given.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[0] not in (1, len(mask)):
            return args, kwargs
        moved = without_padding(positions, mask)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": moved}
        index = list(given).index("position_ids")
        return (*args[:index], moved, *args[index + 1 :]), kwargs


def without_padding(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions (B, T) counted from the first real token, of positions (1 or B, T) of the last T columns of a mask.

    Rows whose last position is not the last column do not count columns; they stay.
    """
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
    counts_columns = positions[:, -1:] == mask.shape[1] - 1
    return torch.where(counts_columns, (positions - padding).clamp_min(0), positions)
