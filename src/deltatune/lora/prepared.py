"""What a helper has worked out of data for the layers of a model, left on the layers until LoRA is built there.

It is a plain attribute: no part of the model's state, copied with it, r numbers for each input and output of a layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltatune.adapter import LinearMap

_NAME = "_lora_start"


def leave(module: nn.Module, start: str, factors: dict[str, Tensor]) -> None:
    vars(module)[_NAME] = (start, factors)


def found(layer: LinearMap, start: str) -> dict[str, Tensor] | None:
    """What was left on a layer for this start."""
    if layer.only_weight:  # no module of its own runs on inputs there
        return None
    module: Any = layer.module  # type: ignore[attr-defined]
    kind, factors = vars(module).get(_NAME, (None, None))
    return factors if kind == start else None


def forget(module: nn.Module) -> None:
    vars(module).pop(_NAME, None)
