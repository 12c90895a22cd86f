"""Signatures: `help(model.forward)` and programs that inspect it see the base model's arguments."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn

from deltatune.errors import ConfigError


def update_forward_signature(model: nn.Module) -> None:
    """Give `model.forward` the signature and documentation of the base model's; what it does stays."""
    _borrow(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Likewise for `model.generate`, where the base model has one."""
    _borrow(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Both, or one of them.

    Args:
        method: "forward", "generate" or "all".
    """
    forward, generate = update_forward_signature, update_generate_signature
    updates = {"forward": [forward], "generate": [generate], "all": [forward, generate]}
    if method not in updates:
        raise ConfigError(
            f"update_signature: method={method!r}, expected one of {', '.join(updates)}",
            field="method",
            found=method,
            expected=list(updates),
        )
    for update in updates[method]:
        update(model)


def _borrow(model: Any, name: str) -> None:
    source = getattr(type(model.get_base_model()), name, None)
    if source is None:
        return
    own = getattr(type(model), name)

    @functools.wraps(source, assigned=("__doc__", "__name__", "__annotations__"), updated=())
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    setattr(model, name, MethodType(method, model))
