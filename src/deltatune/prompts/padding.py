"""Left padding, which a prefix in the native layout must not feel.

A model with rotary positions hears differences of positions only. So without a prefix it does not matter whether the
positions of a row count its padding, and many models count it where nobody says otherwise: in a plain call, and some
in `generate` too. A prefix stands at fixed places, and would be as much further away as a row has padding. Here
positions start at the first real token of each row, for models that count from the first column; positions that a
caller or the model itself worked out from the mask stay.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltatune.prompts.positions import counting_modules


class Padded(Protocol):
    """Knows the padding mask (B, columns) of the pass that is running, if rows in it may start with padding."""

    def padded(self) -> Tensor | None: ...


class FromFirstToken:
    """Hooks on the modules that make rotary angles: modules of their own, or attentions that do it by themselves."""

    def __init__(self, stage: Padded) -> None:
        self.stage = stage
        self.handles: list[Any] = []

    def attach(self, model: nn.Module, site_names: list[str]) -> None:
        for module in counting_modules(model, site_names):
            self.handles.append(module.register_forward_pre_hook(self.before_angles, with_kwargs=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before_angles(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = self.stage.padded()
        if mask is None:
            return args, kwargs
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _moved(kwargs["position_ids"], mask)}
        index = _place(type(module))
        if index >= len(args):
            return args, kwargs
        return (*args[:index], _moved(args[index], mask), *args[index + 1 :]), kwargs


@functools.cache
def _place(module_class: type[nn.Module]) -> int:
    """Where its forward takes positions. Of the class: what is put around the forward of a module may not say."""
    return [*inspect.signature(module_class.forward).parameters].index("position_ids") - 1


def _moved(positions: Any, mask: Tensor) -> Any:
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return positions
    fits = positions.shape[-2] in (1, len(mask)) and positions.shape[-1] <= mask.shape[1]
    return without_padding(positions, mask) if fits else positions


def without_padding(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions (..., B, T) counted from the first real token, of (..., 1 or B, T) of the last T columns of a mask.

    Before the rows may stand an axis of time, height and width, which are one where there are no images. Rows whose
    positions are not the columns' stay.
    """
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
    columns = torch.arange(mask.shape[1] - positions.shape[-1], mask.shape[1], device=positions.device)
    counts_columns = (positions == columns).all(-1, keepdim=True)
    return torch.where(counts_columns, (positions - padding).clamp_min(0), positions)
